package tunnel

import (
	"cmp"
	"sync/atomic"
	"time"

	"ipipd/internal/drop"
	"ipipd/keepalive"
)

// Samples are the numbers of an Engine at one moment, for metrics, the page and `ipipd monitor`.
type Samples struct {
	Tunnels []Sample `json:"tunnels"` // in no order
	// Drops counts, by reason, dropped packets that belong to no tunnel.
	Drops drop.Counts `json:"drops"`
}

// Sample is a tunnel's state in numbers, as Status is in words. Its JSON is for other versions of ipipd only.
type Sample struct {
	// Name is Config.Name, whatever the interface was renamed to; Interface is the name it has.
	Name      string `json:"name"`
	Interface string `json:"interface"`
	Comment   string `json:"comment,omitzero"`
	// LocalAddress and RemoteAddress are the outer addresses in use; of a tunnel that is not started, the
	// configured ones, "" if there is none.
	LocalAddress  string `json:"local-address,omitzero"`
	RemoteAddress string `json:"remote-address,omitzero"`
	// Started: the tunnel runs, so that the fields below are set, too.
	Started bool `json:"started,omitzero"`

	// These are as in State.
	Disabled       bool   `json:"disabled,omitzero"`
	Running        bool   `json:"running,omitzero"`
	WaitingFor     string `json:"waiting-for,omitzero"`
	KeepaliveState string `json:"keepalive-state,omitzero"`
	// FastPath: the fast path is active.
	FastPath bool `json:"fast-path,omitzero"`

	MTU          int         `json:"mtu,omitzero"`      // bytes; 0 is unknown
	PathMTU      int         `json:"path-mtu,omitzero"` // bytes; 0 is unknown
	LastHeard    time.Time   `json:"last-heard,omitzero"`
	RxPackets    uint64      `json:"rx-packet,omitzero"`
	RxBytes      uint64      `json:"rx-byte,omitzero"`
	TxPackets    uint64      `json:"tx-packet,omitzero"`
	TxBytes      uint64      `json:"tx-byte,omitzero"`
	StateChanges uint64      `json:"state-changes,omitzero"` // how often the carrier was set or unset
	Drops        drop.Counts `json:"drops"`

	ProbesSent     uint64 `json:"probes-sent,omitzero"`
	ProbesAnswered uint64 `json:"probes-answered,omitzero"`
	// ProbesHaveAnswers: there are probes, of a form that a peer answers, reflect or echo.
	ProbesHaveAnswers bool `json:"probes-have-answers,omitzero"`
	// RoundTrip is the round-trip time of the last probe that was answered; 0 if none was.
	RoundTrip time.Duration `json:"round-trip,omitzero"`

	// Remotes counts the remotes of a tunnel with many, without Remotes.List; nil of another tunnel.
	Remotes *Remotes `json:"remotes,omitzero"`

	// Warnings are the active warnings.
	Warnings []Warning `json:"warnings,omitzero"`

	// Encrypted: the tunnel has a secret. The fields below are about its SAs.
	Encrypted   bool      `json:"encrypted,omitzero"`
	Established bool      `json:"established,omitzero"`
	SAs         uint64    `json:"sas,omitzero"`   // pairs of SAs established so far
	Since       time.Time `json:"since,omitzero"` // when the SA in use was established
	RekeyAt     time.Time `json:"rekey-at,omitzero"`
	// IPsecRemotes is how many remotes of a tunnel with many have an SA (Since and RekeyAt are zero); nil of another tunnel.
	IPsecRemotes *int `json:"ipsec-remotes,omitzero"`
}

// NewSample returns the Sample of a tunnel that is not started.
func NewSample(c *Config) Sample {
	s := Sample{Name: c.Name, Interface: InterfaceName(c.Name), Comment: c.Comment, RemoteAddress: c.RemoteAddress, Disabled: c.Disabled}
	if c.LocalAddress.IsValid() {
		s.LocalAddress = c.LocalAddress.String()
	}
	return s
}

