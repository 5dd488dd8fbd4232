package tunnel

import (
	"bytes"
	"errors"
	"maps"
	"net/netip"
	"sync/atomic"
	"time"

	"ipipd/encap"
	"ipipd/internal/drop"
	"ipipd/internal/ipv4"
	"ipipd/internal/netstate"
	"ipipd/internal/underlay"
)

// Control's side of many remotes: each gateway of a route has a Follower, and the soft state of RFC 2003,
// section 5. The routes bound its memory: no packet adds to it.

// maxRemotes limits the gateways with a state of their own.
const maxRemotes = 1 << 14

// remote is the state of a gateway of a route, or of a learnt inner destination.
type remote struct {
	follower      Follower  // nil if it is learnt
	learntAt      time.Time // when the last ICMP error about it came, if it is learnt
	pathMTU       encap.PathMTU
	reach         encap.Reachability
	unreachableAt time.Time
	heard         atomic.Int64 // when its last packet came, nanoseconds after Tunnel.epoch; 0 is never
	ipsec         remoteIPsec
	reflectLimit  limiter      // answers to its reflect probes
	largest       atomic.Int32 // see route.largest; 0 is not known

	// Set by updateFastRemote: the device of its route, why the fast path does not carry it, and the host's rules
	// that apply to its packets.
	fastDevice          int
	fastBlocker, policy string
}

// followRoutes has many mirror the routes of the present interface.
func (c *control) followRoutes() {
	if c.many == nil || c.ifindex == c.routesOf {
		return
	}
	t, begun := c.Tunnel, c.endRoutes()
	c.routesOf = c.ifindex
	if c.ifindex == 0 {
		return
	}
	c.routes = c.engine.network.FollowRoutes(c.ifindex, func(changes []netstate.RouteChange) {
		if t.many.follow(begun, changes) {
			t.wakeControl()
		}
	})
}

// endRoutes ends the mirroring of routes, and forgets all remotes. begun is what remotes.reset returned.
func (c *control) endRoutes() (begun int) {
	if c.routes != nil {
		c.routes.Close()
		c.routes = nil
	}
	for g, r := range c.remotes {
		r.follower.Close()
		c.endRemoteIPsec(g)
	}
	c.remotes, c.learnt, c.remotesLeftOut = nil, nil, false
	c.endSenders()
	if c.many != nil {
		begun = c.many.reset()
	}
	return begun
}

// askRemotes gives each new gateway of the table a Follower, and closes those of former ones. It returns the
// gateways whose answer has changed.
func (c *control) askRemotes() (changed map[[4]byte]bool) {
	if c.many == nil {
		return nil
	}
	news, changed := c.many.take()
	for g, has := range news {
		if r := c.remotes[g]; !has && r != nil {
			r.follower.Close()
			c.endRemoteIPsec(g)
			delete(c.remotes, g)
		}
	}
	for g, has := range news {
		if has {
			c.addRemote(g)
		}
	}
	if c.remotesLeftOut && len(c.remotes) < maxRemotes {
		c.remotesLeftOut = false
		for g := range c.many.table.Load().Gateways() {
			c.addRemote(g)
		}
	}
	asked := remotesQuery{c.cfg.LocalAddress, c.cfg.FwMark, c.cfg.UnderlayDevice}
	if asked != c.asked {
		for g, r := range c.remotes {
			r.follower.Set(c.remoteQuery(g))
			changed[g] = true
		}
	}
	c.asked = asked
	return changed
}

// addRemote gives a gateway a state of its own, if it has none and there is room.
func (c *control) addRemote(g [4]byte) {
	switch {
	case c.remotes[g] != nil:
		return
	case len(c.remotes) >= maxRemotes:
		c.remotesLeftOut = true
		return
	case c.remotes == nil:
		c.remotes = map[[4]byte]*remote{}
	}
	r := &remote{pathMTU: encap.PathMTU{Floor: c.pathMTU.Floor}}
	r.follower = c.engine.network.Follow(c.remoteQuery(g), func() { c.remoteChanged(g) })
	c.remotes[g] = r
}

// remotesQuery is what the queries of all remotes have in common.
type remotesQuery struct {
	local          netip.Addr
	mark           uint32
	underlayDevice string
}

// remoteQuery returns what the network is asked about a remote. It names no Interface: each change of a route
// out of that would change all answers.
func (c *control) remoteQuery(g [4]byte) netstate.Query {
	return netstate.Query{Remote: g, Local: bytesOf(c.cfg.LocalAddress), AnyLocal: !c.cfg.LocalAddress.IsValid(), Mark: c.cfg.FwMark, UnderlayDevice: c.cfg.UnderlayDevice}
}

// updateRemotes brings the routes to the remotes in line with the tunnel's own, and with what askRemotes
// found.
func (c *control) updateRemotes(changed map[[4]byte]bool, now time.Time) {
	if c.many == nil {
		return
	}
	base, old := c.route.Load(), c.many.routes.Load().all
	news := map[[4]byte]*route{}
	c.learntRoutes(news, old, base, changed, now)
	for g, r := range c.remotes {
		if expired := r.tick(now, c.epoch); old[g] == nil || old[g].remote != r || old[g].base != base || expired || changed[g] {
			news[g] = c.remoteRoute(base, g, r, now)
			c.updateFastRemote(g, news[g])
		}
	}
	if len(news) == 0 && len(old) == len(c.remotes)+len(c.learnt) {
		return
	}
	next := maps.Clone(old)
	maps.DeleteFunc(next, func(g [4]byte, _ *route) bool { return c.remotes[g] == nil && c.learnt[g] == nil })
	maps.Copy(next, news)
	c.many.routes.Store(newRouteTable(next))
	c.many.storeSources(next)
}

