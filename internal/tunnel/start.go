package tunnel

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"ipipd/encap"
	"ipipd/internal/ipsec/ike"
	"ipipd/internal/netstate"
	"ipipd/internal/warning"
	"ipipd/keepalive"
	"ipipd/tun"
)

// start starts a tunnel beside those that run. On error nothing is left behind.
func (e *Engine) start(c *control) error {
	starting := []*control{c}
	err := e.open(starting)
	if err == nil {
		err = e.activate(starting, pairsOf(starting), nil)
	}
	if err != nil {
		e.abandon(starting)
		return errors.Unwrap(err)
	}
	e.begin(starting)
	return nil
}

// newControl returns a tunnel that has nothing open yet. secret is cfg.IPsec's, already read.
func (e *Engine) newControl(cfg *Config, secret ike.Secret) *control {
	t := &Tunnel{
		engine: e, epoch: time.Now(), ifname: newIfnameHandler(e.log, cfg.Name),
		wake: make(chan struct{}, 1), events: make(chan event, eventQueue), done: make(chan struct{}),
		counters: new(counters),
	}
	t.log = slog.New(t.ifname)
	t.ctx, t.cancel = context.WithCancel(context.Background())
	t.loops.Add(1) // of run
	c := &control{Tunnel: t, restoreCounts: map[fmt.Stringer]restoreCount{}, warnedAt: map[warning.Code]time.Time{}}
	c.setConfig(cfg)
	c.remote, _ = cfg.remote()
	c.underlay.MTU = defaultUnderlayMTU
	if floor := netstate.MinPMTU(); floor >= encap.MinPathMTU {
		c.pathMTU.Floor = floor
	}
	if cfg.many() {
		t.many = newRemotes(cfg)
	}
	manager := e.openShared(t, cfg)
	if cfg.IPsec.Wanted() {
		t.ipsecPolicy = newIPsecPolicy(manager, cfg, secret, t.log, t.wakeControl, t.count)
		t.ipsecPolicy.config.Tap = espTap{t}
		t.protectMany()
	}
	return c
}

// setConfig takes a Config, which nobody changes any more, into use.
func (c *control) setConfig(cfg *Config) {
	c.cfg = cfg
	c.config.Store(cfg)
	if c.many != nil {
		c.many.accept.Store(cfg.acceptance())
		c.many.setPeers(cfg)
	}
	switch {
	case cfg.KeepaliveProbe != keepalive.FormEcho, cfg.many():
		c.echo = nil
	case c.echo == nil || !c.echo.Asks(cfg.Addresses[0].Prefix.Addr().As4(), cfg.KeepaliveTarget.As4()):
		c.echo = keepalive.NewEcho(cfg.Addresses[0].Prefix.Addr().As4(), cfg.KeepaliveTarget.As4())
	}
}

// open opens what tunnels need: it looks up their routes, and makes and configures their interfaces.
// On error the caller abandons all of them.
func (e *Engine) open(tunnels []*control) error {
	interfaces := make([]netstate.Interface, len(tunnels))
	for i, c := range tunnels {
		if err := c.open(); err != nil {
			return &TunnelError{c.cfg.Name, err}
		}
		interfaces[i] = netstate.Interface{Index: c.ifindex, AltName: altName(c.cfg.Name), Addresses: c.cfg.Addresses, Routes: without(c.wantedRoutes(c.cfg.Routes), c.takeOver), Program: c.encapProgram(), Adopted: c.adopted}
	}
	if err := e.network.Configure(interfaces); err != nil {
		return e.interfaceError(tunnels, err)
	}
	for _, c := range tunnels {
		if err := c.finishOpen(); err != nil {
			return &TunnelError{c.cfg.Name, err}
		}
	}
	return nil
}

// interfaceError returns an error of Network.Configure as a *TunnelError about the tunnel with that interface.
func (e *Engine) interfaceError(tunnels []*control, err error) error {
	var of *netstate.InterfaceError
	if errors.As(err, &of) {
		for _, c := range tunnels {
			if c.ifindex == of.Index {
				return &TunnelError{c.cfg.Name, err}
			}
		}
	}
	return &TunnelError{tunnels[0].cfg.Name, err}
}

// open looks up the route to the remote, and makes the interface.
func (c *control) open() (err error) {
	t, e := c.Tunnel, c.engine
	t.follower = e.network.Follow(c.query(), t.wakeControl)
	c.answer = t.follower.Answer()
	noPath := c.pathError(c.answer, c.remote)
	if noPath != nil && !isTransient(noPath) {
		return noPath
	}
	var first *route
	if noPath == nil {
		first = c.newRoute()
	} else {
		first = c.pathlessRoute()
	}
	c.pair = first.pair()
	c.setWaiting(first, noPath)
	c.route.Store(first)
	c.setNoPath(noPath)
	c.resetKeepalive(t.epoch)
	return c.openInterface()
}

