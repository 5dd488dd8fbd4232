package tunnel

import (
	"net/netip"

	"ipipd/keepalive"
)

// cgn is the shared address space of carrier-grade NAT (RFC 6598).
var cgn = netip.MustParsePrefix("100.64.0.0/10")

// IsPublic reports whether an address is globally routable: not of RFC 1918 or RFC 6598, and
// neither link-local nor loopback.
func IsPublic(a netip.Addr) bool {
	return !a.IsPrivate() && !cgn.Contains(a) && !a.IsLinkLocalUnicast() && !a.IsLoopback()
}

// warnNAT warns if the local address is private and the remote is not, which means a NAT. It
// translates the outer header only: the inner destination of a reflect probe stays the private
// address, to which the peer has no route.
func (t *Tunnel) warnNAT() {
	path := &t.route.Load().path
	local, remote := address(path.Local), address(path.Remote)
	if t.config.Load().Keepalive.Interval == 0 || t.config.Load().KeepaliveProbe != keepalive.FormReflect || IsPublic(local) || !IsPublic(remote) {
		return
	}
	t.log.Warn("the local address is private and the remote is not: behind a NAT nobody but ipipd answers reflect probes",
		"local-address", local, "remote-address", remote,
		"remedy", "--keepalive-probe echo --keepalive-target with the peer's inner address")
}
