package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"ipipd/internal/config"
	"ipipd/internal/control"
	"ipipd/internal/sandbox"
	"ipipd/internal/tunnel"
)

// process is a running `up`: its tunnels, and what requests to its control socket do with them.
type process struct {
	options *upOptions
	log     *slog.Logger
	down    func()     // ends the process
	failed  chan error // why the last tunnel failed; nothing if it was closed on request

	server *control.Server
	engine engine
	ready  atomic.Bool
	// interfaces is net.Interfaces except in tests.
	interfaces func() ([]net.Interface, error)
	notify     *notifier
	ctx        context.Context // until the process is to end

	busySince   time.Time      // since when alive, which alone uses it, has found mu held; zero: it is free
	captures    sync.WaitGroup // captures that run
	reloads     reloads
	stopMetrics func()
	wanted      atomic.Pointer[wanted]
	sandbox     atomic.Pointer[sandbox.State] // nil before there is one

	mu        sync.Mutex // held while what runs is changed; guards the replacement of wanted, and what follows
	closed    bool       // no change and no capture begins any more
	watched   map[startedTunnel]bool
	undoRetry time.Duration // pause after an undo that has failed
}

// wanted is the list of tunnels that a process is to have: those that run, and the disabled ones. A
// tunnel that fails is removed from it by ended. It is immutable.
type wanted struct {
	configs []tunnel.Config
	// back are the configs before an unconfirmed change, applied again at undoAt; undoAt zero: nothing to confirm.
	back   []tunnel.Config
	undoAt time.Time
	// reloaded is reloads.done before the unconfirmed change, to go back to.
	reloaded int64
}

func newProcess(o *upOptions, log *slog.Logger, down func()) *process {
	p := &process{options: o, log: log, down: down, failed: make(chan error, 1), stopMetrics: func() {}, watched: map[startedTunnel]bool{}, undoRetry: 10 * time.Second, interfaces: net.Interfaces}
	p.wanted.Store(&wanted{})
	return p
}

