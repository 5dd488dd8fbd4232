package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"ipipd/internal/config"
	"ipipd/internal/control"
	"ipipd/internal/tunnel"
)

// changeOptions are the options of set, add, remove, enable and disable.
type changeOptions struct {
	processOptions
	streams *streams
	Request control.Request
	// SecretInArgs reports that ipsec-secret was given as an argument.
	SecretInArgs bool
}

const settingsHelp = `A value is that of the flag of ipipd up. PROPERTY= is the default, as is
RouterOS's !PROPERTY, but that !keepalive is off; a repeatable property takes a list
with commas, or is given several times, and has these values only. disabled=yes is
what ipipd disable does. Every user of this host can read ipsec-secret=TEXT:
ipsec-secret-file=FILE is better, or %s with %s.

All of it is done, or after an error nothing. The file of ipipd up --config is not
changed: ipipd diff shows what a reload would take back.`

func newCmdSet(s *streams, runF func(context.Context, *changeOptions) error) *cobra.Command {
	o := &changeOptions{processOptions: config.DefaultProcess(), streams: s, Request: control.Request{Action: control.Set}}
	c := &cobra.Command{
		Use:   "set NAME PROPERTY=VALUE...",
		Short: "Change properties of a tunnel while it runs",
		Long: `set changes a tunnel in place, without losing a packet, but for tun-queues, and a
secret where there was none, or none where there was one: then the interface is
removed and made again, and with name=, which is another interface.

` + fmt.Sprintf(settingsHelp, secretEnv, "ipsec-secret\nwithout ="),
		Example: "  ipipd set ipip1 dscp=46 keepalive=off route=10.20.0.0/16,10.30.0.0/16 comment=",
		Args: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usageErrorf("%s: no NAME given: want the name of a tunnel, as ipipd print shows it", c.CommandPath())
			}
			if len(args) == 1 {
				return usageErrorf("%s: nothing to set: want PROPERTY=VALUE behind the name", c.CommandPath())
			}
			return checkNames(c, args[0])
		},
		ValidArgsFunction: func(c *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
			if len(args) == 0 {
				return completeNames(&o.processOptions)(c, args, word)
			}
			return completeSetting(word)
		},
		RunE: func(c *cobra.Command, args []string) error {
			o.Request.Names = args[:1]
			if err := o.parse(c, args[1:]); err != nil {
				return err
			}
			return runF(c.Context(), o)
		},
	}
	addConfirmFlag(c, &o.Request.Confirm)
	addProcessFlag(c, &o.processOptions, config.RuntimeDir)
	return c
}

func newCmdAdd(s *streams, runF func(context.Context, *changeOptions) error) *cobra.Command {
	o := &changeOptions{processOptions: config.DefaultProcess(), streams: s, Request: control.Request{Action: control.Add}}
	c := &cobra.Command{
		Use:   "add PROPERTY=VALUE...",
		Short: "Add a tunnel to those of a process that runs, and print its name",
		Long: `add has the process that runs, which has to be the only one in its folder, make one
more tunnel. remote-address is required; without name it is the first free ipipN.

` + fmt.Sprintf(settingsHelp, secretEnv, "neither"),
		Example: "  ipipd add remote-address=198.51.100.2 address=10.255.0.5/30",
		Args: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usageErrorf("%s: nothing given: want remote-address=ADDRESS, and more as PROPERTY=VALUE", c.CommandPath())
			}
			return nil
		},
		ValidArgsFunction: func(_ *cobra.Command, _ []string, word string) ([]string, cobra.ShellCompDirective) {
			return completeSetting(word)
		},
		RunE: func(c *cobra.Command, args []string) error {
			secret := func(word string) bool {
				property, _, _ := strings.Cut(word, "=")
				return property == secretProperty || property == secretFileProperty
			}
			if _, ok := os.LookupEnv(secretEnv); ok && !slices.ContainsFunc(args, secret) {
				args = append(args, secretProperty)
			}
			if err := o.parse(c, args); err != nil {
				return err
			}
			return runF(c.Context(), o)
		},
	}
	addConfirmFlag(c, &o.Request.Confirm)
	addProcessFlag(c, &o.processOptions, config.RuntimeDir)
	return c
}

// newCmdOfNames returns a command that is about tunnels by their names.
func newCmdOfNames(s *streams, action, short, long string, runF func(context.Context, *changeOptions) error) *cobra.Command {
	o := &changeOptions{processOptions: config.DefaultProcess(), streams: s, Request: control.Request{Action: action}}
	c := &cobra.Command{
		Use:   action + " NAME...",
		Short: short,
		Long: long + ` All tunnels of a process, or after an error none. The file of ipipd up
--config is not changed: ipipd diff shows what a reload would take back.`,
		Args: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usageErrorf("%s: no NAME given: want names of tunnels, as ipipd print shows them", c.CommandPath())
			}
			return checkNames(c, args...)
		},
		ValidArgsFunction: completeNames(&o.processOptions),
		RunE: func(c *cobra.Command, args []string) error {
			o.Request.Names = args
			return runF(c.Context(), o)
		},
	}
	addConfirmFlag(c, &o.Request.Confirm)
	addProcessFlag(c, &o.processOptions, config.RuntimeDir)
	return c
}

