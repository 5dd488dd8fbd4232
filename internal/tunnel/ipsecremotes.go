package tunnel

import (
	"cmp"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"ipipd/encap"
	"ipipd/internal/drop"
	"ipipd/internal/ipsec"
	"ipipd/internal/ipsec/ike"
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
)

// A tunnel with many remotes and a secret has an ipsecPolicy for each gateway of a route that packets were
// sent to, or that has begun to negotiate: made when it is needed, closed when it is idle. Whoever forges
// the address of a gateway can have one made, and no more of them than there are gateways.

const (
	// maxProtected is how many remotes have an ipsecPolicy at a time.
	maxProtected = 1024
	// protectedIdle is how long an SA is kept without a packet in either direction.
	protectedIdle = 10 * time.Minute
	// unprotectedIdle is how long an ipsecPolicy without an SA is kept without a packet, and how long after its
	// last packet none is ended to make room for another remote.
	unprotectedIdle = time.Minute
	// idleCheck is how often idle ipsecPolicies are looked for.
	idleCheck = 30 * time.Second
)

// Why a remote needs an ipsecPolicy: the bits of remoteIPsec.wanted.
const (
	wantedByPacket uint32 = 1 << iota // a packet to the remote has no SA
	wantedByESP                       // the remote sends ESP by an SA that is not known here
	wantedByIKE                       // the remote negotiates
)

// ipsecRemotes is the part of an ipsecPolicy of a tunnel with many remotes. The data path only reads remotes.
type ipsecRemotes struct {
	tunnel *Tunnel
	limits *ike.Limits
	wants  atomic.Bool // remoteIPsec.wanted of a remote has a new bit
	lines  lineLimiter

	// Used by control only:
	listener   *ipsec.Listener
	local      [4]byte // of listener, as device
	device     int
	protected  map[[4]byte]*protected
	identities map[[4]byte]*ike.Identity // that each remote behind a NAT presented first, with the present secret
	checkAt    time.Time                 // when to look for idle ones; zero is never
}

// remoteIPsec is the part of a remote that ipsecRemotes needs.
type remoteIPsec struct {
	protected atomic.Pointer[protected]
	wanted    atomic.Uint32
}

// protected is the ipsecPolicy of one of many remotes.
type protected struct {
	ipsecPolicy
	remote *remote
	sealed atomic.Bool // seal was called for packets to the remote since control has looked
	// Used by control only:
	since    time.Time // when it was made
	lastUsed time.Time // zero is never
}

// protectMany gives the ipsecPolicy of a tunnel with many remotes its ipsecRemotes, empty.
func (t *Tunnel) protectMany() {
	if t.many != nil && t.ipsecPolicy != nil {
		t.ipsecPolicy.remotes = &ipsecRemotes{tunnel: t, limits: new(ike.Limits), protected: map[[4]byte]*protected{}, identities: map[[4]byte]*ike.Identity{}}
	}
}

// seal encrypts an outer packet in place, by the SA with its destination, or returns why it must be dropped.
func (r *ipsecRemotes) seal(b *packet.Buffer) drop.Reason {
	t := r.tunnel
	to := [4]byte(b.Bytes()[16:20])
	route := t.many.routes.Load().all[to]
	if route == nil || route.remote == nil {
		if t.many.table.Load().HasGateway(to) {
			return drop.ESPNoSA // control has not seen it yet
		}
		return drop.ESPNoGateway
	}
	p := route.remote.ipsec.protected.Load()
	if p == nil {
		r.want(route.remote, wantedByPacket)
		return drop.ESPNoSA
	}
	if !p.sealed.Load() {
		p.sealed.Store(true)
	}
	why := p.Seal(b)
	if why == drop.ESPNoSA {
		p.demand()
	}
	return why
}

// want asks control for an ipsecPolicy with a remote. It does not block, and may be called for each packet.
func (r *ipsecRemotes) want(remote *remote, by uint32) {
	if remote.ipsec.wanted.Load()&by == 0 && remote.ipsec.wanted.Or(by)&by == 0 {
		r.wants.Store(true)
		r.tunnel.wakeControl()
	}
}

