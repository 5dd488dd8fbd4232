package tunnel

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	"ipipd/internal/fastpath"
	"ipipd/internal/netstate"
)

// TunnelError is an error about one of several tunnels.
type TunnelError struct {
	Name string // of the tunnel, as configured
	Err  error
}

func (e *TunnelError) Error() string { return e.Name + ": " + e.Err.Error() }

// Unwrap returns Err.
func (e *TunnelError) Unwrap() error { return e.Err }

// Apply starts, changes and ends tunnels, so that those of configs run and no others. A tunnel that runs
// and a Config with its Config.Name, which must be set, are the same. Tunnels that do not change lose no
// packet, nor do those that change in place (Property.Remade).
//
// A tunnel waits for what the host's network lacks. The error is a *TunnelError, unless the Engine is
// closed or ctx is done before anything has changed. After it all is as it was; only tunnels that had to
// be made again have been interrupted. The first Apply can also fail to begin receiving, when the tunnels
// have started: the Engine can then only be closed.
func (e *Engine) Apply(ctx context.Context, configs []Config) error {
	e.applying.Lock()
	defer e.applying.Unlock()
	if e.closed {
		return os.ErrClosed
	}
	e.waitClosing()
	p, err := e.plan(configs)
	if err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := p.apply(); err != nil {
		return err
	}
	kept := e.leaving.Swap(false)
	if e.receiving {
		return nil
	}
	if err = e.startReceiving(); kept {
		err = errors.Join(err, e.beginIPsec())
		e.takeOverFastPath(p.add)
		e.ledger.settle()
	}
	e.closed = err != nil // what has begun of it cannot begin again
	return err
}

// Tunnel returns the tunnel with that Config.Name, nil if none runs.
func (e *Engine) Tunnel(name string) *Tunnel { return e.Tunnels()[name] }

// Tunnels returns the tunnels that run, by Config.Name.
func (e *Engine) Tunnels() map[string]*Tunnel {
	e.mu.Lock()
	defer e.mu.Unlock()
	running := make(map[string]*Tunnel, len(e.live))
	for t := range e.live {
		if !t.closing.Load() {
			running[t.config.Load().Name] = t
		}
	}
	return running
}

// waitClosing waits for tunnels that are being closed: their interfaces still have their names.
func (e *Engine) waitClosing() {
	e.mu.Lock()
	var closing []*Tunnel
	for t := range e.live {
		if t.closing.Load() {
			closing = append(closing, t)
		}
	}
	e.mu.Unlock()
	for _, t := range closing {
		<-t.done
	}
}

// plan is what Apply does.
type plan struct {
	engine *Engine
	add    []*control
	change []*change // in place
	remove map[*Tunnel]*change
	remake []*Tunnel  // of remove, the tunnels that are made again
	remade []*control // the new tunnels in the places of remake

	interrupted bool // the tunnels of remake are closed
}

// plan compares configs with the tunnels that run. It opens only what tunnels share: see openShared.
func (e *Engine) plan(configs []Config) (*plan, error) {
	p := &plan{engine: e, remove: map[*Tunnel]*change{}}
	ending, seen := e.Tunnels(), map[string]bool{}
	for i := range configs {
		next := &configs[i]
		if err := next.Validate(); err != nil {
			return nil, &TunnelError{next.Name, err}
		}
		if next.Name == "" || seen[InterfaceName(next.Name)] {
			return nil, &TunnelError{next.Name, &ValueError{Property: "name", Value: next.Name, Want: "a name for each tunnel, and each once"}}
		}
		seen[InterfaceName(next.Name)] = true
		if err := p.compare(ending[next.Name], next.clone()); err != nil {
			return nil, &TunnelError{next.Name, err}
		}
		delete(ending, next.Name)
	}
	for _, t := range ending {
		p.remove[t] = &change{tunnel: t, old: t.config.Load()}
	}
	return p, nil
}

// compare enters in the plan what makes t, nil if there is none, the tunnel that next configures.
func (p *plan) compare(t *Tunnel, next *Config) error {
	secret, err := next.IPsec.secret()
	if err != nil {
		return err
	}
	if t == nil {
		p.add = append(p.add, p.engine.newControl(next, secret))
		return nil
	}
	old := t.config.Load()
	switch {
	case len(Changes(old, next)) == 0 && t.ipsecPolicy.hasSecret(secret):
	case len(remade(old, next)) > 0:
		again := p.engine.newControl(next, secret)
		if next.RemoteAddress == old.RemoteAddress {
			again.inheritRemote(t)
		}
		p.remade, p.remake = append(p.remade, again), append(p.remake, t)
		p.remove[t] = &change{tunnel: t, old: old, next: next}
	default:
		p.change = append(p.change, &change{tunnel: t, old: old, next: next, secret: secret})
	}
	return nil
}