// start makes the control socket and starts the tunnels. On error no tunnel runs; the caller
// closes server, if there is one, and calls stopMetrics.
func (p *process) start(ctx context.Context, configs []tunnel.Config) (err error) {
	p.ctx = ctx
	p.protectMemory(configs)
	if p.server, err = control.Listen(ctx, p.options.RuntimeDir); err != nil {
		return socketError(err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if limit, err := tunnel.MaxFiles(); err == nil {
		if f := tunnel.TooFewFiles(enabledOf(configs), cmp.Or(p.options.Threads, tunnel.DefaultThreads()), limit); f != nil {
			p.log.Warn(f.What, "because", f.Why, "remedy", f.Do)
		}
	}
	if configs, err = p.reserve(ctx, configs); err != nil {
		var taken *nameTakenError
		if errors.As(err, &taken) && len(p.options.Paths) == 0 {
			err = fmt.Errorf("%w with --name", err)
		}
		return err
	}
	if err := p.serveMetrics(); err != nil {
		return err
	}
	only := len(configs) == 1
	go func() {
		err := p.server.Serve(control.Handler{
			Status:  p.status,
			Remotes: p.remotes, Samples: p.answer,
			Export:  p.export,
			Down:    func(link string) { p.downTunnel(link, only) },
			Change:  p.change,
			Diff:    p.diff,
			Capture: p.capture,
		})
		if err != nil {
			p.log.Error("the control socket has failed: ipipd's other commands cannot reach this process", "err", err)
		}
	}()
	o := tunnel.EngineOptions{
		Log: p.log, Threads: p.options.Threads, ManageSysctls: p.options.ManageSysctls, RuntimeDir: p.options.RuntimeDir,
		Confine: func(fastPath bool) bool { return p.confine(configs, fastPath) },
	}
	if p.notify != nil {
		o.Manager, o.Kept = p.notify.manager, p.notify.kept
	}
	if p.engine, err = p.options.open(o); err != nil {
		return err
	}
	if err := p.runLocked(ctx, configs); err != nil {
		return errors.Join(p.tunnelError(err), p.engine.Close())
	}
	if len(p.engine.Tunnels()) < len(enabledOf(configs)) {
		return errors.Join(errors.New("a tunnel has ended while it was started"), p.engine.Close())
	}
	p.notify.discard() // tunnels that are not wanted any more
	p.reloads.note(nil)
	p.ready.Store(true)
	p.notify.ready()
	go p.notify.watch(ctx, p.alive)
	return nil
}

// alive returns an error if a tunnel's control has not responded within that time, or if mu has been held for
// longer than changeTimeout: a change holds the controls, which do not respond meanwhile.
func (p *process) alive(within time.Duration) error {
	if !p.mu.TryLock() {
		now := time.Now()
		if p.busySince.IsZero() {
			p.busySince = now
		} else if now.Sub(p.busySince) > changeTimeout {
			return fmt.Errorf("a change takes longer than %v", changeTimeout)
		}
		return nil
	}
	defer p.mu.Unlock()
	p.busySince = time.Time{}
	if name := p.engine.Unresponsive(within); name != "" {
		return fmt.Errorf("%s: its control does nothing", name)
	}
	return nil
}

// runLocked makes the enabled tunnels of configs run; after an error those that ran before do. Their names
// are reserved.
func (p *process) runLocked(ctx context.Context, configs []tunnel.Config) error {
	p.protectMemory(configs)
	err := p.sandbox.Load().Explain(p.engine.Apply(ctx, enabledOf(configs)))
	p.watchLocked() // after an error, too: tunnels that were closed to be made again have been started anew
	if err == nil {
		p.updateLocked(func(w *wanted) { w.configs = configs })
	}
	return err
}

// updateLocked replaces wanted.
func (p *process) updateLocked(change func(*wanted)) {
	next := *p.wanted.Load()
	change(&next)
	p.wanted.Store(&next)
	p.notify.say(next.String())
}

// String says how many tunnels there are and what is to be confirmed, for the service manager.
func (w *wanted) String() string {
	text := fmt.Sprintf("%d tunnels", len(w.configs))
	if len(w.configs) == 1 {
		text = "1 tunnel"
	}
	if disabled := len(w.configs) - len(enabledOf(w.configs)); disabled > 0 {
		text += fmt.Sprintf(", %d disabled", disabled)
	}
	if !w.undoAt.IsZero() {
		text += "; " + undoNotice(w.undoAt)
	}
	return text
}

// enabledOf returns the configs that are not disabled.
func enabledOf(configs []tunnel.Config) []tunnel.Config {
	return slices.DeleteFunc(slices.Clone(configs), func(c tunnel.Config) bool { return c.Disabled })
}

// indexOf returns the index of the tunnel with that link; -1 if there is none.
func indexOf(configs []tunnel.Config, link string) int {
	return slices.IndexFunc(configs, func(c tunnel.Config) bool { return tunnel.InterfaceName(c.Name) == link })
}

// protectMemory disables core dumps if a tunnel has a secret, which one would contain.
func (p *process) protectMemory(configs []tunnel.Config) {
	if !slices.ContainsFunc(configs, func(c tunnel.Config) bool { return c.IPsec.Wanted() }) {
		return
	}
	if err := disableCoreDumps(); err != nil {
		p.log.Warn("cannot disable core dumps: one would contain the secret", "err", err)
	}
}

// tunnelError returns err, without the tunnel's name if flags made the only one.
func (p *process) tunnelError(err error) error {
	var of *tunnel.TunnelError
	if len(p.options.Paths) == 0 && errors.As(err, &of) {
		return of.Err
	}
	return err
}

// watchLocked logs tunnels that have started since the last call, and calls ended when one ends.
func (p *process) watchLocked() {
	tunnels := p.engine.Tunnels()
	links := slices.Collect(maps.Keys(tunnels))
	sortNames(links)
	var begun []tunnel.Status
	for _, link := range links {
		t := tunnels[link]
		if p.watched[t] {
			continue
		}
		p.watched[t] = true
		s := t.Status()
		begun = append(begun, s)
		state := []any{"name", s.Name(), "local-address", s.CurrentLocalAddress, "remote-address", s.CurrentRemoteAddress, "mtu", s.ActualMTU}
		message := "tunnel is ready"
		if s.WaitingFor != "" {
			message, state = "tunnel waits", append(state, "waiting-for", s.WaitingFor)
		}
		p.log.Info(message, state...)
		go func() {
			<-t.Done()
			p.ended(link, t)
		}()
	}
	if len(begun) > 0 {
		go p.warnOfSamePairs(begun) // it asks other processes, which may not answer
	}
}

// ended forgets a tunnel that has failed, unless it was made again; the last one's error ends the process.
func (p *process) ended(link string, t startedTunnel) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.watched, t)
	err := t.Err()
	if err == nil {
		return // it was closed, and whoever did that replaces wanted
	}
	tunnels := p.engine.Tunnels()
	if tunnels[link] == nil {
		p.forgetLocked(link)
	}
	if len(tunnels) == 0 && p.wanted.Load().undoAt.IsZero() { // an undo to come would start others
		select {
		case p.failed <- err:
		default:
		}
		return
	}
	s := t.Status()
	p.log.Error("the tunnel has ended", "name", s.Name(), "err", err)
}

// forgetLocked removes a tunnel that does not run from wanted, and releases its name.
func (p *process) forgetLocked(link string) {
	p.updateLocked(func(w *wanted) {
		if i := indexOf(w.configs, link); i >= 0 {
			w.configs = slices.Concat(w.configs[:i], w.configs[i+1:])
		}
	})
	p.server.Release(link)
}

