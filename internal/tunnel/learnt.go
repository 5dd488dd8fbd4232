package tunnel

import (
	"time"

	"ipipd/encap"
	"ipipd/internal/drop"
)

// A remote that is no gateway but an inner destination, by a route without a gateway, has no state, but for what
// an ICMP error says of it (RFC 2003, section 5): that is kept as long as it holds, as the kernel keeps it in a
// next-hop exception. Anybody can forge such an error about any address of such a route, so few are kept.

const (
	// maxLearnt limits the inner destinations with a state. The one with the oldest error goes first.
	maxLearnt = 1024
	// learntLifetime is how long after the last error a state is kept of which all has expired: till then it
	// is known whether the remote is heard, and so which errors not to believe.
	learntLifetime = 30 * time.Second
)

// learn applies an ICMP error about packets to an inner destination that is a remote.
func (c *control) learn(e *encap.OuterError, now time.Time) {
	base := c.route.Load()
	r := c.learnt[e.Destination]
	if r == nil {
		r = &remote{pathMTU: encap.PathMTU{Floor: c.pathMTU.Floor}}
	}
	if d := r.apply(e, base.path.MTU, now); d != drop.None {
		c.drop(d)
	}
	if r.pathMTU.Get() == 0 && r.unreachableAt.IsZero() {
		return
	}
	if c.learnt == nil {
		c.learnt = map[[4]byte]*remote{}
	}
	if _, has := c.learnt[e.Destination]; !has && len(c.learnt) >= maxLearnt {
		c.forgetOldest()
	}
	r.learntAt = now
	c.learnt[e.Destination] = r
}

func (c *control) forgetOldest() {
	var oldest [4]byte
	var at time.Time
	for g, r := range c.learnt {
		if at.IsZero() || r.learntAt.Before(at) {
			oldest, at = g, r.learntAt
		}
	}
	delete(c.learnt, oldest)
}

// apply applies an ICMP error. linkMTU is the first hop's MTU in bytes. d is why the error is not believed.
func (r *remote) apply(e *encap.OuterError, linkMTU int, now time.Time) (d drop.Reason) {
	if e.TooBig() {
		_, d = r.pathMTU.TooBig(now, e, linkMTU)
		return d
	}
	r.reach.MarkUnreachable(now)
	r.unreachableAt = now
	return drop.None
}

// expires returns when a part of the state expires next; the zero time if never.
func (r *remote) expires() (next time.Time) {
	for _, at := range []time.Time{r.pathMTU.Expires(), r.reach.Expires()} {
		if !at.IsZero() && (next.IsZero() || at.Before(next)) {
			next = at
		}
	}
	if next.IsZero() && !r.learntAt.IsZero() {
		next = r.learntAt.Add(learntLifetime)
	}
	return next
}

// learntRoutes adds to news the routes to learnt remotes that are to be made again of base, and forgets remotes of
// which nothing is left. old are the routes in use.
func (c *control) learntRoutes(news, old map[[4]byte]*route, base *route, changed map[[4]byte]bool, now time.Time) {
	for g, r := range c.learnt {
		expired := r.tick(now, c.epoch)
		switch named := c.remotes[g] != nil; {
		case named, r.pathMTU.Get() == 0 && r.unreachableAt.IsZero() && now.Sub(r.learntAt) >= learntLifetime:
			delete(c.learnt, g)
		case old[g] == nil || old[g].remote != r || old[g].base != base || expired || changed[g]:
			news[g] = r.learntRoute(base, g, now)
		}
	}
}

// learntRoute returns the route to an inner destination: the kernel routes each packet, as without the error.
func (r *remote) learntRoute(base *route, g [4]byte, now time.Time) *route {
	next := *base
	next.base, next.remote = base, r
	next.path.Remote, next.outer.Remote = g, g
	next.unreachable = !r.reach.Reachable(now)
	next.path.MTU = r.pathMTU.Effective(base.path.MTU)
	next.maxInner = base.maxInner - (base.path.MTU - next.path.MTU)
	return &next
}
