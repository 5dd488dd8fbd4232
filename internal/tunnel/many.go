package tunnel

import (
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"

	"ipipd/encap"
	"ipipd/internal/drop"
	"ipipd/internal/fastpath"
	"ipipd/internal/fib"
	"ipipd/internal/ipv4"
	"ipipd/internal/netstate"
	"ipipd/internal/packet"
	"ipipd/keepalive"
)

// A tunnel whose remote-address is any, as Linux's tunl0: the gateways of the kernel's routes out of its
// interface are its remotes. A RouteFollower mirrors the routes in a fib.Table, which says to which remote an
// inner packet goes, and which remote may send one. The tunnel's route has no remote; the kernel routes each outer packet.

// AnyRemote is the RemoteAddress of a tunnel with many remotes.
const AnyRemote = "any"

// remadeMany is the Property.Remade of RemoteAddress.
const remadeMany = "between any and one remote: the routes of the interface mean something else then"

// many reports whether the routes of the interface say where a packet goes.
func (c *Config) many() bool { return c.RemoteAddress == AnyRemote }

// keepalive resolves Keepalive: with many remotes it is off by default, as the silence of one means nothing.
func (c *Config) keepalive() keepalive.Config {
	if c.many() && c.Keepalive == keepalive.Default {
		return keepalive.Config{}
	}
	return c.Keepalive
}

// anyRemote stands for all remotes in Engine.table: no packet can come from it.
var anyRemote = [4]byte{255, 255, 255, 255}

// remotes is what the data path knows of the remotes of a tunnel with many.
type remotes struct {
	table  atomic.Pointer[fib.Table]
	accept atomic.Pointer[fib.Acceptance]
	// sources are the outer sources of routes, without a local-address.
	sources atomic.Pointer[map[[4]byte]bool]
	// routes has the routes to gateways of the table and to learnt remotes. To any other remote the tunnel's
	// own route leads: it is an inner destination without a state, or a new gateway.
	routes atomic.Pointer[routeTable]

	mu sync.Mutex
	// begun counts the RouteFollowers, so that a late call of an earlier one is ignored. known is closed by the
	// first call of the present one, which has all routes of the interface.
	begun int
	known chan struct{}
	// gatewayChanges are gateways of the table that came (true) or went, and changed those whose answer has changed,
	// since control has looked.
	gatewayChanges map[[4]byte]bool
	changed        map[[4]byte]bool
	peers          peers
	// fast is the table's copy in the kernel, set by control; nil is none. fastErr is why it is not up to date.
	fast    *fastpath.Routes
	fastErr error
}

func newRemotes(cfg *Config) *remotes {
	m := new(remotes)
	m.reset()
	m.accept.Store(cfg.acceptance())
	m.setPeers(cfg)
	return m
}

// reset empties the table for a new RouteFollower, and returns the number that its calls of follow must have.
func (m *remotes) reset() (begun int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.begun++
	m.known = make(chan struct{})
	m.closeCopyLocked()
	m.table.Store(new(fib.Table))
	m.routes.Store(newRouteTable(map[[4]byte]*route{}))
	m.sources.Store(&map[[4]byte]bool{})
	m.gatewayChanges, m.changed = map[[4]byte]bool{}, map[[4]byte]bool{}
	m.peers.lost = nil
	return m.begun
}

// follow enters changes of the interface's routes in the table, and reports whether control must act on them.
// It is called by one goroutine.
func (m *remotes) follow(begun int, changes []netstate.RouteChange) (wake bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if begun != m.begun {
		return false
	}
	e := m.table.Load().Edit()
	lost := false
	for _, change := range changes {
		e.Set(change.Prefix, change.Routes)
		lost = m.peers.note(&change) || lost
	}
	next, added, removed := e.Commit()
	m.table.Store(next)
	select {
	case <-m.known:
	default:
		close(m.known)
	}
	for _, g := range added {
		m.gatewayChanges[g] = true
	}
	for _, g := range removed {
		m.gatewayChanges[g] = false
	}
	behind := m.copyRoutesLocked(next, changes, added, removed)
	return lost || behind || len(added)+len(removed) > 0
}

// present returns a channel that is closed once the table has the routes of the present interface.
func (m *remotes) present() <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.known
}

// take returns gatewayChanges and changed, and empties them.
func (m *remotes) take() (news, changed map[[4]byte]bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	news, changed = m.gatewayChanges, m.changed
	m.gatewayChanges, m.changed = map[[4]byte]bool{}, map[[4]byte]bool{}
	return news, changed
}

// next is where a packet goes.
type next struct {
	inner  ipv4.Packet // zero if the packet is not valid
	entry  *fib.Entry
	remote [4]byte
	why    drop.Reason // why the packet is to be dropped: as of fib.Table.Remote
	route  *route      // nil if the remote has none of its own
}

