// Package tunnel connects the TUN side and the underlay side: it owns the tunnels of a
// process, moves packets between their TUN devices and the shared socket, and tracks
// changes of routes, DNS names and peers.
//
// datapath.go handles packets, control.go everything else about one tunnel, and engine.go
// what tunnels share. ipsecpolicy.go and transmit.go ensure that a tunnel with a secret never
// sends or accepts cleartext.
package tunnel

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"ipipd/encap"
	"ipipd/internal/netstate"
	"ipipd/keepalive"
	"ipipd/tun"
)

// Tunnel is one IP-in-IP tunnel (RFC 2003). Its methods are safe for concurrent use.
type Tunnel struct {
	engine *Engine
	log    *slog.Logger
	cfg    Config
	device tun.Device
	queues []tun.Queue
	// madeIndex is the ifindex at creation.
	madeIndex int
	stop      []func()        // ends reading the queues
	echo      *keepalive.Echo // nil unless keepalive-probe is echo
	epoch     time.Time

	// Written by control.
	route       atomic.Pointer[route]
	iface       atomic.Pointer[tun.State] // as last read; its MTU is unknown while it is Moved
	mtu         atomic.Int32              // of the interface, in bytes
	unreachable atomic.Bool               // ICMP errors report that outer packets do not arrive
	state       atomic.Uint32             // keepalive.State
	ifname      *ifnameHandler            // the interface's current name
	fast        fastPath

	// Written by the data path.
	lastReceivedNs atomic.Int64 // time of the peer's last packet, nanoseconds after epoch; 0 is never
	probeAnswered  atomic.Bool  // the peer has answered a probe
	peerProbes     atomic.Bool  // the peer sends reflect probes of its own
	oversize       atomic.Int32 // length of a received packet above the MTU; 0 is none
	loopLogged     atomic.Bool
	counters       counters

	ipsecPolicy  *ipsecPolicy // nil without a secret
	follower     Follower
	reflectLimit limiter // answers to the peer's reflect probes
	icmpLimit    limiter // ICMP errors to inner senders

	activity  activity // of Engine.poll
	linkVote  int      // of Engine.linkVotes, if linkVoted
	linkVoted bool

	wake    chan struct{} // to control; capacity 1, see wakeControl
	events  chan event    // to control
	cancel  context.CancelFunc
	loops   sync.WaitGroup // of control and of name look-ups
	closing atomic.Bool    // Close has begun; set once
	done    chan struct{}
	err     atomic.Pointer[error]
}

// Start creates the interface, looks up the route to the remote and starts the data path.
// ctx bounds the DNS look-up only. On error nothing is left behind; an invalid cfg gives a
// *ValueError.
func (e *Engine) Start(ctx context.Context, cfg Config) (t *Tunnel, err error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	c := &control{
		Tunnel: &Tunnel{
			engine: e, cfg: cfg, epoch: time.Now(), ifname: newIfnameHandler(e.log, cfg.Name),
			wake: make(chan struct{}, 1), events: make(chan event, eventQueue), done: make(chan struct{}),
		},
		restoreCounts: map[configuredPrefix]restoreCount{}, restoreFailed: map[bool]bool{},
	}
	t = c.Tunnel
	t.log = slog.New(t.ifname)
	t.fast.attached.Store(&attachment{})
	if t.cfg.TunQueues == 0 {
		t.cfg.TunQueues = e.threads
	}
	if floor := netstate.MinPMTU(); floor >= encap.MinPathMTU {
		c.pathMTU.Floor = floor
	}
	if cfg.IPsec.Wanted() {
		if t.ipsecPolicy, err = newIPsecPolicy(e.ipsecManager(), &t.cfg, t.log, t.wakeControl, t.drop); err != nil {
			return nil, err
		}
	}
	if err := c.resolve(ctx, t.epoch); err != nil {
		return nil, err
	}
	t.follower = e.network.Follow(c.query(), t.wakeControl)
	defer func() {
		if err != nil {
			c.end()
		}
	}()
	c.answer = t.follower.Answer()
	first, err := c.newRoute()
	if err != nil {
		return nil, err
	}
	if c.underlay.Local {
		return nil, fmt.Errorf("remote-address %v is an address of this host: it must be the other end's", c.remote)
	}
	// Call wantedMTU once: an SA established meanwhile changes its result, and updateMTU
	// compares with what the device was given.
	c.appliedMTU = c.wantedMTU()
	if t.device, err = e.openDevice(tun.Options{
		Name: cfg.Name, MTU: c.appliedMTU, Queues: t.cfg.TunQueues,
		OnDegraded: func(err error) {
			e.log.Info("the kernel does not give the interface all that it could use", "err", err)
		},
	}); err != nil {
		return nil, err
	}
	t.queues = t.device.Queues()
	t.ifname.set(t.device.Name())
	t.mtu.Store(int32(c.appliedMTU))
	t.route.Store(first)
	c.resetKeepalive(t.epoch)
	device := t.device
	defer func() {
		if err != nil {
			device.Close()
		}
	}()
	c.carrier = true
	c.updateCarrier()
	if err := c.readInterface(); err != nil {
		return nil, err
	}
	t.madeIndex = c.ifindex
	if err := e.network.Configure([]netstate.Interface{{Index: c.ifindex, Addresses: cfg.Addresses, Routes: cfg.Routes}}); err != nil {
		return nil, err
	}
	if cfg.RPS != "" {
		if err := e.network.SetRPS(t.Name(), cfg.RPS); err != nil {
			t.log.Warn("rps is not set: received flows stay on the processors that they come by", "err", err)
		}
	}
	if cfg.KeepaliveProbe == keepalive.FormEcho {
		t.echo = keepalive.NewEcho(cfg.Addresses[0].Addr().As4(), cfg.KeepaliveTarget.As4())
	}
	c.tx, c.ids = t.newTransmitter(e.socket.NewSender()), t.idCounters(1)[0]
	if err := c.readInterface(); err != nil {
		return nil, err
	}
	c.answer = t.follower.Answer()
	c.interfaceChanges, c.interfaceDowns = c.answer.InterfaceChanges, c.answer.InterfaceDowns
	ids, keys := t.idCounters(len(t.queues)), make([]int32, len(t.queues))
	for i, q := range t.queues {
		w := e.workers[i%len(e.workers)].out
		keys[i] = w.add(&outbound{tunnel: t, queue: q, tx: t.newTransmitter(w.sender), ids: ids[i]})
		t.stop = append(t.stop, func() { w.remove(keys[i], q.FD()) })
	}
	ctx, t.cancel = context.WithCancel(context.Background())
	t.loops.Add(1)
	if err := e.register(t, &first.path); err != nil {
		for _, stop := range t.stop {
			stop()
		}
		return nil, err
	}
	// From now on the tunnel may fail, and be closed.
	t.warnNAT()
	c.syncFastPath()
	e.updateReception(t)
	for i, q := range t.queues {
		if err = e.workers[i%len(e.workers)].out.watch(q.FD(), keys[i]); err != nil {
			break
		}
	}
	go func() { // not before: Close waits for it, and then closes the file descriptors
		defer t.loops.Done()
		c.run(ctx)
	}()
	if err != nil {
		_ = t.Close()
		return nil, err
	}
	return t, nil
}

