package tunnel

import (
	"errors"
	"maps"
	"sync"
	"sync/atomic"

	"ipipd/encap"
	"ipipd/internal/drop"
	"ipipd/internal/fastpath"
	"ipipd/internal/ipv4"
	"ipipd/internal/netstate"
	"ipipd/internal/underlay"
)

// Many remotes without a local-address, as Linux's tunl0: the outer source is the one that the host's route to each
// remote prefers, and what comes for any address of this host is received. path.Local stays zero, so that the
// kernel routes as that route was looked up; a packet to an inner destination gets its source from the kernel, too.

// receiveOnly reports whether c is of an interface that never sends: the real server of a load balancer.
func (c *Config) receiveOnly() bool {
	return c.many() && !c.LocalAddress.IsValid() && len(c.AcceptTo) > 0
}

// anyLocal reports whether the outer source is that of the route to each remote.
func (r *route) anyLocal() bool { return r.many && r.path.Local == [4]byte{} }

// takeSource has next, the route to a remote, take its outer source from the network's answer.
func (c *control) takeSource(next *route, a *netstate.Answer) {
	switch {
	case next.txDrop != drop.None || a.Err != nil:
	case c.intoItself(&a.Route): // the source would be an inner address, and the loop not be recognized
		next.txDrop = drop.Loop
	default:
		next.outer.Local = a.Route.Source
	}
}

// storeSources stores the outer sources of routes, by which loops recognizes an outer packet.
func (m *remotes) storeSources(routes map[[4]byte]*route) {
	sources, now := map[[4]byte]bool{}, *m.sources.Load()
	for _, r := range routes {
		if r.anyLocal() && r.outer.Local != [4]byte{} {
			sources[r.outer.Local] = true
		}
	}
	if !maps.Equal(sources, now) {
		m.sources.Store(&sources)
	}
}

// loops reports whether inner, to a remote, is an outer packet of this tunnel.
func (m *remotes) loops(inner ipv4.Packet, remote [4]byte) bool {
	return inner.Protocol() == ipv4.ProtocolIPIP && encap.LoopsFrom(inner, *m.sources.Load(), remote)
}

// quotesOtherSource reports whether an ICMP error quotes another outer source than that of a route, which may be nil.
func (r *route) quotesOtherSource(e *encap.OuterError) bool {
	return r != nil && r.outer.Local != [4]byte{} && e.Source != r.outer.Local
}

// fromLocal returns path with another local address: a probe is answered from the address that it came to.
func fromLocal(path *underlay.Path, local [4]byte) *underlay.Path {
	if path.Local == local {
		return path
	}
	from := *path
	from.Local = local
	return &from
}

// addresses follows this host's addresses, at which the fast path receives for the tunnel without a local-address.
type addresses struct {
	once     sync.Once // calls followAddresses
	follower AddressFollower
	// full is why the fast path does not receive at all of them; nil if it does.
	full atomic.Pointer[error]
}

// followAddresses keeps the fast path informed of this host's addresses, from the first tunnel that needs it on.
func (e *Engine) followAddresses(fast *fastpath.FastPath) {
	e.addresses.follower = e.network.FollowAddresses(func(all [][4]byte) {
		var full *error
		if err := fast.SetLocalAddresses(all); err != nil && !errors.Is(err, fastpath.ErrClosed) {
			full = &err
		}
		if old := e.addresses.full.Swap(full); old == nil && full == nil {
			return
		}
		if t := e.table.Load().find([4]byte{}, anyRemote); t != nil {
			t.wakeControl()
		}
	})
}