// lookUp finds where each packet of a batch goes, each step for all of them in a loop of its own, so that the
// processor waits for the memory of several packets at once.
func (m *remotes) lookUp(batch []*packet.Buffer, to []next) {
	table, routes := m.table.Load(), m.routes.Load()
	for i, b := range batch {
		inner, err := ipv4.Parse(b.Bytes())
		if to[i] = (next{inner: inner}); err == nil { // else no entry of the batch before is left
			to[i].entry = table.Find(inner)
		}
	}
	for i := range batch {
		if n := &to[i]; n.inner.Bytes() != nil {
			n.remote, n.why = table.RemoteBy(n.entry, n.inner)
		}
	}
	for i := range batch {
		if i > 0 && to[i].remote == to[i-1].remote {
			to[i].route = to[i-1].route
		} else {
			to[i].route = routes.find(to[i].remote)
		}
	}
	for i := range batch {
		if r := to[i].route; r != nil && atomic.LoadUint32(&r.used) == 0 {
			atomic.StoreUint32(&r.used, 1)
		}
	}
}

// heard records a packet of a remote, as remote.heard, and returns the route to it; nil if it has none of its own.
func (m *remotes) heard(remote [4]byte, since int64) *route {
	r := m.routes.Load().find(remote)
	if r != nil {
		r.remote.heard.Store(since)
	}
	return r
}

// acceptance returns which remotes may send, and to which inner destinations.
func (c *Config) acceptance() *fib.Acceptance {
	return &fib.Acceptance{AnyPeer: c.AcceptAnyPeer, From: fib.NewPrefixes(c.AcceptFrom), To: fib.NewPrefixes(c.AcceptTo)}
}

// validateMany checks what remote-address any allows, and needs.
func (c *Config) validateMany() error {
	if !c.many() {
		switch {
		case c.AcceptAnyPeer || len(c.AcceptFrom) > 0:
			return &ValueError{Property: "accept-from", Value: formatAcceptFrom(c), Want: "remote-address any with it"}
		case len(c.AcceptTo) > 0:
			return &ValueError{Property: "accept-to", Value: join(c.AcceptTo), Want: "remote-address any with it"}
		case len(c.peers()) > 0:
			return &ValueError{Property: "peers", Value: peerText(c.peers()[0]), Want: "remote-address any with it"}
		}
		return nil
	}
	if c.LocalAddress.IsValid() {
		for _, r := range c.Routes {
			if r.Gateway == c.LocalAddress {
				return &ValueError{Property: "peers", Value: peerText(r), Want: "a remote other than local-address"}
			}
		}
	}
	if c.keepalive().Interval != 0 {
		return &ValueError{Property: "keepalive", Value: c.Keepalive.String(), Want: "off with remote-address any"}
	}
	switch {
	case !c.IPsec.Wanted():
	case !c.LocalAddress.IsValid():
		return &ValueError{Property: "local-address", Missing: true, Want: "the outer source for all remotes, with which IKE negotiates by ipsec-secret"}
	case c.IPsec.RemoteID != "":
		return &ValueError{Property: "ipsec-remote-id", Value: c.IPsec.RemoteID, Want: "none with remote-address any: the identity of each remote is its outer address"}
	}
	// Nobody is to run an open decapsulator (CVE-2020-10136).
	for _, p := range c.AcceptFrom {
		if p.Bits() < 32 && len(c.AcceptTo) == 0 {
			return &ValueError{Property: "accept-to", Missing: true, Want: "the inner destinations that all of " + p.String() + " may send to, as it is in accept-from"}
		}
	}
	return nil
}

// anyPeer is the value of accept-from for any gateway of a route.
const anyPeer = "any-peer"

func formatAcceptFrom(c *Config) string {
	if c.AcceptAnyPeer {
		return strings.TrimSuffix(anyPeer+","+join(c.AcceptFrom), ",")
	}
	return join(c.AcceptFrom)
}

// parsePrefixes appends the prefixes or addresses of v, separated by commas. On failure it returns wanted, with details.
func parsePrefixes(to []netip.Prefix, v, wanted string) (_ []netip.Prefix, want string) {
	for _, one := range strings.Split(v, ",") {
		if a, err := netip.ParseAddr(one); err == nil && a.Is4() {
			one += "/32"
		}
		p, want := parsePrefix(one, wanted)
		if want != "" {
			return to, want
		}
		to = append(to, p.Masked())
	}
	return to, ""
}

// accepts returns drop.None if a packet of remote may enter. broken is encap.Decapsulate's reason to drop it, which is
// returned only for a remote that may send. A probe has no inner source: any gateway of a route may send one.
func (m *remotes) accepts(remote [4]byte, inner ipv4.Packet, kind encap.Kind, broken drop.Reason) drop.Reason {
	table, accept := m.table.Load(), m.accept.Load()
	if kind == encap.KindData && broken == drop.None {
		return accept.Check(table, remote, inner.Source(), inner.Destination())
	}
	if why := accept.CheckSender(table, remote); why != drop.None {
		return why
	}
	if broken == drop.None && !table.HasRemote(remote) {
		return drop.ReversePath
	}
	return broken
}