// wanted is the callback of ipsec.Manager.Listen. If from is a gateway it asks for an ipsecPolicy and returns true.
func (r *ipsecRemotes) wanted(from netip.Addr, esp bool) bool {
	route := r.tunnel.many.routes.Load().all[from.As4()]
	switch {
	case route == nil || route.remote == nil:
		return false
	case !esp:
		r.want(route.remote, wantedByIKE)
	default:
		if p := route.remote.ipsec.protected.Load(); p != nil {
			p.demand()
		} else {
			r.want(route.remote, wantedByESP)
		}
	}
	return true
}

// demand has the session negotiate, as it has no SA.
func (p *protected) demand() {
	if session := p.session.Load(); session != nil {
		session.Demand()
	}
}

// listen opens the sockets for negotiating at a local address.
func (p *ipsecPolicy) listen(local [4]byte, device int) (err error) {
	r := p.remotes
	if r.listener != nil && local == r.local && device == r.device {
		return nil
	}
	p.close()
	r.local, r.device = local, device
	r.listener, err = p.manager.Listen(address(local), p.config.Mark, device, r.wanted)
	return err
}

// close ends all sessions and deletes their SAs at the remotes, and then closes the listener.
func (r *ipsecRemotes) close() {
	var closing sync.WaitGroup
	for g, p := range r.protected {
		closing.Go(func() { r.forget(p) })
		delete(r.protected, g)
	}
	closing.Wait()
	if r.listener != nil {
		r.listener.Close()
		r.listener = nil
	}
}

// end ends the session of a remote, if it has one.
func (r *ipsecRemotes) end(g [4]byte) {
	if p := r.protected[g]; p != nil {
		delete(r.protected, g)
		r.forget(p)
	}
}

func (r *ipsecRemotes) forget(p *protected) {
	p.remote.ipsec.protected.Store(nil)
	p.remote.ipsec.wanted.Store(0)
	p.close()
}

// endRemoteIPsec forgets a remote that is no gateway any more.
func (c *control) endRemoteIPsec(g [4]byte) {
	if c.ipsecPolicy != nil {
		c.ipsecPolicy.remotes.end(g)
		delete(c.ipsecPolicy.remotes.identities, g)
	}
}

// protectRemotes begins and ends sessions as remotes need them.
func (c *control) protectRemotes(now time.Time) {
	if c.many == nil || c.ipsecPolicy == nil || c.ipsecPolicy.remotes.listener == nil {
		return
	}
	r := c.ipsecPolicy.remotes
	if !r.checkAt.IsZero() && !now.Before(r.checkAt) {
		r.endIdle(now)
		for _, remote := range c.remotes { // so that one that there was no room for asks again
			remote.ipsec.wanted.Store(0)
		}
		r.checkAt = time.Time{}
		if len(r.protected) > 0 {
			r.checkAt = now.Add(idleCheck)
		}
	}
	if !r.wants.Swap(false) {
		return
	}
	var room *evictable
	for g, remote := range c.remotes {
		by := remote.ipsec.wanted.Load()
		if by == 0 || r.protected[g] != nil || c.engine.table.Load().find(r.local, g) != nil { // another tunnel has it
			continue
		}
		if len(r.protected) >= maxProtected {
			if room == nil {
				room = r.evictable(now)
			}
			if !room.evict(by&wantedByPacket != 0) {
				continue
			}
		}
		c.protectRemote(g, remote, by, now)
	}
	if r.checkAt.IsZero() {
		r.checkAt = now.Add(idleCheck)
	}
}

// restoreRemotes begins sessions with the remotes with which there are SAs of the process before. The routes are
// known, and control does not run yet.
func (c *control) restoreRemotes(now time.Time) {
	if c.many == nil || c.ipsecPolicy == nil || c.ipsecPolicy.remotes.listener == nil {
		return
	}
	r := c.ipsecPolicy.remotes
	saved := c.ipsecPolicy.manager.Saved(address(r.local))
	if len(saved) == 0 {
		return
	}
	c.updateRemotes(c.askRemotes(), now)
	for _, a := range saved {
		if remote := c.remotes[a.As4()]; remote != nil && r.protected[a.As4()] == nil && len(r.protected) < maxProtected {
			c.protectRemote(a.As4(), remote, wantedByIKE, now)
		}
	}
	r.checkAt = now.Add(idleCheck)
}