// findRoutesToReplace finds the routes that one tunnel gives up and another gets, or that get another gateway: these are
// replaced, so that the kernel has one at any time, unless the first tunnel is made again. A route that the first
// tunnel has lost is not replaced: there may be an operator's in its place, which stays.
func (p *plan) findRoutesToReplace() error {
	wanted := map[netstate.InterfaceRoute]bool{}
	want := func(routes []netstate.InterfaceRoute) {
		for _, route := range routes {
			wanted[route.Slot()] = true
		}
	}
	for _, c := range slices.Concat(p.add, p.remade) {
		want(c.cfg.Routes)
	}
	for _, c := range p.change {
		want(c.next.Routes)
	}
	var giving []netstate.Interface
	var giver string // for the error
	for _, c := range slices.Concat(slices.Collect(maps.Values(p.remove)), p.change) {
		i := netstate.Interface{Index: c.tunnel.iface.Load().Index}
		for _, route := range c.removedRoutes() {
			if wanted[route.Slot()] {
				i.Routes = append(i.Routes, route)
			}
		}
		if len(i.Routes) > 0 && i.Index != 0 && !c.tunnel.iface.Load().Moved {
			giving, giver = append(giving, i), c.old.Name
		}
	}
	existing, err := p.engine.network.ExistingRoutes(giving)
	if err != nil {
		return &TunnelError{giver, err}
	}
	given := map[netstate.InterfaceRoute]bool{}
	for route := range existing {
		given[route.Slot()] = true
	}
	takers := map[netstate.InterfaceRoute]string{}
	takeOver := func(name string, routes []netstate.InterfaceRoute) (taken []netstate.InterfaceRoute, err error) {
		for _, route := range routes {
			slot := route.Slot()
			if other := takers[slot]; given[slot] && other != "" && err == nil {
				err = &TunnelError{name, &ValueError{Property: "route", Value: route.String(), Want: "a route that " + other + " has not"}}
			}
			if given[slot] {
				takers[slot] = name
				taken = append(taken, route)
			}
		}
		return taken, err
	}
	for _, c := range slices.Concat(p.add, p.remade) {
		if c.takeOver, err = takeOver(c.cfg.Name, c.cfg.Routes); err != nil {
			return err
		}
	}
	for _, c := range p.change {
		if c.takeOver, err = takeOver(c.next.Name, without(c.next.Routes, c.old.Routes)); err != nil {
			return err
		}
	}
	return nil
}

// apply carries out the plan or, on an error, undoes what it has done of it.
func (p *plan) apply() (err error) {
	e := p.engine
	changing, ending := e.hold(p.change), e.hold(p.ending())
	var undo []func()
	defer func() {
		if err != nil {
			for _, f := range slices.Backward(undo) {
				f()
			}
		}
		changing.release()
		ending.release()
	}()
	if err := p.findRoutesToReplace(); err != nil {
		return err
	}
	started := slices.Concat(p.add, p.remade)
	undo = append(undo, func() { _ = changing.runAll((*control).undoChange) }, p.restart, func() { e.abandon(started) })
	if err := changing.runAll((*control).prepareChange); err != nil {
		return err
	}
	if err := e.open(p.add); err != nil {
		return err
	}
	e.confineOnce()
	p.giveUpRemotes(changing, p.add)
	if _, err := e.table.Load().with(p.pairs(p.add), p.removed()); err != nil {
		return err
	}
	// An error from here on interrupts tunnels.
	p.interrupted = true
	p.close(p.remake)
	if err := e.open(p.remade); err != nil {
		return err
	}
	p.giveUpRemotes(changing, p.remade)
	p.stopDisplaced(p.pairs(started), changing, ending)
	if err := e.activate(started, p.pairs(started), p.removed()); err != nil {
		return err
	}
	for _, c := range started {
		c.takeOverRoutes(c.takeOver)
	}
	e.begin(started)
	_ = changing.runAll((*control).commitChange)
	_ = changing.runAll((*control).finishChange)
	_ = ending.runAll(func(c *control, _ *change) error { c.cancel(); return nil })
	ending.release()
	p.close(slices.Collect(maps.Keys(p.remove)))
	return nil
}

func (p *plan) close(tunnels []*Tunnel) {
	if err := p.engine.CloseTunnels(tunnels...); err != nil {
		p.engine.log.Error("a tunnel is not closed as it should be", "err", err)
	}
}

// ending returns the changes that end a tunnel for good.
func (p *plan) ending() (ending []*change) {
	for t, c := range p.remove {
		if !slices.Contains(p.remake, t) {
			ending = append(ending, c)
		}
	}
	return ending
}

// removed returns the tunnels of remove, those to be made again included.
func (p *plan) removed() map[*Tunnel]bool {
	removed := make(map[*Tunnel]bool, len(p.remove))
	for t := range p.remove {
		removed[t] = true
	}
	return removed
}

