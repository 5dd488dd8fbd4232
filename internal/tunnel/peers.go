package tunnel

import (
	"maps"
	"net/netip"
	"slices"

	"ipipd/internal/fib"
	"ipipd/internal/netstate"
)

// Peers are routes with a gateway that the configuration of a tunnel with many remotes has. They are added,
// replaced and removed as its other routes are, but there may be thousands: which of them somebody has
// removed is known from the mirror of the routes, and only these are added again.

// peers returns the Routes that have a gateway.
func (c *Config) peers() []netstate.InterfaceRoute { return c.routesWith(true) }

// plainRoutes returns the Routes without a gateway.
func (c *Config) plainRoutes() []netstate.InterfaceRoute { return c.routesWith(false) }

func (c *Config) routesWith(gateway bool) (routes []netstate.InterfaceRoute) {
	for _, r := range c.Routes {
		if r.Gateway.IsValid() == gateway {
			routes = append(routes, r)
		}
	}
	return routes
}

// validateRoutes checks that the kernel can have all of Routes.
func (c *Config) validateRoutes() error {
	routes := make(map[netstate.InterfaceRoute]bool, len(c.Routes))
	for _, r := range c.Routes {
		switch twice := routes[r.Slot()]; {
		case twice && r.Gateway.IsValid():
			return &ValueError{Property: "peers", Value: peerText(r), Want: "each network once, here or as a route"}
		case twice:
			return &ValueError{Property: "route", Value: r.String(), Want: "each route once"}
		}
		routes[r.Slot()] = true
	}
	return nil
}

// peers is what the mirror of the routes knows of the configured peers. The mu of remotes guards it.
type peers struct {
	gateways map[netip.Prefix][4]byte
	// lost has the prefixes whose route the kernel has not: it was removed, or replaced by another one.
	lost map[netip.Prefix]bool
	news bool // a route was lost since takeLost
}

// setPeers takes the peers of a Config. A lost one stays lost: a change adds only routes that are new in the Config.
func (m *remotes) setPeers(cfg *Config) {
	gateways := map[netip.Prefix][4]byte{}
	for _, r := range cfg.Routes {
		if r.Gateway.IsValid() {
			gateways[r.Prefix] = r.Gateway.As4()
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	maps.DeleteFunc(m.peers.lost, func(p netip.Prefix, _ bool) bool { return gateways[p] != m.peers.gateways[p] })
	m.peers.gateways = gateways
}

// note notes whether the route of a peer is there, in the table that it is added to, and reports whether it is lost.
func (p *peers) note(change *netstate.RouteChange) bool {
	gateway, ours := p.gateways[change.Prefix]
	if !ours {
		return false
	}
	if slices.ContainsFunc(change.Routes, func(r fib.Route) bool {
		return r.Protocol == netstate.RouteProtocolPeer && r.Metric == 0 && slices.ContainsFunc(r.Hops, func(h fib.Hop) bool { return h.Gateway == gateway })
	}) {
		delete(p.lost, change.Prefix)
		return false
	}
	if p.lost == nil {
		p.lost = map[netip.Prefix]bool{}
	}
	p.lost[change.Prefix], p.news = true, true
	return true
}

// takeLost reports whether the route of a peer was lost since the last call.
func (m *remotes) takeLost() (news bool) {
	if m == nil {
		return false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	news, m.peers.news = m.peers.news, false
	return news
}

// withoutPresent returns routes without the peers' routes that the kernel has.
func (m *remotes) withoutPresent(routes []netstate.InterfaceRoute) []netstate.InterfaceRoute {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.peers.gateways) == 0 {
		return routes
	}
	var absent []netstate.InterfaceRoute
	for _, r := range routes {
		if !r.Gateway.IsValid() || m.peers.lost[r.Prefix] {
			absent = append(absent, r)
		}
	}
	return absent
}