func newCmdRemove(s *streams, runF func(context.Context, *changeOptions) error) *cobra.Command {
	return newCmdOfNames(s, control.Remove, "Remove tunnels while their process goes on",
		`remove ends tunnels as ipipd down does, but without the last one the process goes
on, too.`, runF)
}

func newCmdEnable(s *streams, runF func(context.Context, *changeOptions) error) *cobra.Command {
	return newCmdOfNames(s, control.Enable, "Start tunnels that are disabled",
		`enable starts tunnels that are disabled, by ipipd disable or in the file.`, runF)
}

func newCmdDisable(s *streams, runF func(context.Context, *changeOptions) error) *cobra.Command {
	return newCmdOfNames(s, control.Disable, "Stop tunnels, and keep their names and properties",
		`disable removes the interfaces of tunnels. ipipd print shows them with X, and ipipd
enable starts them again.`, runF)
}

func changeRun(_ context.Context, o *changeOptions) error {
	processes, err := control.Processes(o.RuntimeDir)
	if err != nil {
		return controlError(err)
	}
	if o.SecretInArgs {
		fmt.Fprintf(o.streams.err, "ipipd: %s was given as an argument, which every user of this host can read: %s-file=FILE is better\n", secretProperty, secretProperty)
	}
	if o.Request.Action == control.Add {
		if len(processes) > 1 { // stale ones may be among them
			for i := range processes {
				processes[i].Sweep(o.RuntimeDir)
			}
			if processes, err = control.Processes(o.RuntimeDir); err != nil {
				return controlError(err)
			}
		}
		if len(processes) != 1 {
			return fmt.Errorf("%d ipipd up run in %s, and a tunnel is added to one: start it with ipipd up, or the others with a --runtime-dir of their own", len(processes), o.RuntimeDir)
		}
		return changeProcess(o, &processes[0], o.Request)
	}
	names, err := namesByProcess(o.RuntimeDir, processes, o.Request.Names)
	if err != nil {
		return err
	}
	var problems []error
	for i := range processes {
		if r := o.Request; len(names[i]) > 0 {
			r.Names = names[i]
			problems = append(problems, changeProcess(o, &processes[i], r))
		}
	}
	return errors.Join(problems...)
}

func changeProcess(o *changeOptions, p *control.Process, r control.Request) error {
	result, err := p.Change(o.RuntimeDir, changeTimeout, r)
	var refused *control.Refusal
	switch {
	case errors.As(err, &refused) && refused.Input:
		return usageLines(refused.Message)
	case errors.Is(err, control.ErrNotRunning) && len(r.Names) > 0:
		return noSuchTunnel(o.RuntimeDir, r.Names[0])
	case errors.Is(err, control.ErrNotRunning):
		return fmt.Errorf("no ipipd up runs in %s any more", o.RuntimeDir)
	case err != nil:
		return controlError(err)
	}
	reportUndo(o.streams, result)
	if result.Name != "" {
		_, err = fmt.Fprintln(o.streams.out, result.Name)
	}
	return err
}

// namesByProcess returns for each of processes which of names it has. A renamed interface's is the configured one there.
func namesByProcess(dir string, processes []control.Process, names []string) ([][]string, error) {
	of := make([][]string, len(processes))
	add := func(name string) bool {
		i := slices.IndexFunc(processes, func(p control.Process) bool { return slices.Contains(p.Names, tunnel.InterfaceName(name)) })
		if i >= 0 {
			of[i] = append(of[i], name)
		}
		return i >= 0
	}
	for _, name := range names {
		if started := ""; !add(name) {
			if started = originalName(dir, name); started == "" || !add(started) {
				return nil, noSuchTunnel(dir, name)
			}
		}
	}
	return of, nil
}

const secretProperty, secretFileProperty = "ipsec-secret", "ipsec-secret-file"

// parse parses the arguments PROPERTY=VALUE of set and add.
func (o *changeOptions) parse(c *cobra.Command, args []string) error {
	for _, word := range args {
		property, value, given := strings.Cut(word, "=")
		unset, exclamation := strings.CutPrefix(word, "!")
		switch {
		case exclamation && !given:
			property = unset
			if unset == "keepalive" {
				value = "off"
			}
		case !given && word == secretProperty:
			if value = os.Getenv(secretEnv); value == "" {
				return usageErrorf("%s: %s has no secret in it: want one, or %s=FILE", c.CommandPath(), secretEnv, secretFileProperty)
			}
		case !given:
			return usageErrorf("%s: %q is not accepted: want PROPERTY=VALUE, such as dscp=46", c.CommandPath(), word)
		case property == secretProperty && value != "":
			o.SecretInArgs = true
		case property == secretFileProperty && value != "": // the process may have another working directory
			path, err := filepath.Abs(value)
			if err != nil {
				return err
			}
			value = path
		}
		o.Request.Settings = append(o.Request.Settings, control.Setting{Property: property, Value: []byte(value)})
	}
	return nil
}

// completeSetting completes a property, and then its value.
func completeSetting(word string) (words []string, _ cobra.ShellCompDirective) {
	property, _, given := strings.Cut(word, "=")
	if !given {
		for _, p := range tunnel.Properties() {
			words = append(words, p.Name+"=")
		}
		words = append(words, config.DisabledKey+"=")
		return words, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
	}
	for _, p := range tunnel.Properties() {
		for _, value := range p.Words {
			if p.Name == property {
				words = append(words, property+"="+value)
			}
		}
	}
	return words, cobra.ShellCompDirectiveNoFileComp
}
