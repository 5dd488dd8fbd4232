package tunnel

import (
	"net/netip"

	"ipipd/keepalive"
)

// cgn is the shared address space of carrier-grade NAT (RFC 6598).
var cgn = netip.MustParsePrefix("100.64.0.0/10")

// routed reports whether an address can be one of the Internet's: not of RFC 1918, RFC
// 6598, this link or this host.
func routed(a netip.Addr) bool {
	return !a.IsPrivate() && !cgn.Contains(a) && !a.IsLinkLocalUnicast() && !a.IsLoopback()
}

// warnOfNAT says it when the peer cannot answer our probes: there is a NAT between a
// private address and a public one. It translates the outer header only, so that the
// inner destination of a reflect probe stays the private address, to which the peer
// has no route.
func (t *Tunnel) warnOfNAT() {
	path := &t.route.Load().path
	local, remote := address(path.Local), address(path.Remote)
	if t.cfg.Keepalive.Interval == 0 || t.cfg.KeepaliveProbe != keepalive.FormReflect || routed(local) || !routed(remote) {
		return
	}
	t.log.Warn("the local address is private and the remote is not: behind a NAT nobody but ipipd answers reflect probes",
		"local-address", local, "remote-address", remote,
		"remedy", "--keepalive-probe echo --keepalive-target with the peer's inner address")
}