// protectRemote begins a session with a remote.
func (c *control) protectRemote(g [4]byte, remote *remote, by uint32, now time.Time) {
	r := c.ipsecPolicy.remotes
	if r.identities[g] == nil {
		r.identities[g] = new(ike.Identity)
	}
	p := &protected{remote: remote, since: now, ipsecPolicy: ipsecPolicy{manager: c.ipsecPolicy.manager, config: c.ipsecPolicy.config}}
	p.config.OnDemand, p.config.Limits, p.config.Remembered = true, r.limits, r.identities[g]
	p.config.Changed = func() { c.remoteChanged(g) }
	p.config.Event = func(e ipsec.Event) { r.logEvent(address(g), e) }
	if by&wantedByPacket != 0 {
		p.lastUsed = now
	}
	if err := p.rebind(r.local, g, r.device); err != nil {
		r.warn(address(g), "no SA, outbound packets are dropped: "+err.Error())
		return // it is tried again after the next idleCheck
	}
	r.protected[g] = p
	if by != wantedByIKE {
		p.demand()
	}
	remote.ipsec.protected.Store(p)
	remote.ipsec.wanted.Store(0)
}

// note brings lastUsed up to date.
func (p *protected) note(now time.Time, epoch time.Time) {
	if heard := epoch.Add(time.Duration(p.remote.heard.Load())); heard.After(epoch) && heard.After(p.lastUsed) {
		p.lastUsed = heard
	}
	if p.sealed.Swap(false) {
		p.lastUsed = now
	}
}

// endIdle ends the sessions that nobody uses.
func (r *ipsecRemotes) endIdle(now time.Time) {
	for g, p := range r.protected {
		limit := unprotectedIdle
		if p.established() {
			limit = protectedIdle
		}
		p.note(now, r.tunnel.epoch)
		if now.Sub(p.lastUsed) >= limit && now.Sub(p.since) >= limit {
			r.end(g)
		}
	}
}

// evictable are sessions that make room for others: those without an SA first, then the longest idle.
type evictable struct {
	r     *ipsecRemotes
	now   time.Time
	found []candidate
}

type candidate struct {
	g           [4]byte
	p           *protected
	established bool
}

func (r *ipsecRemotes) evictable(now time.Time) *evictable {
	e := &evictable{r: r, now: now}
	for g, p := range r.protected {
		p.note(now, r.tunnel.epoch)
		if now.Sub(p.lastUsed) >= unprotectedIdle {
			e.found = append(e.found, candidate{g, p, p.established()})
		}
	}
	slices.SortFunc(e.found, func(a, b candidate) int {
		if a.established != b.established {
			if a.established {
				return 1
			}
			return -1
		}
		return cmp.Or(a.p.lastUsed.Compare(b.p.lastUsed), a.p.since.Compare(b.p.since))
	})
	return e
}

// evict ends the first session of found, if it may: for a packet of ours any; for a packet of another remote, whose
// address may be forged, none with an SA and none that may still negotiate. It reports whether there is room.
func (e *evictable) evict(ours bool) bool {
	if len(e.found) == 0 {
		return false
	}
	if one := e.found[0]; !ours && (one.established || e.now.Sub(one.p.since) < unprotectedIdle) {
		return false
	}
	e.r.end(e.found[0].g)
	e.found = e.found[1:]
	return true
}

// ipsecNext returns when idle sessions are looked for next; the zero time if never.
func (c *control) ipsecNext() time.Time {
	if c.many == nil || c.ipsecPolicy == nil {
		return time.Time{}
	}
	return c.ipsecPolicy.remotes.checkAt
}

// remoteMaxInner is maxInner for one of many remotes, by its own SA if it has one.
func (c *control) remoteMaxInner(r *remote, mtu int) int {
	if p := r.ipsec.protected.Load(); p != nil {
		return p.maxInner(mtu)
	}
	return c.maxInner(mtu)
}

// quotesRemote is quotesOwn for one of many remotes. r is the route to it; nil if it has none of its own.
func (t *Tunnel) quotesRemote(r *route, e *encap.OuterError) bool {
	if t.ipsecPolicy == nil {
		return e.Protocol == ipv4.ProtocolIPIP
	}
	if r == nil {
		return false
	}
	p := r.remote.ipsec.protected.Load()
	return p != nil && p.quotesSA(e)
}
