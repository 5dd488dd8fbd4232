package tunnel

import (
	"log/slog"
	"net/netip"
	"sync/atomic"

	"ipipd/encap"
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
	"ipipd/ipsec"
	"ipipd/ipsec/esp"
)

// guard keeps a tunnel with a secret encrypted, or shut. It is there as long as
// the tunnel is; the Protector in it is for one pair of outer addresses, and is
// replaced with them. In between nothing is sealed, and so nothing is sent.
//
// Seal, plain, established and maxInner may be called by several goroutines, the
// others under the tunnel's mu.
type guard struct {
	manager *ipsec.Manager
	config  ipsec.Config // the addresses and the device follow the route
	gate    atomic.Pointer[ipsec.Protector]
	// drops are those of the Protectors that were, and of packets that there was
	// none for.
	drops  [esp.NumDrops]atomic.Uint64
	local  netip.Addr
	remote netip.Addr
	device int
}

// newGuard makes the guard of a tunnel, shut. log takes what an operator should
// know; changed is called when the tunnel should look at it again.
func newGuard(manager *ipsec.Manager, cfg *Config, log *slog.Logger, changed func()) (*guard, error) {
	config, err := cfg.IPsec.config()
	if err != nil {
		return nil, err
	}
	if len(config.Secret) < ipsec.WeakSecret {
		log.Warn("the secret is short: who answers once in the peer's place can test guesses of it offline",
			"remedy", "openssl rand -base64 32, the same at both ends")
	}
	g := &guard{manager: manager, config: config}
	g.config.Mark = cfg.FwMark
	g.config.Changed = changed
	g.config.Event = func(e ipsec.Event) {
		if e.Warning() {
			log.Warn(e.String())
		} else {
			log.Info(e.String())
		}
	}
	return g, nil
}

// follow has the guard be between these addresses, by that device.
func (g *guard) follow(local, remote [4]byte, device int) error {
	l, r := address(local), address(remote)
	if g.gate.Load() != nil && l == g.local && r == g.remote && device == g.device {
		return nil
	}
	g.close()
	g.config.Local, g.config.Remote, g.config.Device = l, r, device
	gate, err := g.manager.Protect(g.config)
	if err != nil {
		return err
	}
	g.local, g.remote, g.device = l, r, device
	g.gate.Store(gate)
	return nil
}

// close shuts the guard, and tells the peer that its SAs are gone.
func (g *guard) close() {
	if gate := g.gate.Swap(nil); gate != nil {
		gate.Close()
		for d, n := range gate.Drops {
			g.drops[d].Add(n)
		}
	}
}

// Seal encrypts an outer packet in place, or says why it must not be sent, and
// has counted it then.
func (g *guard) Seal(b *packet.Buffer) esp.Drop {
	if gate := g.gate.Load(); gate != nil {
		return gate.Seal(b)
	}
	g.drops[esp.DropNoSA].Add(1)
	return esp.DropNoSA
}

// plain counts a packet of the peer that was not encrypted.
func (g *guard) plain() {
	if gate := g.gate.Load(); gate != nil {
		gate.Plain()
		return
	}
	g.drops[esp.DropPlain].Add(1)
}

func (g *guard) established() bool {
	gate := g.gate.Load()
	return gate != nil && gate.Established()
}

// maxInner is the largest inner packet that fits a path with that MTU.
func (g *guard) maxInner(mtu int) int {
	if gate := g.gate.Load(); gate != nil {
		return gate.MaxInner(mtu)
	}
	return ipsec.MaxInner(g.config, mtu)
}

// sent reports whether an ICMP error is about a packet of the SA in use.
func (g *guard) sent(e *encap.OuterError) bool {
	s := g.status()
	return sentBy(&s, e)
}

// sentBy is sent, of an SA. Only the two ends and those between them know the SPI, which
// an error has to quote; 0 is none (RFC 4303, section 2.1).
func sentBy(s *ipsec.Status, e *encap.OuterError) bool {
	protocol := uint8(ipv4.ProtocolESP)
	if s.UDP {
		protocol = ipv4.ProtocolUDP
	}
	return s.Established && e.Protocol == protocol && e.SPI != 0 && e.SPI == s.OutboundSPI
}

// status is what an operator is shown.
func (g *guard) status() (s ipsec.Status) {
	if gate := g.gate.Load(); gate != nil {
		s = gate.Status()
	}
	return s
}

// addTo adds reason → count to m: what this tunnel lost, and ESP packets that belong
// to no tunnel, which are the process's and shown with each.
func (g *guard) addTo(m map[string]uint64) {
	add := func(d esp.Drop, n uint64) {
		if n > 0 {
			m[d.String()] += n
		}
	}
	for d := range g.drops {
		add(esp.Drop(d), g.drops[d].Load())
	}
	if gate := g.gate.Load(); gate != nil {
		for d, n := range gate.Drops {
			add(d, n)
		}
	}
	for d, n := range g.manager.Drops {
		add(d, n)
	}
}

// protector is the Manager of the process's guards, made when it is first asked for.
func (h *Host) protector() *ipsec.Manager {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.ipsec == nil {
		h.ipsec = ipsec.NewManager(ipsec.Options{Serve: h.serveSealed})
	}
	return h.ipsec
}

// serveSealed has a thread carry what comes in by one of the ways of ESP.
func (h *Host) serveSealed(receiver ipsec.Receiver) {
	sender, index := h.socket.NewSender(), int(h.sealedReceivers.Add(1))-1
	h.spawn("receive ESP", func() error { return h.inbound(receiver, sender, index, arrivedSealed) },
		func(err error) { h.failTunnels(err, func(t *Tunnel) bool { return t.guard != nil }) })
}