// remoteChanged has the route to a remote made again.
func (t *Tunnel) remoteChanged(g [4]byte) {
	t.many.mu.Lock()
	t.many.changed[g] = true
	t.many.mu.Unlock()
	t.wakeControl()
}

// tick ends a path MTU that has expired, and unreachability that has expired or that a packet of the remote refutes.
func (r *remote) tick(now, epoch time.Time) (changed bool) {
	changed = r.pathMTU.Tick(now)
	if r.unreachableAt.IsZero() {
		return changed
	}
	if r.reach.Reachable(now) || epoch.Add(time.Duration(r.heard.Load())).After(r.unreachableAt) {
		r.reach.MarkReachable()
		r.unreachableAt = time.Time{}
		changed = true
	}
	return changed
}

// remoteRoute makes the route to a remote.
func (c *control) remoteRoute(base *route, g [4]byte, r *remote, now time.Time) *route {
	next := *base
	next.base, next.remote = base, r
	next.path.Remote, next.outer.Remote = g, g
	next.unreachable = !r.reach.Reachable(now)
	a := r.follower.Answer()
	if base.anyLocal() {
		c.takeSource(&next, a)
	}
	switch {
	case base.txDrop != drop.None:
	case a.Err == nil && a.Route.Local:
		next.txDrop = drop.RemoteNotUsable // an address of this host
	case a.Err == nil && !c.intoItself(&a.Route): // else the kernel loops it once, which is counted
		next.path.Link = c.remoteLink(a)
		next.path.MTU = r.pathMTU.Effective(a.Route.MTU)
		next.maxInner = c.remoteMaxInner(r, next.path.MTU)
		r.largest.Store(int32(c.remoteMaxInner(r, a.Route.MTU)))
	case errors.As(a.Err, new(*netstate.NoRouteError)):
		next.txDrop = drop.NoPath
	}
	return &next
}

// remoteLink is link for a remote. Those with the same next hop share one.
func (c *control) remoteLink(a *netstate.Answer) *underlay.Link {
	if u := &a.Route; c.cfg.FwMark != 0 || u.Local || !u.Ethernet || !u.Resolved || a.Bypass != "" {
		return nil
	}
	l := newLink(&a.Route)
	if same := c.links[*l]; same != nil {
		return same
	}
	if c.links == nil || len(c.links) > len(c.remotes) { // most are of former next hops
		c.links = map[underlay.Link]*underlay.Link{}
	}
	c.links[*l] = l
	return l
}

// confirmRemotes is confirmNextHop for the remotes that packets were sent to.
func (c *control) confirmRemotes() {
	for g, r := range c.many.routes.Load().all {
		if atomic.SwapUint32(&r.used, 0) == 0 || c.remotes[g] == nil {
			continue
		}
		if err := c.remotes[g].follower.Refresh(); err != nil {
			c.log.Debug("the next hop is not resolved", "err", err)
		}
	}
}

// remotesMTU returns the least MTU of the first hops to the remotes, in bytes, and the remote with it, of several the one
// with the lowest address; defaultUnderlayMTU and zero if there is none.
func (c *control) remotesMTU() (mtu int, of [4]byte) {
	for g, r := range c.remotes {
		a := r.follower.Answer()
		if a.Err != nil || c.intoItself(&a.Route) {
			continue
		}
		if mtu == 0 || a.Route.MTU < mtu || a.Route.MTU == mtu && bytes.Compare(g[:], of[:]) < 0 {
			mtu, of = a.Route.MTU, g
		}
	}
	if mtu == 0 {
		return defaultUnderlayMTU, of
	}
	return mtu, of
}

// remotesNext returns when the state of a remote expires next; the zero time if never.
func (c *control) remotesNext() (next time.Time) {
	for _, all := range []map[[4]byte]*remote{c.remotes, c.learnt} {
		for _, r := range all {
			if at := r.expires(); !at.IsZero() && (next.IsZero() || at.Before(next)) {
				next = at
			}
		}
	}
	return next
}

// outerErrorOf is outerError for one of many remotes.
func (t *Tunnel) outerErrorOf(e *encap.OuterError, now time.Time) (why drop.Reason) {
	defer func() {
		if why != drop.None {
			t.count(why, 1)
		}
	}()
	r := t.many.routes.Load().all[e.Destination]
	config := t.config.Load()
	alive := func() bool {
		var heard int64
		if r != nil {
			heard = r.remote.heard.Load()
		}
		return heard != 0 && now.Sub(t.epoch.Add(time.Duration(heard))) < recentlyReceived ||
			now.Sub(t.many.fastHeard(e.Destination)) < recentlyReceived
	}
	switch {
	case r == nil && !t.many.table.Load().HasRemote(e.Destination), !e.TooBig() && !e.Unreachable(), e.Type == ipv4.ICMPTimeExceeded && config.TTL == 0:
		return drop.OuterErrorIgnored
	case !t.quotesRemote(r, e), r.quotesOtherSource(e), e.TooBig() && !config.DontFragment, e.Unreachable() && alive():
		return drop.OuterErrorNotBelieved
	}
	kept := *e
	if !t.post(func(c *control) { c.errorOf(&kept, now) }) {
		return drop.OuterErrorIgnored
	}
	return drop.None
}

// errorOf handles an ICMP error about packets to a remote.
func (c *control) errorOf(e *encap.OuterError, now time.Time) {
	if r := c.remotes[e.Destination]; r == nil {
		c.learn(e, now)
	} else if d := r.apply(e, r.follower.Answer().Route.MTU, now); d != drop.None {
		c.drop(d)
	}
	c.remoteChanged(e.Destination)
}
