package tunnel

import (
	"encoding/binary"
	"net/netip"

	"ipipd/internal/warning"
	"ipipd/keepalive"
)

// cgn is the shared address space of carrier-grade NAT (RFC 6598).
var cgn = netip.MustParsePrefix("100.64.0.0/10")

// IsPublic reports whether an address is globally routable: not of RFC 1918 or RFC 6598, and
// neither link-local nor loopback.
func IsPublic(a netip.Addr) bool {
	return !a.IsPrivate() && !cgn.Contains(a) && !a.IsLinkLocalUnicast() && !a.IsLoopback()
}

// ReflectsBehindNAT reports whether the local address is private and the remote is not, which means a NAT,
// and c has reflect probes. It translates the outer header only: the inner destination of a reflect probe
// stays the private address, to which the peer has no route.
func ReflectsBehindNAT(c *Config, local, remote netip.Addr) bool {
	return c.keepalive().Interval != 0 && c.KeepaliveProbe == keepalive.FormReflect && !IsPublic(local) && IsPublic(remote)
}

// noteReflect notes what a reflect probe of the peer says: its destination is the peer's own address, big-endian in
// peerInside, where 0 is the remote. Whoever can forge the peer's source can forge it: nothing but a warning follows.
func (t *Tunnel) noteReflect(destination, remote [4]byte) {
	t.peerProbes.Store(true)
	if destination == remote {
		destination = [4]byte{}
	}
	t.peerInside.Store(binary.BigEndian.Uint32(destination[:]))
}

// warnPeerBehindNAT warns that only the peer's own probes keep the tunnel running: in those of this end the source
// is the peer's public address, which is not its own.
func (c *control) warnPeerBehindNAT(unanswered bool) {
	var inside [4]byte
	binary.BigEndian.PutUint32(inside[:], c.peerInside.Load())
	c.warnIf(unanswered && inside != [4]byte{} && c.cfg.KeepaliveProbe == keepalive.FormReflect, warning.PeerBehindNAT,
		"its probe says that it is %v, and comes from %v", address(inside), c.remote)
}
