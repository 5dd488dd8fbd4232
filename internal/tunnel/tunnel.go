// Package tunnel joins the two doors: it owns the tunnels of a process, carries
// packets between their devices and the one socket, and keeps them right while
// routes, names and peers come and go.
//
// datapath.go is what happens to a packet; supervisor.go what happens beside the
// packets; host.go what the tunnels of a process share; guard.go and exit.go keep a
// tunnel with a secret encrypted, or shut.
package tunnel

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"ipipd/encap"
	"ipipd/internal/netstate"
	"ipipd/internal/packet"
	"ipipd/keepalive"
	"ipipd/tun"
)

// Tunnel is one IP-in-IP tunnel. Its methods may be called by several goroutines.
type Tunnel struct {
	host   *Engine
	log    *slog.Logger
	cfg    Config
	device tun.Device
	queues []tun.Queue
	// rxLoop is the receiver that few packets at a time last came by.
	rxLoop atomic.Pointer[rxLoop]
	echo   *keepalive.Echo // nil unless the probes are echoes

	// What the data path reads, and the supervisor replaces.
	route atomic.Pointer[route]
	mtu   atomic.Int32
	moved atomic.Bool // to another network namespace, where its MTU may be any
	// unreachable: ICMP errors say that outer packets do not arrive.
	unreachable atomic.Bool

	// bypass: nothing but the route has a say about outer packets.
	bypass atomic.Bool

	// What the data path leaves for the supervisor.
	lastHeard atomic.Int64 // nanoseconds after epoch
	state     atomic.Uint32
	answered  atomic.Bool // the peer has answered a probe
	probes    atomic.Bool // the peer has sent a probe of its own
	// oversize is the length of a received packet that was longer than the MTU; 0
	// is none since the supervisor looked.
	oversize    atomic.Int32
	loopLogged  atomic.Bool
	counters    counters
	fast        fast
	ipsecPolicy *ipsecPolicy // nil unless there is a secret

	reflectLimit limiter // answers to the peer's probes
	icmpLimit    limiter // ICMP errors to inner senders

	epoch time.Time
	wake  chan struct{}

	names *names // that the interface has now

	mu            sync.Mutex // guards the rest
	iface         tun.State  // as it was last looked at
	putBacks      map[asked]putBack
	wasDown       bool          // the interface, since it was looked at; it may be up again
	notPutBack    map[bool]bool // of addresses (false) or routes, and that has been logged
	named         int           // the underlay-device that was last found, by index
	monitor       *keepalive.Monitor
	wanted        int // MTU that was last set
	unsettable    int // MTU that could not be set, and that has been logged
	mtuDecreases  mtuDecreases
	pathMTU       encap.PathMTU
	reach         encap.Reachability
	unreachableAt time.Time
	// What ICMP errors say, as it is logged.
	pathMTUFrom                                  [4]byte
	pathMTUNotice, arrivalNotice, listenerNotice notice
	remote                                       netip.Addr // what RemoteAddress resolved to
	resolved                                     time.Time
	underlay                                     netstate.Route
	noRoute                                      bool   // and that has been logged
	bypassBlocker                                string // why outer packets have to take the kernel's own way; "" if they need not
	loggedBlocker                                string // the same, as last logged
	protoUnreachable                             bool   // the peer's host answers "protocol unreachable"
	closed                                       bool
	err                                          error

	// The supervisor's own.
	carrier                               bool // as it was last set
	fragmentingLogged, fragmentLossLogged bool
	toldOfData, toldOfSize                bool
	unanswered                            int    // probes while the peer was heard
	reassembled, unassembled              uint64 // the kernel's counters at the start

	tx     transmitter // the supervisor's, for probes
	ids    identifier
	cancel context.CancelFunc
	done   chan struct{}
	once   sync.Once
	loops  sync.WaitGroup
}