// pairs returns the outer addresses of started and of the tunnels that change in place.
func (p *plan) pairs(started []*control) map[*Tunnel]outerPair {
	pairs := pairsOf(started)
	for _, c := range p.change {
		pairs[c.tunnel] = c.pair
	}
	return pairs
}

// giveUpRemotes has a changing tunnel give up a remote that it holds if one of started, or another changing
// tunnel, gets it.
func (p *plan) giveUpRemotes(changing holds, started []*control) {
	wanted := map[outerPair]int{}
	for _, pair := range p.pairs(started) {
		wanted[pair]++
	}
	_ = changing.runAll(func(c *control, ch *change) error {
		if ch.held && wanted[ch.pair] > 1 {
			c.giveUpRemote(ch)
		}
		return nil
	})
}

// stopDisplaced ends the sessions of tunnels whose outer addresses go to another tunnel, and has their packets
// carried in userspace: a pair has one session, and one entry of the fast path. After an error control
// begins both again.
func (p *plan) stopDisplaced(pairs map[*Tunnel]outerPair, held ...holds) {
	wanted := make(map[outerPair]*Tunnel, len(pairs))
	for t, pair := range pairs {
		wanted[pair] = t
	}
	for _, h := range held {
		_ = h.runAll(func(c *control, _ *change) error {
			if by := wanted[c.pair]; c.pair == 0 || by == nil || by == c.Tunnel {
				return nil
			}
			if c.ipsecPolicy != nil {
				c.ipsecPolicy.close()
			}
			c.disableFastPath()
			c.programmed = fastpath.Tunnel{} // for the next enableFastPath
			c.wakeControl()
			return nil
		})
	}
}

// inheritRemote takes over the address that t, whose RemoteAddress is the same, has resolved it to.
func (c *control) inheritRemote(t *Tunnel) {
	if r := t.route.Load(); r.path.Remote != [4]byte{} && !r.held {
		c.remote, c.resolvedAt, c.remoteSince = address(r.path.Remote), time.Now(), time.Now()
	}
}

// restart starts again, after an error, the tunnels that were to be made again, with the remote and the
// secret that they had.
func (p *plan) restart() {
	if !p.interrupted {
		return
	}
	for _, t := range p.remake {
		c := p.engine.newControl(p.remove[t].old, t.ipsecPolicy.secret())
		c.inheritRemote(t)
		if err := p.engine.start(c); err != nil {
			p.engine.log.Error("the tunnel cannot be started again as it was", "name", c.cfg.Name, "err", err)
		}
	}
}

// holds are control goroutines that, until release, run nothing but the functions given to runAll.
type holds []*hold

type hold struct {
	change *change
	do     chan func(*control)
	done   chan struct{} // receives a value after each function of do
	ready  chan struct{} // closed when the goroutine is held
	ended  bool          // the tunnel has ended or is about to, or was released
}

// hold holds the control goroutines of changes. A tunnel that ends meanwhile is not held: runAll returns an error for it.
func (e *Engine) hold(changes []*change) holds {
	held := make(holds, len(changes))
	for i, c := range changes {
		h := &hold{change: c, do: make(chan func(*control)), done: make(chan struct{}), ready: make(chan struct{})}
		held[i] = h
		go func() {
			select {
			case c.tunnel.events <- h.run:
			case <-c.tunnel.done:
			}
		}()
	}
	for _, h := range held {
		select {
		case <-h.ready:
		case <-h.change.tunnel.ctx.Done():
			h.ended = true
		}
	}
	return held
}

// run is an event that holds the control goroutine until release. It lets a tunnel go that is to end:
// the CloseTunnels that waits for it may also close one that Apply waits for.
func (h *hold) run(c *control) {
	close(h.ready)
	for c.ctx.Err() == nil {
		select {
		case f, more := <-h.do:
			if !more {
				return
			}
			f(c)
			h.done <- struct{}{}
		case <-c.ctx.Done():
		}
	}
}

// runAll has all of the control goroutines call f, at the same time, and waits for them. Its error is a
// *TunnelError of the first of h for which f failed, or which has ended.
func (h holds) runAll(f func(*control, *change) error) error {
	errs := make([]error, len(h))
	for i, one := range h {
		if !one.ended {
			select {
			case one.do <- func(c *control) { errs[i] = f(c, one.change) }:
				continue
			case <-one.change.tunnel.ctx.Done():
				one.ended = true
			}
		}
		errs[i] = fmt.Errorf("the tunnel has ended meanwhile: %w", cmp.Or(one.change.tunnel.Err(), os.ErrClosed))
	}
	for _, one := range h {
		if !one.ended {
			<-one.done
		}
	}
	for i, err := range errs {
		if err != nil {
			return &TunnelError{h[i].change.old.Name, err}
		}
	}
	return nil
}

// release lets the control goroutines run again. It may be called more than once.
func (h holds) release() {
	for _, one := range h {
		if !one.ended {
			one.ended = true
			close(one.do)
		}
	}
}
