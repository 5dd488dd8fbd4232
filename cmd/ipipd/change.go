package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"ipipd/internal/config"
	"ipipd/internal/control"
	"ipipd/internal/tunnel"
)

// hangUp handles SIGHUP: it reloads the configuration.
func (p *process) hangUp(ctx context.Context) {
	_, err := p.change(ctx, control.Request{Action: control.Reload})
	var refused *control.Refusal
	switch {
	case ctx.Err() != nil:
	case errors.As(err, &refused) && refused.Nothing:
		p.notify.reloading() // the service manager waits for both
		p.notify.ready()
		p.log.Info(err.Error())
	case err != nil:
		for line := range strings.Lines(err.Error()) {
			p.log.Error("the configuration is not reloaded, and all is as it was", "err", strings.TrimSpace(line))
		}
	}
}

var errUnconfigured = &control.Refusal{Nothing: true,
	Message: "nothing to reload: the tunnel is configured by the flags of ipipd up alone"}

// change implements control.Handler: it does all that r says, or nothing.
func (p *process) change(ctx context.Context, r control.Request) (result control.Result, err error) {
	switch {
	case r.Action == control.Reload && len(p.options.Paths) == 0:
		return result, errUnconfigured
	case r.Action == control.Confirm:
		return result, p.confirm()
	case r.Confirm < 0, r.Confirm > maxConfirm:
		return result, wrongInput(errors.New("confirm: want " + wantConfirm))
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.runningLocked(); err != nil {
		return result, err
	}
	if r.Action == control.Reload {
		p.notify.reloading()
		defer func() {
			p.reloads.note(err)
			if err != nil {
				p.notify.say("the configuration is not reloaded: " + oneLine(err))
			}
			p.notify.ready()
		}()
	}
	before := p.wanted.Load()
	configs := before.configs
	if r.Action == control.Reload {
		var file *config.File
		if file, configs, err = p.readLocked(nil); err == nil {
			logNotes(p.log, file)
			result.Notes = append(notes(file), p.warnOfSettings(p.options.settings(file))...)
		}
	} else {
		configs, err = changed(configs, r)
	}
	if err != nil {
		return result, err
	}
	if err := p.applyLocked(ctx, configs); err != nil {
		return result, withoutSecretFile(err, r)
	}
	if r.Confirm > 0 {
		p.awaitLocked(r.Confirm, before.configs)
	}
	log := p.log
	if result.UndoAt = p.wanted.Load().undoAt; !result.UndoAt.IsZero() {
		log = log.With("undo-at", result.UndoAt.Format(time.RFC3339))
	}
	if r.Action == control.Reload {
		after := linksOf(configs)
		for _, c := range before.configs {
			if !after[tunnel.InterfaceName(c.Name)] {
				log.Info("the tunnel ends: it is not in the configuration", "name", c.Name)
			}
		}
		log.Info("the configuration is reloaded", "tunnels", len(configs))
		return result, nil
	}
	if r.Action == control.Add {
		configs = p.wanted.Load().configs
		result.Name = configs[len(configs)-1].Name
		r.Names = []string{result.Name}
	}
	log.Info("the tunnels are changed: ipipd "+r.Action, "names", r.Names)
	return result, nil
}

// withoutSecretFile adds to the error about a secret file that this process may not read the command that sets the
// secret itself. The client cannot send the file's content: the process reads the file again with every change.
func withoutSecretFile(err error, r control.Request) error {
	names := func(s control.Setting) bool { return s.Property == secretFileProperty && len(s.Value) > 0 }
	if !errors.Is(err, fs.ErrPermission) || !slices.ContainsFunc(r.Settings, names) {
		return err
	}
	return fmt.Errorf("%w; or with the secret itself, %s=\"$(cat FILE)\" ipipd %s … %s= %s", err, secretEnv, r.Action, secretFileProperty, secretProperty)
}

// runningLocked fails before the tunnels' start and after their end.
func (p *process) runningLocked() error {
	if p.closed || !p.ready.Load() {
		return errors.New("the tunnels have not started, or end: try again")
	}
	return nil
}

// applyLocked makes the tunnels of configs run; after an error nothing has changed.
func (p *process) applyLocked(ctx context.Context, configs []tunnel.Config) error {
	before := p.wanted.Load().configs
	if err := checkMarks(p.sandbox.Load(), configs); err != nil {
		return err
	}
	configs, err := p.reserve(ctx, configs)
	if err != nil {
		return err
	}
	if err := p.runLocked(ctx, configs); err != nil {
		p.release(configs, before)
		return err
	}
	p.release(before, configs)
	return nil
}

// diff implements control.Handler. Without files it reads the process's own, as a reload would.
func (p *process) diff(files []control.File) (c control.Comparison, err error) {
	if len(p.options.Paths) == 0 {
		return c, errUnconfigured
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.runningLocked(); err != nil {
		return c, err
	}
	var sources []config.Source
	for _, f := range files {
		sources = append(sources, config.Source{Name: f.Name, Data: f.Data})
	}
	_, configs, err := p.readLocked(sources)
	if err != nil {
		return c, err
	}
	differences, err := p.differencesLocked(configs)
	if err != nil {
		return c, p.sandbox.Load().Explain(err)
	}
	disabled := linksOf(slices.DeleteFunc(configs, func(c tunnel.Config) bool { return !c.Disabled }))
	for _, d := range differences {
		one := control.Difference{Name: d.Name, Action: d.Action.String(), Properties: []string{}}
		var reasons []string
		for i, property := range d.Properties {
			one.Properties = append(one.Properties, property.Name)
			if i < d.Remade {
				reasons = append(reasons, property.Name+" "+property.Remade)
			}
		}
		if disabled[tunnel.InterfaceName(d.Name)] && (d.Action == tunnel.Add || d.Action == tunnel.Remove) {
			reasons = append(reasons, "disabled")
		}
		one.Why = strings.Join(reasons, "; ")
		c.Tunnels = append(c.Tunnels, one)
	}
	c.UndoAt = p.wanted.Load().undoAt
	return c, nil
}

// differencesLocked returns how configs differ from the tunnels that run, and from the disabled ones.
func (p *process) differencesLocked(configs []tunnel.Config) (all []tunnel.Difference, err error) {
	running, err := p.engine.Diff(enabledOf(configs))
	if err != nil {
		return nil, err
	}
	of := map[string]tunnel.Difference{}
	for _, d := range running {
		of[d.Name] = d
	}
	before, after := map[string]*tunnel.Config{}, map[string]bool{}
	for _, c := range p.wanted.Load().configs {
		before[c.Name] = &c
	}
	for i := range configs {
		c := &configs[i]
		d, ok := of[c.Name]
		if !ok { // disabled, and does not run
			d = tunnel.Difference{Name: c.Name, Action: tunnel.Add}
			if old := before[c.Name]; old != nil {
				d.Action, d.Properties = tunnel.Nothing, tunnel.Changes(old, c)
			}
			if len(d.Properties) > 0 {
				d.Action = tunnel.InPlace
			}
		}
		all, after[c.Name] = append(all, d), true
	}
	for _, c := range p.wanted.Load().configs {
		if c.Disabled && !after[c.Name] {
			running = append(running, tunnel.Difference{Name: c.Name, Action: tunnel.Remove})
		}
	}
	return append(all, slices.DeleteFunc(running, func(d tunnel.Difference) bool { return after[d.Name] })...), nil
}

// readLocked reads the configuration of sources, or else the process's own.
func (p *process) readLocked(sources []config.Source) (*config.File, []tunnel.Config, error) {
	read := func() (*config.File, []tunnel.Config, error) { return config.Read(p.options.Paths...) }
	if len(sources) > 0 {
		read = func() (*config.File, []tunnel.Config, error) { return config.Parse(sources) }
	}
	file, configs, err := unrefused(read())
	var wrong config.Errors
	if errors.As(err, &wrong) {
		return nil, nil, &control.Refusal{Message: err.Error(), Input: true}
	}
	return file, configs, p.sandbox.Load().Explain(err)
}

// warnOfSettings names, in the log and in notes, the settings of the process whose value in next is not the one
// in use.
func (p *process) warnOfSettings(next processOptions) (notes []string) {
	var names []string
	for _, property := range config.ProcessProperties() {
		if property.Get(&next) != property.Get(&p.options.processOptions) {
			names = append(names, property.Name)
		}
	}
	if len(names) > 0 {
		const changed = "settings of the process have changed: they are used once it is started again"
		p.log.Warn(changed, "settings", names)
		notes = []string{"ipipd: " + changed + ": " + strings.Join(names, ", ")}
	}
	return notes
}

// changed returns a copy of configs with the change that r requests. Its error is a *control.Refusal.
func changed(configs []tunnel.Config, r control.Request) ([]tunnel.Config, error) {
	var at []int
	for _, name := range r.Names {
		i := indexOf(configs, tunnel.InterfaceName(name))
		if i < 0 {
			return nil, &control.Refusal{Message: fmt.Sprintf("no tunnel named %s: ipipd print lists those there are", name)}
		}
		at = append(at, i)
	}
	configs = slices.Clone(configs)
	switch r.Action {
	case control.Add:
		if len(at) > 0 {
			break
		}
		c := tunnel.Default()
		err := configure(&c, r.Settings)
		if i := indexOf(configs, tunnel.InterfaceName(c.Name)); err == nil && i >= 0 {
			err = nameOfAnother(c.Name, configs[i].Name)
		}
		return append(configs, c), err
	case control.Set:
		if len(at) != 1 {
			break
		}
		c, old := configs[at[0]], configs[at[0]].Name
		err := configure(&c, r.Settings)
		switch i := indexOf(configs, tunnel.InterfaceName(c.Name)); {
		case err != nil:
		case c.Name == "":
			err = wrongInput(tunnel.CheckName(c.Name))
		case c.Name != old && i >= 0: // also if it is its own interface, which it would have twice
			err = nameOfAnother(c.Name, configs[i].Name)
		}
		configs[at[0]] = c
		return configs, err
	case control.Enable, control.Disable:
		for _, i := range at {
			configs[i].Disabled = r.Action == control.Disable
		}
		return configs, nil
	case control.Remove:
		links := map[string]bool{}
		for _, name := range r.Names {
			links[tunnel.InterfaceName(name)] = true
		}
		return slices.DeleteFunc(configs, func(c tunnel.Config) bool { return links[tunnel.InterfaceName(c.Name)] }), nil
	}
	return nil, &control.Refusal{Message: fmt.Sprintf("%q of %d names is not known here: is it an ipipd of another version?", r.Action, len(r.Names))}
}

func nameOfAnother(name, other string) error {
	if name == other {
		return &control.Refusal{Message: fmt.Sprintf("name %s is taken by a tunnel of this process: choose another", name)}
	}
	return &control.Refusal{Message: fmt.Sprintf("name %s is the interface's of the tunnel %s: choose another", name, other)}
}

// configure sets the properties of c as settings say. Its error, a *control.Refusal, has a line for each mistake.
func configure(c *tunnel.Config, settings []control.Setting) error {
	properties := tunnel.Properties()
	seen := map[string]bool{}
	var wrong []error
	for _, s := range settings {
		i := slices.IndexFunc(properties, func(p tunnel.Property) bool { return p.Name == s.Property })
		values := []string{string(s.Value)}
		switch {
		case i < 0 && s.Property != config.DisabledKey:
			wrong = append(wrong, unknownProperty(s.Property))
			continue
		case seen[s.Property] && (i < 0 || !properties[i].Repeatable):
			wrong = append(wrong, fmt.Errorf("%s: given twice: want it once", s.Property))
			continue
		case i < 0 && len(s.Value) == 0:
			values[0] = "no"
		case i >= 0 && (properties[i].Repeatable || len(s.Value) == 0):
			if !seen[s.Property] {
				properties[i].Reset(c)
			}
			values = strings.FieldsFunc(string(s.Value), func(r rune) bool { return r == ',' })
		}
		seen[s.Property] = true
		for _, v := range values {
			if err := config.Set(c, config.Setting{Property: s.Property, Value: v}); err != nil {
				wrong = append(wrong, err)
			}
		}
	}
	if len(wrong) == 0 {
		wrong = append(wrong, c.Validate())
	}
	if more := len(wrong) - config.MaxShown; more > 0 {
		wrong = append(wrong[:config.MaxShown], fmt.Errorf("and %d more", more))
	}
	return wrongInput(wrong...)
}

// wrongInput returns a *control.Refusal with all of errs, a line each; nil if they are all nil.
func wrongInput(errs ...error) error {
	if err := errors.Join(errs...); err != nil {
		return &control.Refusal{Message: err.Error(), Input: true}
	}
	return nil
}

func unknownProperty(name string) error {
	names := []string{config.DisabledKey}
	for _, p := range tunnel.Properties() {
		names = append(names, p.Name)
	}
	if near := config.Suggest(name, names); near != "" {
		return fmt.Errorf("unknown property %q: did you mean %s?", name, near)
	}
	return fmt.Errorf("unknown property %q: want %s", name, strings.Join(names, ", "))
}
