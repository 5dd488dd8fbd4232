package tunnel

import (
	"cmp"
	"sync/atomic"
	"time"

	"ipipd/internal/drop"
	"ipipd/keepalive"
)

// Samples are the numbers of an Engine at one moment, for metrics.
type Samples struct {
	Tunnels []Sample // in no order
	// Drops are those of packets that belong to no tunnel, by drop.Reason.
	Drops [drop.NumReasons]uint64
}

// Sample is a tunnel in numbers, for metrics: what Status says in words.
type Sample struct {
	// Name is Config.Name, whatever the interface was renamed to; Interface is the name it has.
	Name, Interface, Comment string
	// LocalAddress and RemoteAddress are the outer addresses in use; of a tunnel that is not started, the
	// configured ones, "" if there is none.
	LocalAddress, RemoteAddress string
	// Started is whether there is more than this.
	Started bool

	// Waiting is whether there is a State.WaitingFor; the others are as in State.
	Disabled, Running, Waiting, FastPath bool

	MTU, PathMTU       int // bytes; 0 is unknown
	LastHeard          time.Time
	RxPackets, RxBytes uint64
	TxPackets, TxBytes uint64
	StateChanges       uint64 // how often the carrier was set or unset
	Drops              [drop.NumReasons]uint64

	ProbesSent, ProbesAnswered uint64
	// ProbesHaveAnswers is whether a probe of that form is answered at all.
	ProbesHaveAnswers bool
	// RoundTrip is that of the last probe that was answered; 0 is none.
	RoundTrip time.Duration

	// Encrypted is whether the tunnel has a secret, and the rest its SAs.
	Encrypted, Established bool
	SAs                    uint64    // pairs that were established
	Since, RekeyAt         time.Time // of the SA in use
}

// NewSample returns that of a tunnel that is not started.
func NewSample(c *Config) Sample {
	s := Sample{Name: c.Name, Interface: InterfaceName(c.Name), Comment: c.Comment, RemoteAddress: c.RemoteAddress, Disabled: c.Disabled}
	if c.LocalAddress.IsValid() {
		s.LocalAddress = c.LocalAddress.String()
	}
	return s
}

// Samples returns those of all tunnels that run. Nothing that carries packets waits for it.
func (e *Engine) Samples() (s Samples) {
	tunnels := e.Tunnels()
	s.Tunnels = make([]Sample, 0, len(tunnels))
	for _, t := range tunnels {
		s.Tunnels = append(s.Tunnels, t.sample())
	}
	s.Drops = e.drops.All()
	s.Drops[drop.ReceiveOverflow] += e.socket.Overflows()
	return s
}

func (t *Tunnel) sample() Sample {
	iface, cfg, route := t.iface.Load(), t.config.Load(), t.route.Load()
	fast := t.fastStats()
	t.mergeLastReceived(fast.LastReceived)
	s := Sample{
		Name: cmp.Or(cfg.Name, t.madeName), Interface: iface.Name, Comment: cfg.Comment,
		LocalAddress: addressText(route.path.Local), RemoteAddress: addressText(route.path.Remote),
		Started:  true,
		Disabled: !iface.Moved && !iface.Up && t.missing.Load() == nil,
		Running:  t.running() && (iface.Moved || iface.Up && iface.Carrier),
		Waiting:  t.waitingFor() != "",
		FastPath: t.fast.active(),
		MTU:      t.MTU(), PathMTU: route.path.MTU,
		StateChanges: t.changes.Load(),
		Drops:        t.counters.drops.All(),
		ProbesSent:   t.probes.sent.Load(), ProbesAnswered: t.probes.answered.Load(),
		ProbesHaveAnswers: cfg.Keepalive.Interval > 0 && cfg.KeepaliveProbe != keepalive.FormEmpty,
		RoundTrip:         time.Duration(t.probes.roundTrip.Load()),
	}
	if last := t.lastReceivedNs.Load(); last != 0 {
		s.LastHeard = t.epoch.Add(time.Duration(last))
	}
	s.RxPackets, s.RxBytes = t.counters.rx.load()
	s.TxPackets, s.TxBytes = t.counters.tx.load()
	s.RxPackets, s.RxBytes = s.RxPackets+fast.RxPackets, s.RxBytes+fast.RxBytes
	s.TxPackets, s.TxBytes = s.TxPackets+fast.TxPackets, s.TxBytes+fast.TxBytes
	s.Drops[drop.SendFailed] += fast.TxFailed
	if t.ipsecPolicy != nil {
		sa := t.ipsecPolicy.status()
		s.Encrypted, s.Established, s.Since, s.RekeyAt = true, sa.Established, sa.Since, sa.RekeyAt
		s.SAs = t.ipsecPolicy.sas.Load()
	}
	return s
}

// probes are the probes of a tunnel's keepalive. control sends, the data path notes answers.
type probes struct {
	sent, answered atomic.Uint64
	sentAt         atomic.Int64 // of the one without an answer, nanoseconds after Tunnel.epoch; 0 is none
	roundTrip      atomic.Int64 // nanoseconds
}

// noteProbe notes a probe that is about to be sent; one to a candidate beside it does not count.
func (t *Tunnel) noteProbe(form keepalive.Form, now time.Time) {
	t.probes.sent.Add(1)
	if form != keepalive.FormEmpty {
		t.probes.sentAt.Store(max(1, int64(now.Sub(t.epoch))))
	}
}

// noteProbeAnswer notes an answer to the last probe; what comes beside it is none.
func (t *Tunnel) noteProbeAnswer(now time.Time) {
	t.probeAnswered.Store(true)
	if sent := t.probes.sentAt.Swap(0); sent != 0 {
		t.probes.answered.Add(1)
		t.probes.roundTrip.Store(max(1, int64(now.Sub(t.epoch))-sent))
	}
}