// openInterface makes the interface, or makes it again. On error the caller closes it.
func (c *control) openInterface() error {
	t, e := c.Tunnel, c.engine
	// Call wantedMTU once: an SA established meanwhile changes its result, and updateMTU
	// compares with what the device was given.
	c.appliedMTU = c.wantedMTU()
	device, err := c.adoptOrOpen(tun.Options{
		Name: cmp.Or(t.madeName, InterfaceName(c.cfg.Name)), MTU: c.appliedMTU, Queues: e.queues(c.cfg),
		OnDegraded: func(err error) {
			e.log.Info("the kernel does not give the interface all that it could use", "err", err)
		},
	})
	if err != nil {
		return err
	}
	t.device = device
	if t.madeName == "" {
		t.madeName = device.Name()
	}
	queues := t.device.Queues()
	t.queues.Store(&queues)
	t.ifname.set(t.madeName)
	t.mtu.Store(int32(c.appliedMTU))
	c.carrier = true
	if !c.adopted { // else by adoptCarrier
		c.updateCarrier()
	}
	err = c.readInterface()
	t.madeIndex = c.ifindex
	if s := c.iface.Load(); err == nil && c.adopted && !s.Moved {
		c.appliedMTU = s.MTU
	}
	return err
}

// queues returns the number of TUN queues of a tunnel with that Config.
func (e *Engine) queues(cfg *Config) int {
	if cfg.TunQueues == 0 {
		return e.threads
	}
	return cfg.TunQueues
}

// finishOpen, called once the interface is configured, mirrors its routes and gives its queues to the workers.
func (c *control) finishOpen() error {
	t, e := c.Tunnel, c.engine
	if c.cfg.RPS != "" {
		c.setRPS()
	}
	c.tx, c.ids = t.newTransmitter(e.socket.NewSender()), idCounters(1)[0]
	if err := c.readInterface(); err != nil {
		return err
	}
	c.answer = t.follower.Answer()
	c.interfaceChanges, c.interfaceDowns = c.answer.InterfaceChanges, c.answer.InterfaceDowns
	c.followRoutes()
	c.takeCounters()
	c.addQueues()
	return nil
}

// addQueues gives the queues to the workers, which read them from watchAll on.
func (c *control) addQueues() {
	t, queues := c.Tunnel, *c.queues.Load()
	ids := idCounters(len(queues))
	for i, q := range queues {
		w := c.engine.workers[i%len(c.engine.workers)].out
		key := w.add(&outbound{tunnel: t, device: t.device, queue: q, tx: t.newTransmitter(w.sender), ids: ids[i]})
		c.keys = append(c.keys, key)
		t.stop = append(t.stop, func() { w.remove(key, q.FD()) })
	}
}

func (c *control) setRPS() {
	c.warnErr(warning.RPSNotSet, c.engine.network.SetRPS(c.ifname.get(), c.cfg.RPS))
}

// activate has tunnels that are open negotiate, and be read from, and then registers pairs, theirs among
// them. On error the caller abandons all of them.
func (e *Engine) activate(tunnels []*control, pairs map[*Tunnel]outerPair, removed map[*Tunnel]bool) error {
	if err := e.protectAll(tunnels); err != nil {
		return err
	}
	for _, c := range tunnels {
		c.adoptCarrier()
	}
	awaitRoutes(tunnels)
	if err := e.watchAll(tunnels); err != nil {
		return err
	}
	return e.register(pairs, removed)
}

// protectAll has the tunnels with a secret negotiate.
func (e *Engine) protectAll(tunnels []*control) error {
	for _, c := range tunnels {
		next := *c.route.Load()
		if err := c.protect(&next); err != nil {
			return &TunnelError{c.cfg.Name, err}
		}
		if next.path.MTU > 0 {
			next.maxInner = c.maxInner(next.path.MTU) // by the SA of the process before, if there is one
			c.route.Store(&next)
		}
	}
	return nil
}

// pairsOf returns the outer addresses of tunnels that are open; 0 for those not known.
func pairsOf(tunnels []*control) map[*Tunnel]outerPair {
	pairs := make(map[*Tunnel]outerPair, len(tunnels))
	for _, c := range tunnels {
		pairs[c.Tunnel] = c.pair
	}
	return pairs
}

// watchAll has the workers read from the interfaces of tunnels.
func (e *Engine) watchAll(tunnels []*control) error {
	for _, c := range tunnels {
		for i, q := range *c.queues.Load() {
			if err := e.workers[i%len(e.workers)].out.watch(q.FD(), c.keys[i]); err != nil {
				return &TunnelError{c.cfg.Name, err}
			}
		}
	}
	return nil
}

// begin starts the control goroutines of tunnels that are registered.
func (e *Engine) begin(tunnels []*control) {
	begun := make([]*Tunnel, len(tunnels))
	for i, c := range tunnels {
		begun[i] = c.Tunnel
		c.syncFastPath()
		c.warnOfState(time.Now())
	}
	e.updateReception(begun...)
	for _, c := range tunnels {
		go func() {
			defer c.loops.Done()
			c.run()
		}()
	}
}

// abandon closes tunnels that have not begun.
func (e *Engine) abandon(tunnels []*control) {
	var made []*Tunnel
	for _, c := range tunnels {
		c.cancel()
		c.end()
		c.loops.Done()
		if c.device != nil {
			made = append(made, c.Tunnel)
		}
	}
	_ = e.CloseTunnels(made...)
}