// close removes the tunnels, or leaves them to the next process. Afterwards no reload reserves a name.
func (p *process) close(leave bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	p.notify.stopping()
	defer p.waitCaptures()
	if leave {
		return p.engine.Leave()
	}
	return p.engine.Close()
}

// status implements control.Handler.
func (p *process) status(link string) (any, error) {
	if !p.ready.Load() {
		return nil, control.ErrStarting
	}
	w := p.wanted.Load()
	configs, tunnels := w.configs, p.engine.Tunnels()
	if link != "" {
		i := indexOf(configs, link)
		if i < 0 {
			return nil, control.ErrNotRunning
		}
		configs = configs[i : i+1]
	}
	all := make([]tunnel.Status, len(configs))
	for i := range configs {
		if t := tunnels[tunnel.InterfaceName(configs[i].Name)]; t != nil {
			if all[i] = t.Status(); link != "" {
				all[i].Remotes = t.Remotes(tunnel.ListRemotes)
			}
		} else {
			all[i] = tunnel.NewStatus(&configs[i])
		}
		all[i].UndoAt, all[i].Sandbox = w.undoAt, p.sandbox.Load()
	}
	if link != "" {
		return all[0], nil
	}
	return all, nil
}

// remotes implements control.Handler.
func (p *process) remotes(link string) (any, error) {
	if !p.ready.Load() {
		return nil, control.ErrStarting
	}
	if t := p.engine.Tunnels()[link]; t != nil {
		return t.Remotes(math.MaxInt), nil
	}
	return nil, control.ErrNotRunning
}

// export implements control.Handler.
func (p *process) export() (any, error) {
	if !p.ready.Load() {
		return nil, control.ErrStarting
	}
	s := config.Snapshot{Process: p.options.processOptions}
	for _, c := range p.wanted.Load().configs {
		s.Tunnels = append(s.Tunnels, config.Entry{Config: c})
	}
	return s, nil
}

// downTunnel implements control.Handler. only: the process was started with one tunnel, so that
// it needs not wait until it is ready.
func (p *process) downTunnel(link string, only bool) {
	if only && !p.ready.Load() {
		p.down()
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	configs := p.wanted.Load().configs
	i := indexOf(configs, link)
	if !p.ready.Load() || i < 0 {
		return // the start has failed, or the tunnel has ended
	}
	tunnels := p.engine.Tunnels()
	t := tunnels[link]
	if t != nil && len(tunnels) == 1 || len(configs) == 1 {
		p.down()
		return
	}
	p.log.Info("the tunnel ends: ipipd down", "name", configs[i].Name)
	if t != nil {
		if err := t.Close(); err != nil {
			p.log.Error("a tunnel is not closed as it should be", "name", configs[i].Name, "err", err)
		}
	}
	p.forgetLocked(link)
}

// readConfiguration reads the files of Paths: the tunnels, and the settings of the process that no flag sets.
func (o *upOptions) readConfiguration() (*config.File, []tunnel.Config, error) {
	file, configs, err := unrefused(config.Read(o.Paths...))
	if err != nil {
		return nil, nil, err
	}
	o.processOptions = o.settings(file)
	return file, configs, nil
}

// settings returns the settings of the process: each as its flag sets it, or else file, or else the default.
func (o *upOptions) settings(file *config.File) processOptions {
	next := config.DefaultProcess()
	for _, property := range config.ProcessProperties() {
		for _, s := range file.Process {
			if s.Property == property.Name {
				_ = property.Set(&next, s.Value) // config.Read has set it once
			}
		}
		if o.given[property.Name] {
			_ = property.Set(&next, property.Get(&o.processOptions))
		}
	}
	return next
}

// exposed says what is wrong with a file of config.File.Exposed.
const exposed = "it has an ipsec-secret in it, and others than its owner can read it"

// logNotes logs what the operator should know of a configuration that is read.
func logNotes(log *slog.Logger, file *config.File) {
	for _, note := range file.Notes {
		log.Warn("not all of the configuration is used", "note", note)
	}
	for _, name := range file.Exposed {
		log.Warn(exposed, "file", name, "remedy", config.Conceal(name))
	}
}

// notes returns what logNotes logs, a line each.
func notes(file *config.File) []string {
	lines := slices.Clone(file.Notes)
	for _, name := range file.Exposed {
		lines = append(lines, fmt.Sprintf("%s: %s: %s", name, exposed, config.Conceal(name)))
	}
	return lines
}

// unrefused returns its arguments, but with file.Refused as the error if a tunnel must not be started: then none is.
func unrefused(file *config.File, configs []tunnel.Config, err error) (*config.File, []tunnel.Config, error) {
	if err == nil && len(file.Refused) > 0 {
		err = file.Refused
	}
	return file, configs, err
}
