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
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"ipipd/internal/capture"
	"ipipd/keepalive"
	"ipipd/tun"
)

// Tunnel is one IP-in-IP tunnel (RFC 2003). Its methods are safe for concurrent use.
type Tunnel struct {
	engine *Engine
	log    *slog.Logger
	epoch  time.Time
	// madeName is the interface's name at creation.
	madeName string

	// Used by control until it has ended, then by Close.
	device    tun.Device
	madeIndex int      // the ifindex of device at its creation
	stop      []func() // each takes one of its queues from the worker that reads it

	// Written by control.
	config      atomic.Pointer[Config] // the same as control.cfg
	route       atomic.Pointer[route]
	queues      atomic.Pointer[[]tun.Queue]
	iface       atomic.Pointer[tun.State]         // as last read; its MTU is unknown while it is Moved
	missing     atomic.Pointer[string]            // while the interface is gone, what to show as Status.WaitingFor; else nil
	mtu         atomic.Int32                      // of the interface, in bytes
	pairTaken   atomic.Bool                       // another tunnel has the outer addresses
	unreachable atomic.Bool                       // ICMP errors report that outer packets do not arrive
	state       atomic.Uint32                     // keepalive.State
	changes     atomic.Uint64                     // how often the carrier was set or unset, for metrics
	warnings    atomic.Pointer[[]Warning]         // see activeWarnings
	restored    atomic.Pointer[map[string]uint64] // see restoredCounts
	candidate   atomic.Pointer[otherRemote]       // address of the DNS name that is probed; nil is none
	others      atomic.Pointer[[]*otherRemote]    // further remotes to accept packets from: see acceptOthers
	ifname      *ifnameHandler                    // the interface's current name
	fast        fastPath                          // see fastpath.go
	captures    atomic.Pointer[capture.Rings]     // nil without a capture; written under Engine.mu

	// Written by the data path.
	lastReceivedNs atomic.Int64  // time of the peer's last packet, nanoseconds after epoch; 0 is never
	probeAnswered  atomic.Bool   // the peer has answered a probe
	peerProbes     atomic.Bool   // the peer sends probes of its own
	peerOwnAddress atomic.Uint32 // the peer's own address by its last reflect probe, 0 if it is the remote: see noteReflect
	probes         probes        // see sample.go
	oversize       sighting      // a received inner packet above the MTU: its length in bytes
	looped         sighting      // a packet dropped for drop.Loop
	fragmentLoss   sighting      // packets that this host failed to reassemble; written by poll
	counters       *counters     // the entry's, if there is one
	entry          *ledgerEntry  // memory that outlives the process; nil without a Manager

	ipsecPolicy  *ipsecPolicy // nil without a secret
	many         *remotes     // nil unless remote-address is any
	follower     Follower
	reflectLimit limiter // answers to the peer's reflect probes
	icmpLimit    limiter // ICMP errors to inner senders

	activity   activity    // used by Engine.poll only
	confirmDue atomic.Bool // set by poll: control is to call confirmRemotes
	linkVote   int         // the ifindex that it counts for in Engine.linkVotes, if linkVoted
	linkVoted  bool

	wake    chan struct{}   // wakes control; capacity 1, see wakeControl
	events  chan event      // what control is to run
	ctx     context.Context // of control and what it starts
	cancel  context.CancelFunc
	loops   sync.WaitGroup // the goroutines of control and of name look-ups
	closing atomic.Bool    // Close has begun; set once
	done    chan struct{}
	err     atomic.Pointer[error]
}

// Name returns Config.Name or, if the interface was renamed since, the interface's name.
func (t *Tunnel) Name() string { return shownName(t.config.Load().Name, t.ifname.get()) }

// Config returns a copy of the tunnel's configuration, secrets included.
func (t *Tunnel) Config() Config { return *t.config.Load().clone() }

// MTU is the interface's MTU: the largest inner packet in bytes.
func (t *Tunnel) MTU() int { return int(t.mtu.Load()) }

// Done returns a channel that is closed when the tunnel has ended, by Close or by a failure; Err tells which.
func (t *Tunnel) Done() <-chan struct{} { return t.done }

// Err returns the failure that ended the tunnel; nil while it runs, and after Close.
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

// lastReceived returns when the peer's last packet came, by userspace or the fast path; the zero time if never.
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
	cfg := *t.config.Load()
	named := cmp.Or(cfg.Name, t.madeName)
	cfg.Name = shownName(named, iface.Name)
	s := NewStatus(&cfg)
	switch {
	case t.madeName != iface.Name:
		s.RenamedFrom = named
	case named != iface.Name:
		s.Interface = iface.Name
	}
	route := t.route.Load()
	s.Disabled = !iface.Moved && !iface.Up && t.missing.Load() == nil
	s.Running = t.running() && (iface.Moved || iface.Up && iface.Carrier)
	s.WaitingFor, s.KeepaliveState = t.waitingFor(), t.keepaliveState(&cfg, route).String()
	s.Warnings, s.Restored = t.activeWarnings(), t.restoredCounts()
	s.LastHeard = t.lastReceived()
	s.ActualMTU = t.MTU()
	s.CurrentLocalAddress, s.CurrentRemoteAddress = addressText(route.path.Local), addressText(route.path.Remote)
	if candidate := t.candidate.Load(); candidate != nil {
		s.CandidateRemoteAddress = address(candidate.path.Remote).String()
	}
	s.PathMTU = route.path.MTU
	if t.many != nil {
		s.Remotes, s.CurrentRemoteAddress, s.PathMTU = t.Remotes(0), AnyRemote, 0
	}
	s.FastPath = t.fastState()
	s.RxPacket, s.RxByte, s.TxPacket, s.TxByte = t.totals()
	s.Drops, s.ProcessDrops = t.dropCounts(), t.engine.dropCounts()
	switch {
	case t.ipsecPolicy == nil:
	case t.many != nil:
		s.IPsec, s.IPsecRemotes = describeRemotes(t.ipsecPolicy.remotes.statuses(), time.Now())
	default:
		state := t.ipsecPolicy.status()
		state.Problem = cmp.Or(state.Problem, s.WaitingFor)
		s.IPsec, s.IPsecSPI = state.Describe(time.Now()), spiText(&state)
	}
	return s
}

// keepaliveState returns the keepalive's state as it is shown: waiting while the tunnel is suspended.
func (t *Tunnel) keepaliveState(cfg *Config, r *route) keepalive.State {
	if r.suspended && cfg.keepalive().Interval > 0 {
		return keepalive.Waiting
	}
	return keepalive.State(t.state.Load())
}

func address(a [4]byte) netip.Addr { return netip.AddrFrom4(a) }

// addressText formats an outer address; "" for 0.0.0.0, which stands for one that is not known.
func addressText(a [4]byte) string {
	if a == [4]byte{} {
		return ""
	}
	return address(a).String()
}