// Name is the current name of the tunnel's interface, as control last read it.
func (t *Tunnel) Name() string { return t.ifname.get() }

// MTU is the interface's MTU: the largest inner packet in bytes.
func (t *Tunnel) MTU() int { return int(t.mtu.Load()) }

// Done is closed when the tunnel has ended, by Close or by a failure; Err tells which.
func (t *Tunnel) Done() <-chan struct{} { return t.done }

// Err is the failure that ended the tunnel; nil after Close.
func (t *Tunnel) Err() error {
	if err := t.err.Load(); err != nil {
		return *err
	}
	return nil
}

// Close removes the interface and returns when no goroutine uses the tunnel any more. Further
// calls only wait for that.
func (t *Tunnel) Close() error { return t.engine.CloseTunnels(t) }

// fail closes the tunnel in the background. The first err is the one that Err returns. A
// tunnel that is closing does not fail.
func (t *Tunnel) fail(err error) {
	if t.closing.Load() {
		return
	}
	t.err.CompareAndSwap(nil, &err)
	go t.Close() // waits for control, which may be the caller
}

// noteReceived records a packet of the peer. It wakes control only if that changes the keepalive
// state or reachability.
func (t *Tunnel) noteReceived(now time.Time) {
	t.lastReceivedNs.Store(int64(now.Sub(t.epoch)))
	changed := false
	if t.unreachable.Load() {
		t.unreachable.Store(false)
		changed = true
	}
	if s := keepalive.State(t.state.Load()); changed || s != keepalive.Up && s != keepalive.Off {
		t.wakeControl()
	}
}

// lastReceived is the time of the peer's last packet, by userspace or the fast path; zero is
// never.
func (t *Tunnel) lastReceived() time.Time {
	t.mergeLastReceived(t.fastStats().LastReceived)
	if last := t.lastReceivedNs.Load(); last != 0 {
		return t.epoch.Add(time.Duration(last))
	}
	return time.Time{}
}

// Status returns the settings and the current state, as print shows them.
func (t *Tunnel) Status() Status {
	iface := t.iface.Load()
	cfg := t.cfg
	cfg.Name = iface.Name
	s := NewStatus(&cfg)
	if made := t.device.Name(); made != iface.Name {
		s.RenamedFrom = made
	}
	route, state := t.route.Load(), keepalive.State(t.state.Load())
	s.Disabled = !iface.Moved && !iface.Up
	s.Running = t.running() && (iface.Moved || iface.Up && iface.Carrier)
	if s.WaitingFor = t.waitingFor(); s.WaitingFor != "" && cfg.Keepalive.Interval > 0 {
		state = keepalive.Waiting
	}
	s.KeepaliveState = state.String()
	s.LastHeard = t.lastReceived()
	s.ActualMTU = t.MTU()
	s.CurrentLocalAddress = address(route.path.Local).String()
	s.CurrentRemoteAddress = address(route.path.Remote).String()
	s.PathMTU = route.path.MTU
	s.FastPath = t.fastState()
	s.RxPacket, s.RxByte, s.TxPacket, s.TxByte = t.totals()
	s.Drops, s.ProcessDrops = t.dropCounts(), t.engine.dropCounts()
	if t.ipsecPolicy != nil {
		state := t.ipsecPolicy.status()
		state.Problem = cmp.Or(state.Problem, s.WaitingFor)
		s.IPsec = state.Describe(time.Now())
		if state.Established {
			s.IPsecSPI = fmt.Sprintf("0x%08x/0x%08x", state.InboundSPI, state.OutboundSPI)
		}
	}
	return s
}

func address(a [4]byte) netip.Addr { return netip.AddrFrom4(a) }
