package doctor

import (
	"fmt"
	"net/netip"

	"ipipd/internal/netstate"
	"ipipd/internal/tunnel"
)

// Outer are the outer addresses of a tunnel; an invalid one is not known.
type Outer struct {
	Name          string
	Local, Remote netip.Addr
}

// OuterOf returns the outer addresses that a tunnel has now.
func OuterOf(s *tunnel.Status) Outer {
	local, _ := netip.ParseAddr(s.CurrentLocalAddress)
	remote, _ := netip.ParseAddr(s.CurrentRemoteAddress)
	return Outer{s.Name(), local, remote}
}

// known reports whether both addresses are known.
func (o *Outer) known() bool {
	return o.Local.IsValid() && o.Remote.IsValid() && !o.Local.IsUnspecified() && !o.Remote.IsUnspecified()
}

// SamePairs calls found for each of tunnels that has the outer addresses of another of them, of one of others, or of a
// tunnel of the kernel, which without a local address has every one.
func SamePairs(tunnels, others []Outer, kernel []netstate.KernelTunnel, found func(i int, what, why, do string)) {
	type pair struct{ local, remote netip.Addr }
	taken := map[pair]string{}
	for _, o := range others {
		taken[pair{o.Local, o.Remote}] = o.Name
	}
	for i, t := range tunnels {
		if !t.known() {
			continue
		}
		p := pair{t.Local, t.Remote}
		if other, ok := taken[p]; ok {
			found(i, fmt.Sprintf("it has the same outer addresses as %s: %v and %v", other, t.Local, t.Remote),
				"packets of the peer are received twice, or by the wrong one", "ipipd down "+quote(other)+", or another --local-address")
		}
		taken[p] = t.Name
	}
	first := map[pair]string{}
	for _, k := range kernel {
		local := k.Local
		if local.IsUnspecified() {
			local = netip.Addr{}
		}
		first[pair{local, k.Remote}] = k.Name
	}
	for i, t := range tunnels {
		if !t.known() {
			continue
		}
		name, ok := first[pair{t.Local, t.Remote}]
		if !ok {
			name, ok = first[pair{netip.Addr{}, t.Remote}]
		}
		if ok {
			found(i, fmt.Sprintf("the kernel's tunnel %s has the same outer addresses: %v and %v", name, t.Local, t.Remote),
				"both get each packet of the peer", "ip link delete "+name)
		}
	}
}
