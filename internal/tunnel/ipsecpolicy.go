package tunnel

import (
	"fmt"
	"log/slog"
	"net/netip"
	"sync/atomic"

	"ipipd/encap"
	"ipipd/internal/drop"
	"ipipd/internal/ipsec"
	"ipipd/internal/ipsec/ike"
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
)

// ipsecPolicy is the PROTECT policy (RFC 4301, section 4.4.1) of a tunnel with a secret: packets are
// encrypted or dropped. It lives as long as the tunnel. Its session is for one pair of outer
// addresses and is replaced with them; without a session all packets are dropped.
//
// Seal, established, quotesSA and status are safe for concurrent use. The other methods are control's.
type ipsecPolicy struct {
	manager *ipsec.Manager
	config  ipsec.Config // addresses and device as last rebound; Apply reads Secret
	session atomic.Pointer[ipsec.Session]
	// stopped are the sessions that were replaced and still have their UDP sockets: their local
	// address may come back.
	stopped []*ipsec.Session

	local  netip.Addr
	remote netip.Addr
	device int

	sas atomic.Uint64 // pairs of SAs that were established

	// remotes has the sessions of a tunnel with many remotes, which has none here; nil for any other tunnel.
	remotes *ipsecRemotes
}

// newIPsecPolicy returns a policy without a session. changed is called after an SA was established
// or lost, or maxInner may have changed; dropped, with received ESP packets that an SA of the
// tunnel refused. Neither may block.
func newIPsecPolicy(manager *ipsec.Manager, cfg *Config, secret ike.Secret, log *slog.Logger, changed func(), dropped func(drop.Reason, int)) *ipsecPolicy {
	p := &ipsecPolicy{manager: manager, config: ipsec.Config{Config: cfg.IPsec.config(secret)}}
	p.config.Mark = cfg.FwMark
	p.config.Changed, p.config.Dropped, p.config.SAs = changed, dropped, &p.sas
	p.config.Event = func(e ipsec.Event) {
		if e.Warning() {
			log.Warn(e.String())
		} else {
			log.Info(e.String())
		}
	}
	return p
}

// rebind replaces the session unless it is already for these outer addresses and that underlay
// device (an ifindex, 0 is any).
func (p *ipsecPolicy) rebind(local, remote [4]byte, device int) error {
	l, r := address(local), address(remote)
	if p.session.Load() != nil && l == p.local && r == p.remote && device == p.device {
		return nil
	}
	if old := p.session.Swap(nil); old != nil {
		old.Stop()
		p.stopped = append(p.stopped, old)
	}
	p.config.Local, p.config.Remote, p.config.Device = l, r, device
	session, err := p.manager.Protect(p.config)
	if err != nil && len(p.stopped) > 0 { // a stopped one may have the ports, bound to another device
		p.closeStopped(0)
		session, err = p.manager.Protect(p.config)
	}
	if err != nil {
		return err
	}
	p.closeStopped(1)
	p.local, p.remote, p.device = l, r, device
	p.session.Store(session)
	return nil
}

// close ends the session, if there is one, and deletes its SAs at the peer.
func (p *ipsecPolicy) close() {
	if p.remotes != nil {
		p.remotes.close()
	}
	if session := p.session.Swap(nil); session != nil {
		session.Close()
	}
	p.closeStopped(0)
}

// closeStopped closes the stopped sessions but the last kept of them.
func (p *ipsecPolicy) closeStopped(kept int) {
	for len(p.stopped) > kept {
		p.stopped[0].Close()
		p.stopped = p.stopped[1:]
	}
}

// Seal encrypts an outer packet in place. Unless it returns drop.None, the packet must not be sent.
func (p *ipsecPolicy) Seal(b *packet.Buffer) drop.Reason {
	if p.remotes != nil {
		return p.remotes.seal(b)
	}
	if session := p.session.Load(); session != nil {
		return session.Seal(b)
	}
	return drop.ESPNoSA
}

// established reports whether there is an SA. With many remotes it is always true: a packet has one negotiated.
func (p *ipsecPolicy) established() bool {
	if p.remotes != nil {
		return true
	}
	session := p.session.Load()
	return session != nil && session.Established()
}

// maxInner is the largest inner packet in bytes that a path of that MTU takes unfragmented: by the
// current or last SA, or before the first one the worst case of the proposals.
func (p *ipsecPolicy) maxInner(mtu int) int {
	if session := p.session.Load(); session != nil {
		return session.MaxInner(mtu)
	}
	return ipsec.MaxInner(p.config, mtu)
}

// quotesSA reports whether an ICMP error quotes a packet of the current outbound SA.
func (p *ipsecPolicy) quotesSA(e *encap.OuterError) bool {
	s := p.status()
	return quotesSPI(&s, e)
}

// quotesSPI reports whether an ICMP error quotes the SA's protocol and SPI. Only the two ends and
// the path between them know the SPI. 0 is no SPI (RFC 4303, section 2.1).
func quotesSPI(s *ipsec.Status, e *encap.OuterError) bool {
	protocol := uint8(ipv4.ProtocolESP)
	if s.UDP {
		protocol = ipv4.ProtocolUDP
	}
	return s.Established && e.Protocol == protocol && e.SPI != 0 && e.SPI == s.OutboundSPI
}

// status returns the status of the session; the zero Status without one.
func (p *ipsecPolicy) status() (s ipsec.Status) {
	if session := p.session.Load(); session != nil {
		s = session.Status()
	}
	return s
}

// serveESP has a worker read an ESP receiver, protocol 50 or ESP in UDP, until stop.
func (e *Engine) serveESP(receiver ipsec.Receiver) (stop func(), err error) {
	w := e.workers[int(e.espReceivers.Add(1)-1)%len(e.workers)].in
	key := w.add(&inbound{engine: e, receiver: receiver, from: fromESP,
		fail: func(err error) { e.failTunnels(err, func(t *Tunnel) bool { return t.ipsecPolicy != nil }) }})
	if err := receiver.Watch(func(fd int) error { return w.watch(fd, key) }); err != nil {
		w.remove(key)
		return nil, fmt.Errorf("wait for ESP: %w", err)
	}
	return func() { w.remove(key) }, nil
}