// Start makes the interface, finds the way to the remote, and carries packets
// when it returns. What it had made is removed again if it fails.
func (h *Engine) Start(ctx context.Context, cfg Config) (t *Tunnel, err error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	t = &Tunnel{
		host: h, cfg: cfg, epoch: time.Now(), wake: make(chan struct{}, 1), done: make(chan struct{}),
		names: newNames(h.log, cfg.Name), putBacks: map[asked]putBack{}, notPutBack: map[bool]bool{},
	}
	if t.cfg.TunQueues == 0 {
		t.cfg.TunQueues = defaultThreads()
	}
	if floor := netstate.MinPMTU(); floor >= encap.MinPathMTU {
		t.pathMTU.Floor = floor
	}
	if cfg.IPsec.Wanted() {
		ipsecPolicy, err := newIPsecPolicy(h.protector(), &t.cfg, slog.New(t.names), t.wakeSupervisor)
		if err != nil {
			return nil, err
		}
		t.ipsecPolicy = ipsecPolicy
	}
	if err := t.resolve(ctx, t.epoch); err != nil {
		return nil, err
	}
	if ipsecPolicy := t.ipsecPolicy; ipsecPolicy != nil {
		defer func() {
			if err != nil {
				ipsecPolicy.close()
			}
		}()
	}
	first, err := t.lookup()
	if err != nil {
		return nil, err
	}
	if t.underlay.Local {
		return nil, fmt.Errorf("remote-address %v is an address of this host: it must be the other end's", t.remote)
	}
	// Asked once: an SA that comes meanwhile changes the answer, and what the device
	// has is what followMTU compares with.
	t.wanted = t.wantedMTU()
	if t.device, err = h.openDevice(tun.Options{
		Name: cfg.Name, MTU: t.wanted, Queues: t.cfg.TunQueues,
		OnDegraded: func(err error) {
			h.log.Info("the kernel does not give the interface all that it could use", "err", err)
		},
	}); err != nil {
		return nil, err
	}
	t.queues = t.device.Queues()
	t.names.set(t.device.Name())
	t.log = slog.New(t.names)
	t.mtu.Store(int32(t.wanted))
	t.route.Store(first)
	t.followLocal(t.epoch)
	device := t.device
	defer func() {
		if err != nil {
			device.Close()
		}
	}()
	t.carrier = true
	t.followCarrier()
	if t.iface, err = t.device.State(); err != nil {
		return nil, err
	}
	if err := h.network.Configure(t.iface.Index, cfg.Addresses, cfg.Routes); err != nil {
		return nil, err
	}
	t.iface.Up = true
	if cfg.RPS != "" {
		if err := h.network.SetRPS(t.Name(), cfg.RPS); err != nil {
			t.log.Warn("rps is not set: received flows stay on the processors that they come by", "err", err)
		}
	}
	if cfg.KeepaliveProbe == keepalive.FormEcho {
		t.echo = keepalive.NewEcho(cfg.Addresses[0].Addr().As4(), cfg.KeepaliveTarget.As4())
	}
	t.tx, t.ids = t.transmitter(h.socket.NewSender()), t.identifiers(1)[0]
	if err := h.register(t, &first.path); err != nil {
		return nil, err
	}
	t.warnOfNAT()
	t.syncFastPath()
	h.chooseReceiving()

	ctx, t.cancel = context.WithCancel(context.Background())
	ids := t.identifiers(len(t.queues))
	for i, q := range t.queues {
		o := t.newOutbound(q, t.transmitter(h.socket.NewSender()), ids[i])
		t.loops.Add(1)
		h.spawn("send", func() error {
			defer t.loops.Done()
			if err := o.run(ctx); !errors.Is(err, os.ErrClosed) {
				t.fail(fmt.Errorf("interface %s is gone: %w", t.Name(), err))
			}
			return nil
		}, t.fail)
	}
	t.loops.Go(func() { t.supervise(ctx) })
	return t, nil
}

// Name is the name of the tunnel's interface, as it was last looked at.
func (t *Tunnel) Name() string { return t.names.get() }

// MTU is the actual MTU: the largest inner packet in bytes.
func (t *Tunnel) MTU() int { return int(t.mtu.Load()) }

// Done is closed when the tunnel has ended, by Close or because it failed; Err
// then says which: nil after Close.
func (t *Tunnel) Done() <-chan struct{} { return t.done }

// Err is why the tunnel ended by itself.
func (t *Tunnel) Err() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.err
}