// Samples returns the Samples of all tunnels that run. No thread that carries packets waits for it.
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
		Started:    true,
		Disabled:   !iface.Moved && !iface.Up && t.missing.Load() == nil,
		Running:    t.running() && (iface.Moved || iface.Up && iface.Carrier),
		WaitingFor: t.waitingFor(), KeepaliveState: t.keepaliveState(cfg, route).String(),
		FastPath: t.fast.active(),
		MTU:      t.MTU(), PathMTU: route.path.MTU,
		StateChanges: t.changes.Load(),
		Drops:        t.counters.drops.All(),
		ProbesSent:   t.probes.sent.Load(), ProbesAnswered: t.probes.answered.Load(),
		Warnings:          t.activeWarnings(),
		ProbesHaveAnswers: cfg.keepalive().Interval > 0 && cfg.KeepaliveProbe != keepalive.FormEmpty,
		RoundTrip:         time.Duration(t.probes.roundTrip.Load()),
	}
	if last := t.lastReceivedNs.Load(); last != 0 {
		s.LastHeard = t.epoch.Add(time.Duration(last))
	}
	s.RxPackets, s.RxBytes = t.counters.rx.load()
	s.TxPackets, s.TxBytes = t.counters.tx.load()
	s.RxPackets, s.RxBytes = s.RxPackets+fast.RxPackets, s.RxBytes+fast.RxBytes
	s.TxPackets, s.TxBytes = s.TxPackets+fast.TxPackets, s.TxBytes+fast.TxBytes
	for why, n := range fastDrops(&fast) {
		s.Drops[why] += n
	}
	if t.many != nil {
		s.Remotes, s.RemoteAddress, s.PathMTU = t.Remotes(0), AnyRemote, 0
	}
	if t.ipsecPolicy != nil {
		sa := t.ipsecPolicy.status()
		s.Encrypted, s.Established, s.Since, s.RekeyAt = true, sa.Established, sa.Since, sa.RekeyAt
		s.SAs = t.ipsecPolicy.sas.Load()
		if t.many != nil {
			s.IPsecRemotes = t.ipsecPolicy.remotes.count()
			s.Established = *s.IPsecRemotes > 0
		}
	}
	return s
}

// probes counts the probes of a tunnel's keepalive. control notes those sent, the data path their answers.
type probes struct {
	sent, answered atomic.Uint64
	sentAt         atomic.Int64 // when the last one was sent, nanoseconds after Tunnel.epoch; 0 once it is answered
	roundTrip      atomic.Int64 // of the last one answered, nanoseconds
}

// noteProbe notes a probe that is about to be sent to the remote; one to a candidate is not counted.
func (t *Tunnel) noteProbe(form keepalive.Form, now time.Time) {
	t.probes.sent.Add(1)
	if form != keepalive.FormEmpty {
		t.probes.sentAt.Store(max(1, int64(now.Sub(t.epoch))))
	}
}

// noteProbeAnswer notes an answer of the peer. Only the first one after a probe is counted.
func (t *Tunnel) noteProbeAnswer(now time.Time) {
	t.probeAnswered.Store(true)
	if sent := t.probes.sentAt.Swap(0); sent != 0 {
		t.probes.answered.Add(1)
		t.probes.roundTrip.Store(max(1, int64(now.Sub(t.epoch))-sent))
	}
}

// State returns the tunnel's state in one word, as `ipipd monitor` shows it: disabled, running, waiting (for WaitingFor),
// no-sa, lost, never-heard, or down for any other reason.
func (s *Sample) State() string {
	switch {
	case s.Disabled:
		return "disabled"
	case s.Running:
		return "running"
	case s.WaitingFor != "":
		return "waiting"
	case s.Encrypted && !s.Established:
		return "no-sa"
	case s.KeepaliveState == keepalive.Lost.String(), s.KeepaliveState == keepalive.NeverHeard.String():
		return s.KeepaliveState
	}
	return "down"
}
