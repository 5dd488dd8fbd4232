package tunnel

import (
	"log/slog"
	"net/netip"
	"sync/atomic"

	"ipipd/encap"
	"ipipd/internal/ipsec"
	"ipipd/internal/ipsec/esp"
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
)

// ipsecPolicy keeps a tunnel with a secret encrypted, or shut. It is there as long as
// the tunnel is; the Session in it is for one pair of outer addresses, and is
// replaced with them. In between nothing is sealed, and so nothing is sent.
//
// Seal, plain, established and maxInner may be called by several goroutines, the
// others under the tunnel's mu.
type ipsecPolicy struct {
	manager *ipsec.Manager
	config  ipsec.Config // the addresses and the device follow the route
	session atomic.Pointer[ipsec.Session]
	// drops are those of the Protectors that were, and of packets that there was
	// none for.
	drops  [esp.NumDrops]atomic.Uint64
	local  netip.Addr
	remote netip.Addr
	device int
}

// newIPsecPolicy makes the guard of a tunnel, shut. log takes what an operator should
// know; changed is called when the tunnel should look at it again.
func newIPsecPolicy(manager *ipsec.Manager, cfg *Config, log *slog.Logger, changed func()) (*ipsecPolicy, error) {
	config, err := cfg.IPsec.config()
	if err != nil {
		return nil, err
	}
	if len(config.Secret) < ipsec.WeakSecret {
		log.Warn("the secret is short: who answers once in the peer's place can test guesses of it offline",
			"remedy", "openssl rand -base64 32, the same at both ends")
	}
	g := &ipsecPolicy{manager: manager, config: config}
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

// rebind has the guard be between these addresses, by that device.
func (g *ipsecPolicy) rebind(local, remote [4]byte, device int) error {
	l, r := address(local), address(remote)
	if g.session.Load() != nil && l == g.local && r == g.remote && device == g.device {
		return nil
	}
	g.close()
	g.config.Local, g.config.Remote, g.config.Device = l, r, device
	session, err := g.manager.Protect(g.config)
	if err != nil {
		return err
	}
	g.local, g.remote, g.device = l, r, device
	g.session.Store(session)
	return nil
}

// close shuts the guard, and tells the peer that its SAs are gone.
func (g *ipsecPolicy) close() {
	if session := g.session.Swap(nil); session != nil {
		session.Close()
		for d, n := range session.Drops {
			g.drops[d].Add(n)
		}
	}
}

// Seal encrypts an outer packet in place, or says why it must not be sent, and
// has counted it then.
func (g *ipsecPolicy) Seal(b *packet.Buffer) esp.Drop {
	if session := g.session.Load(); session != nil {
		return session.Seal(b)
	}
	g.drops[esp.DropNoSA].Add(1)
	return esp.DropNoSA
}

// countCleartext counts a packet of the peer that was not encrypted.
func (g *ipsecPolicy) countCleartext() {
	if session := g.session.Load(); session != nil {
		session.CountCleartext()
		return
	}
	g.drops[esp.DropCleartext].Add(1)
}

func (g *ipsecPolicy) established() bool {
	session := g.session.Load()
	return session != nil && session.Established()
}

// maxInner is the largest inner packet that fits a path with that MTU.
func (g *ipsecPolicy) maxInner(mtu int) int {
	if session := g.session.Load(); session != nil {
		return session.MaxInner(mtu)
	}
	return ipsec.MaxInner(g.config, mtu)
}

// sent reports whether an ICMP error is about a packet of the SA in use.
func (g *ipsecPolicy) sent(e *encap.OuterError) bool {
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
func (g *ipsecPolicy) status() (s ipsec.Status) {
	if session := g.session.Load(); session != nil {
		s = session.Status()
	}
	return s
}

// addTo adds reason → count to m: what this tunnel lost, and ESP packets that belong
// to no tunnel, which are the process's and shown with each.
func (g *ipsecPolicy) addTo(m map[string]uint64) {
	add := func(d esp.Drop, n uint64) {
		if n > 0 {
			m[d.String()] += n
		}
	}
	for d := range g.drops {
		add(esp.Drop(d), g.drops[d].Load())
	}
	if session := g.session.Load(); session != nil {
		for d, n := range session.Drops {
			add(d, n)
		}
	}
	for d, n := range g.manager.Drops {
		add(d, n)
	}
}

// protector is the Manager of the process's guards, made when it is first asked for.
func (h *Engine) protector() *ipsec.Manager {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.ipsec == nil {
		h.ipsec = ipsec.NewManager(ipsec.Options{Serve: h.serveSealed})
	}
	return h.ipsec
}

// serveSealed has a thread carry what comes in by one of the ways of ESP.
func (h *Engine) serveSealed(receiver ipsec.Receiver) {
	sender, index := h.socket.NewSender(), int(h.sealedReceivers.Add(1))-1
	h.spawn("receive ESP", func() error { return h.inbound(receiver, sender, index, fromESP) },
		func(err error) { h.failTunnels(err, func(t *Tunnel) bool { return t.ipsecPolicy != nil }) })
}
