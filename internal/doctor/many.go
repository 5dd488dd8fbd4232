package doctor

import (
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"ipipd/internal/netstate"
	"ipipd/internal/tunnel"
)

// A tunnel whose remote-address is any has no remote to probe: what is wrong with it shows in the routes out of
// its interface, whose gateways are its remotes.

const (
	// maxRemotes is how many remotes of a tunnel are looked up.
	maxRemotes = 256
	// maxNamed is how many of them a finding names.
	maxNamed = 3
)

// isMany reports whether the tunnel has many remotes.
func (s *subject) isMany() bool { return s.Config.RemoteAddress == tunnel.AnyRemote }

// remotes checks the tunnels with many remotes.
func (e *examination) remotes() {
	for _, s := range e.tunnels {
		if s.isMany() {
			e.manyLocal(s)
			e.manyWays(s)
			e.manyFilter(s)
		}
	}
}

// manyLocal says if this host lacks the local address, or if another tunnel receives packets for it, too.
func (e *examination) manyLocal(s *subject) {
	if s.local.IsValid() {
		if a, err := e.Network(netstate.Query{Local: s.local.As4(), Mark: s.Config.FwMark, UnderlayDevice: s.Config.UnderlayDevice}); err != nil {
			e.skip(s, "the host's network cannot be read: %v", err)
		} else if !a.HasLocal {
			e.noLocalAddress(s)
		}
	}
	e.manyOthers(s)
	kernel, err := e.KernelTunnels()
	if err != nil {
		return // said by samePair
	}
	for _, k := range kernel {
		same := !k.Local.IsValid() || k.Local.IsUnspecified() || k.Local == s.local
		if i := e.interfaces[k.Name]; same && k.Remote.IsUnspecified() && i.Flags&net.FlagUp != 0 {
			e.found(SamePair, s, fmt.Sprintf("the kernel's tunnel %s is up, and takes packets of any remote, too", k.Name),
				"both get each packet, and the kernel's hands in what this one drops", "ip link set "+quote(k.Name)+" down")
		}
	}
}

// manyOthers says if another tunnel with many remotes has the same local address.
func (e *examination) manyOthers(s *subject) {
	local, has, which := s.local.String(), "the local-address of ", ": "+s.local.String()
	if !s.local.IsValid() {
		local, has, which = netip.IPv4Unspecified().String(), "no local-address, as ", ""
	}
	for i := range e.others {
		if o := &e.others[i]; o.CurrentRemoteAddress == tunnel.AnyRemote && cmp.Or(o.CurrentLocalAddress, netip.IPv4Unspecified().String()) == local {
			e.found(SamePair, s, fmt.Sprintf("it has %s%s, whose remote-address is any as well%s", has, o.Name(), which),
				"both receive each packet", "ipipd down "+quote(o.Name())+", or another --local-address")
		}
	}
}

// manyRoutes says what is wrong with the routes, and looks the remotes up.
func (e *examination) manyRoutes(s *subject) {
	routes := e.routesInto(s)
	running := s.running()
	e.routesMTU(s)
	if !running {
		for _, r := range s.Config.Routes {
			routes = append(routes, netstate.RouteMetrics{Prefix: r.Prefix, Gateway: r.Gateway})
		}
	}
	var plain, unusable []string
	prefixes := map[netip.Addr]netip.Prefix{}
	var gateways []netip.Addr
	for _, r := range routes {
		switch {
		case r.Unusable:
			unusable = append(unusable, r.Prefix.String())
		case !r.Gateway.IsValid():
			plain = append(plain, r.Prefix.String())
		default:
			if _, ok := prefixes[r.Gateway]; !ok {
				gateways, prefixes[r.Gateway] = append(gateways, r.Gateway), r.Prefix
			}
		}
	}
	if running && len(routes) == 0 && len(s.Config.AcceptTo) == 0 {
		e.found(NoRemotes, s, "nothing is routed into "+s.ifname+": it has no remotes", "the gateways of its routes are its remotes, and only these may send",
			fmt.Sprintf("ip route add PREFIX via REMOTE dev %s onlink, or peers; see docs/many-remotes.md", s.ifname))
	}
	if len(unusable) > 0 {
		e.found(GatewayNotUsable, s, fmt.Sprintf("the route of %s names a gateway that is no IPv4 address of a host, or an encapsulation", named(unusable)),
			"packets by it are dropped (remote-not-usable)", fmt.Sprintf("ip route replace %s via REMOTE dev %s onlink", unusable[0], s.ifname))
	}
	if s.encrypted && len(plain) > 0 {
		e.found(RouteWithoutGateway, s, fmt.Sprintf("there is an ipsec-secret, and the route of %s has no gateway", named(plain)),
			"there is an SA with gateways only: packets by it are dropped", fmt.Sprintf("ip route replace %s via REMOTE dev %s onlink", plain[0], s.ifname))
	}
	if len(gateways) > maxRemotes {
		e.skip(s, "the ways to the first %d of %d remotes are looked up: ipipd print --remotes %s has the state of all", maxRemotes, len(gateways), s.name)
		gateways = gateways[:maxRemotes]
	}
	for _, g := range gateways {
		one, err := e.lookUpOne(s, g)
		if err != nil {
			e.skip(s, "the host's network cannot be read: %v", err)
			return
		}
		one.prefix = prefixes[g]
		s.remotes = append(s.remotes, one)
	}
	for _, p := range s.Config.AcceptFrom {
		if _, ok := prefixes[p.Addr()]; ok || p.Bits() < 32 || len(s.senders) == maxRemotes {
			continue
		}
		one, err := e.lookUpOne(s, p.Addr())
		if err != nil {
			e.skip(s, "the host's network cannot be read: %v", err)
			return
		}
		s.senders = append(s.senders, one)
	}
}