// Close removes the interface and ends the tunnel. It may be called more than
// once.
func (t *Tunnel) Close() (err error) {
	t.once.Do(func() {
		// First nobody is to find the tunnel any more, then its threads are
		// woken by the device's end, and then there is nothing left to wait for.
		t.host.register(t, nil)
		t.host.chooseReceiving()
		t.cancel()
		t.mu.Lock()
		t.closed = true
		t.disableFastPath()
		t.mu.Unlock()
		err = t.device.Close()
		t.loops.Wait()
		if t.ipsecPolicy != nil {
			t.mu.Lock()
			t.ipsecPolicy.close()
			t.mu.Unlock()
		}
		close(t.done)
	})
	return err
}

// fail ends a tunnel that cannot go on.
func (t *Tunnel) fail(err error) {
	t.mu.Lock()
	if t.err == nil {
		t.err = err
	}
	t.mu.Unlock()
	go t.Close() // which waits for the loop that has failed
}

func (t *Tunnel) drop(reason encap.Drop) {
	t.counters.drops.add(reason, 1)
	if reason == encap.DropLoop && !t.loopLogged.Swap(true) {
		t.log.Warn("a loop: outer packets of this tunnel are routed back into it; they are dropped",
			"remedy", fmt.Sprintf("give %v a route that does not go through %s, or set underlay-device", address(t.route.Load().path.Remote), t.Name()))
	}
}

// noteReceived notes that the peer is there. The supervisor is woken only where that is
// news.
func (t *Tunnel) noteReceived(now time.Time) {
	t.lastHeard.Store(int64(now.Sub(t.epoch)))
	news := false
	if t.unreachable.Load() {
		t.unreachable.Store(false)
		news = true
	}
	if s := keepalive.State(t.state.Load()); news || s != keepalive.Up && s != keepalive.Off {
		t.wakeSupervisor()
	}
}

// lastReceived is when the last packet of the peer came; zero is never.
func (t *Tunnel) lastReceived() time.Time {
	t.mergeLastReceived(t.fastStats().LastReceived)
	if noteReceived := t.lastHeard.Load(); noteReceived != 0 {
		return t.epoch.Add(time.Duration(noteReceived))
	}
	return time.Time{}
}

// Status is what print shows.
func (t *Tunnel) Status() Status {
	iface, err := t.device.State()
	cfg := t.cfg
	cfg.Name = iface.Name
	s := NewStatus(&cfg)
	if made := t.device.Name(); made != iface.Name {
		s.RenamedFrom = made
	}
	route, state := t.route.Load(), keepalive.State(t.state.Load())
	s.Disabled = err == nil && !iface.Up
	s.Running = t.running() && (err != nil || iface.Up && iface.Carrier)
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
	// What belongs to no tunnel is the process's, and is shown with each of them.
	s.Drops = make(map[string]uint64)
	for _, drops := range []*drops{&t.counters.drops, &t.host.drops} {
		drops.addTo(s.Drops)
	}
	if t.ipsecPolicy != nil {
		t.mu.Lock()
		t.ipsecPolicy.addTo(s.Drops)
		t.mu.Unlock()
		state := t.ipsecPolicy.status()
		state.Problem = cmp.Or(state.Problem, s.WaitingFor)
		s.IPsec = state.Describe(time.Now())
		if state.Established {
			s.IPsecSPI = fmt.Sprintf("0x%08x/0x%08x", state.InboundSPI, state.OutboundSPI)
		}
	}
	if n := t.fastStats().TxFailed; n > 0 {
		s.Drops[encap.DropSendFailed.String()] += n
	}
	if n := t.host.socket.Overflows(); n > 0 {
		s.Drops[encap.DropReceiveOverflow.String()] = n
	}
	return s
}

// wakeSupervisor has the supervisor look around.
func (t *Tunnel) wakeSupervisor() {
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// outboundBatch makes the buffers that packets are read into: small ones for the
// usual MTU, and for a larger one, or one that cannot be known, such that a packet of
// 64 KiB is read in place.
func (t *Tunnel) outboundBatch(have []*packet.Buffer) []*packet.Buffer {
	const small = 2048
	large := t.MTU() > small || t.moved.Load()
	switch {
	case have != nil && large == (len(have[0].Space()) == packet.MaxSize):
		return have
	case large:
		return packet.NewBatch(batchSize/4, packet.MaxSize)
	}
	return packet.NewBatch(batchSize, small)
}

func address(a [4]byte) netip.Addr { return netip.AddrFrom4(a) }