// lookUpOne returns the subject of one of many remotes.
func (e *examination) lookUpOne(s *subject, remote netip.Addr) (*subject, error) {
	var routes []netstate.InterfaceRoute // those that matter: a tunnel may have thousands
	for _, r := range s.Config.Routes {
		if r.Prefix.Contains(remote) {
			routes = append(routes, r)
		}
	}
	one := &subject{Tunnel: s.Tunnel, name: s.name, ifname: s.ifname, local: s.local, remote: remote, encrypted: s.encrypted}
	return one, e.lookUp(one, routes)
}

// manyWays says which remotes outer packets do not reach, and why.
func (e *examination) manyWays(s *subject) {
	type fault struct {
		texts []string
		do    string
	}
	var noPath, own, loop, filtered fault
	add := func(f *fault, one *subject, do string) {
		f.texts = append(f.texts, fmt.Sprintf("%v (of %v)", one.remote, one.prefix))
		f.do = cmp.Or(f.do, do)
	}
	strictBy, index := "", e.interfaces[s.ifname].Index
	for _, one := range s.remotes {
		a := one.answer
		switch {
		case a.Err != nil:
			add(&noPath, one, noRoute(one.remote, a.Err).Do)
		case a.Route.Local:
			add(&own, one, fmt.Sprintf("the other end's address in its place: ip route replace %v via REMOTE dev %s onlink", one.prefix, s.ifname))
		case index != 0 && a.Route.Device == index, a.Loop != (netstate.InterfaceRoute{}):
			add(&loop, one, tunnel.RouteLoop(a, one.remote, index != 0 && a.Route.Device == index).Do)
		default:
			if from, strict := e.strict(one.device()); strict && a.ReturnDevice != a.Route.Device {
				strictBy = from
				add(&filtered, one, "sysctl "+from+"=2")
			}
		}
	}
	for _, f := range []struct {
		fault
		what, why string
		code      Code
	}{
		{noPath, "there is no route to %s", "nothing can be sent there", NoRoute},
		{own, "an address of this host is a remote: %s", "a tunnel leads to another host", RemoteIsLocal},
		{loop, "the route to %s leads into " + s.ifname + " itself", "outer packets are encapsulated again, and dropped (loop)", RouteLoop},
		{filtered, "rp_filter is strict (" + strictBy + "), and the route back is another one, of %s", "the kernel drops what these send", RPFilterUnderlay},
	} {
		if len(f.texts) > 0 {
			e.found(f.code, s, fmt.Sprintf(f.what, named(f.texts)), f.why, f.do)
		}
	}
}

// manyFilter says if rp_filter drops what accept-from lets in.
func (e *examination) manyFilter(s *subject) {
	if len(s.Config.AcceptFrom) == 0 && !s.Config.AcceptAnyPeer {
		return // the tunnel itself drops what rp_filter would
	}
	ifname := s.ifname
	if !s.running() {
		ifname = "default" // what it will have
	}
	if from, strict := e.strict(ifname); strict {
		e.found(RPFilterTunnel, s, fmt.Sprintf("rp_filter is strict on the tunnel's interface (%s), and accept-from lets in inner sources that are not routed into it", from),
			"the kernel drops these", "sysctl "+from+"=2, or 0 where there is no default route")
	}
}

// named joins the first of all, and counts the others.
func named(all []string) string {
	if len(all) <= maxNamed {
		return strings.Join(all, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(slices.Clip(all[:maxNamed]), ", "), len(all)-maxNamed)
}
