package tunnel

import (
	"cmp"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"ipipd/encap"
	"ipipd/internal/netstate"
	"ipipd/internal/resolve"
	"ipipd/internal/underlay"
	"ipipd/internal/warning"
	"ipipd/keepalive"
)

// A remote that is a DNS name is looked up again when the TTL of its records has passed, and while
// the peer is not heard. The address in use stays while it is one of the answer's or, with
// keepalive, while the peer is heard from it: the answer may come before the peer has moved.
// Meanwhile another address of the answer, the candidate, is probed, and taken once the peer is
// heard from it.

const (
	// minTTL and maxTTL bound the TTL. While the peer is not heard it is minTTL.
	minTTL, maxTTL = 30 * time.Second, time.Hour
	// minRetry is the time until a look-up that has failed is tried again. It doubles each time,
	// to minTTL.
	minRetry = time.Second
	// maxJitter is the largest share by which these times are lengthened, so that the look-ups of
	// many tunnels spread.
	maxJitter = 0.1
	// previousHolds is how long packets of the last remote are still accepted.
	previousHolds = time.Minute
)

// otherRemote is an outer address of the peer beside that of the route, from which packets are
// accepted. It is immutable, but for heard.
type otherRemote struct {
	path     underlay.Path
	previous bool        // it was in use: the peer being heard from it says nothing of the one in use now
	heard    atomic.Bool // the peer was heard from it; never set if it is previous
}

// resolution is what control knows of a remote's DNS name.
type resolution struct {
	resolvedAt time.Time // of the last look-up; zero is none yet
	resolving  bool      // a look-up is under way
	lookups    int       // counts look-ups begun and names set: an answer to an earlier look-up is out of date
	lookupErr  error     // of the last look-up
	failures   int       // failed look-ups in a row
	ttl        time.Duration
	jitter     float64      // share by which the time to the next look-up is lengthened, up to maxJitter
	addresses  []netip.Addr // the last answer's: ascending, and immutable

	held       bool                      // the remote is the one from before Apply set this name: see releaseRemote
	heldRoutes []netstate.InterfaceRoute // those that the interface had then

	networkChanges uint64 // Answer.NetworkChanges, as last seen

	remoteSince   time.Time    // when the remote was taken into use
	previous      *otherRemote // nil is none
	previousUntil time.Time
	tried         netip.Addr     // the last address that was to be the candidate; the zero Addr is none
	triedAt       time.Time      // when that was
	triedErr      error          // why there is no path to it
	accepted      []*otherRemote // the same as Tunnel.others
	present       *otherRemote   // the one of accepted that is the remote in use
	probeDue      bool           // the remote or the candidate is new: probe it in this round
}

// lookupDue returns when the remote's name is to be looked up; the zero time if it is no name, or is being looked up.
func (c *control) lookupDue() time.Time {
	if _, named := c.cfg.remote(); !named || c.resolving {
		return time.Time{}
	}
	holds := min(max(c.ttl, minTTL), maxTTL)
	if !keepalive.State(c.state.Load()).Running() {
		holds = minTTL
	}
	if c.failures > 0 {
		holds = min(minRetry<<min(c.failures-1, 10), minTTL)
	}
	return c.resolvedAt.Add(holds + time.Duration(c.jitter*float64(holds)))
}

// lookUp looks the remote's name up in the background.
func (c *control) lookUp() {
	c.resolving = true
	c.lookups++
	name, lookup := c.cfg.RemoteAddress, c.lookups
	c.loops.Go(func() {
		a, err := c.engine.lookupName(c.ctx, name)
		select {
		case c.events <- func(c *control) { c.noteAnswer(lookup, a, err, time.Now()) }:
		case <-c.ctx.Done():
		}
	})
}

// noteAnswer takes the result of a look-up, unless Apply has set another name since. On error the last
// answer stays.
func (c *control) noteAnswer(lookup int, a resolve.Answer, err error, now time.Time) {
	if lookup != c.lookups {
		return
	}
	c.resolving = false
	c.resolvedAt, c.lookupErr, c.jitter = now, err, maxJitter*rand.Float64()
	if c.held {
		defer c.releaseRemote(now)
	}
	if err != nil {
		c.failures++
		return
	}
	c.failures, c.ttl, c.addresses = 0, a.TTL, a.Addresses
}

// resetRemote takes the remote of a new RemoteAddress: the zero Addr until that is resolved.
func (c *control) resetRemote(remote netip.Addr) {
	c.resolution = resolution{lookups: c.lookups + 1, accepted: c.accepted, networkChanges: c.networkChanges}
	c.dropCandidate()
	c.setRemote(remote)
}

// releaseRemote gives up the remote from before Apply set another name, once that name was looked up for the first
// time. Until then packets go to the old remote, and no route is added, as it might lead to the name server; now
// the tunnel is brought to the state that a start would give it.
func (c *control) releaseRemote(now time.Time) {
	c.held, c.heldRoutes = false, nil
	if !slices.Contains(c.addresses, c.remote) {
		c.setRemote(netip.Addr{}) // another peer: packets of the old one are not accepted any more
		if len(c.addresses) > 0 {
			c.useRemote(c.addressWithPath(c.addresses[0]), now)
		}
	}
	c.follower.Set(c.query())
	c.startAnew()
	c.applyAnswer(now)
	c.removeUnwanted(c.cfg)
	c.restoreDue = true
}

// noteNetwork has a name without an address looked up soon if the network has changed.
func (c *control) noteNetwork() {
	if changes := c.answer.NetworkChanges; changes != c.networkChanges {
		c.networkChanges, c.failures = changes, min(c.failures, 1)
	}
}

// chooseRemote takes another address of the last answer, or a candidate, if it is time to.
func (c *control) chooseRemote(now time.Time) {
	if c.previous != nil && !now.Before(c.previousUntil) {
		c.previous = nil
	}
	if len(c.addresses) == 0 {
		return
	}
	candidate, named := c.candidate.Load(), slices.Contains(c.addresses, c.remote)
	switch state := keepalive.State(c.state.Load()); {
	case candidate != nil && candidate.heard.Load():
		c.useRemote(address(candidate.path.Remote), now)
	case !named && state != keepalive.Up: // the peer is not heard from it: nothing is lost with it
		c.useRemote(c.addressWithPath(c.addresses[0]), now)
	case c.noPath != nil && c.suspended():
		c.useRemote(c.addressWithPath(c.remote), now)
		c.retry = true // the follower does not tell of a path to another address
	case named && (state == keepalive.Up || state == keepalive.Off):
		c.dropCandidate()
	case named && c.ipsecPolicy != nil: // a candidate could not be probed without an SA
		c.dropCandidate()
		if now.Sub(c.remoteSince) >= c.cfg.keepalive().HoldTime() {
			c.useRemote(c.addressAfter(c.remote), now)
		}
	case !slices.Contains(c.addresses, c.tried) || now.Sub(c.triedAt) >= minTTL:
		c.setCandidate(now)
	}
}

// addressAfter returns the next address of the answer, and after the last one the first.
func (c *control) addressAfter(last netip.Addr) netip.Addr {
	for _, a := range c.addresses {
		if last.Less(a) {
			return a
		}
	}
	return c.addresses[0]
}

// addressWithPath returns the lowest address of the answer to which there is a path; otherwise if there is
// none, or the answer has only one address.
func (c *control) addressWithPath(otherwise netip.Addr) netip.Addr {
	if len(c.addresses) == 1 {
		return otherwise
	}
	for _, a := range c.addresses {
		if _, err := c.askPath(a); err == nil {
			return a
		}
	}
	return otherwise
}

// askPath asks the network once for a path to another remote. err is why there is none.
func (c *control) askPath(remote netip.Addr) (a *netstate.Answer, err error) {
	f := c.engine.network.Follow(c.queryFor(c.cfg, remote), func() {})
	defer f.Close()
	a = f.Answer()
	return a, cmp.Or(a.Err, c.remoteError(a, remote))
}

// useRemote takes a remote into use.
func (c *control) useRemote(remote netip.Addr, now time.Time) {
	if remote == c.remote {
		return
	}
	if path := c.route.Load().path; c.remote.IsValid() && path.Remote != remote.As4() {
		c.previous = newOtherRemote(&path, true)
	}
	c.previousUntil, c.remoteSince, c.probeDue = now.Add(previousHolds), now, true
	c.dropCandidate()
	c.setRemote(remote)
	c.follower.Set(c.query())
}

func (c *control) dropCandidate() {
	c.candidate.Store(nil)
	c.tried = netip.Addr{}
}

// setCandidate makes the address of the answer after the last one tried the candidate, unless there is no path to it.
func (c *control) setCandidate(now time.Time) {
	next := c.addressAfter(c.tried)
	if next == c.remote {
		next = c.addressAfter(next)
	}
	if next == c.remote {
		c.dropCandidate()
		return
	}
	c.tried, c.triedAt = next, now
	a, err := c.askPath(next)
	path := c.route.Load().path
	path.Remote = next.As4()
	if !c.cfg.LocalAddress.IsValid() {
		path.Local = a.Route.Source
	}
	candidate := newOtherRemote(&path, false)
	if last := c.candidate.Load(); last != nil && last.path == candidate.path {
		candidate = last
	}
	if err != nil {
		candidate = nil
	}
	c.candidate.Store(candidate)
	c.probeDue, c.triedErr = candidate != nil, err
}

// warnOtherAddress warns while another address of the DNS name is tried, with why it cannot be used.
func (c *control) warnOtherAddress() {
	detail := c.tried.String()
	if c.triedErr != nil {
		detail += ", which cannot be used: " + c.triedErr.Error()
	}
	c.warnIf(c.tried.IsValid(), warning.OtherAddress, "%s", detail)
}

func newOtherRemote(path *underlay.Path, previous bool) *otherRemote {
	o := &otherRemote{path: *path, previous: previous}
	o.path.Link = nil
	return o
}

// acceptOthers has packets accepted from the candidate and the previous remote and, so that none is lost
// while it is taken into use, from path.Remote. With a secret it is the SA that decides, and there are no others.
func (c *control) acceptOthers(path *underlay.Path) {
	var others []*otherRemote
	for _, o := range []*otherRemote{c.candidate.Load(), c.previous} {
		if o != nil && c.ipsecPolicy == nil {
			others = append(others, o)
		}
	}
	if len(others) > 0 {
		present := newOtherRemote(path, false)
		if c.present == nil || c.present.path != present.path {
			c.present = present
		}
		others = append(others, c.present)
	}
	if slices.Equal(others, c.accepted) {
		return
	}
	c.accepted = others
	c.others.Store(&others)
	c.engine.enterOthers(c.Tunnel, others)
}

// other returns the otherRemote of that address, nil if there is none.
func (t *Tunnel) other(remote [4]byte) *otherRemote {
	if others := t.others.Load(); others != nil {
		for _, o := range *others {
			if o.path.Remote == remote {
				return o
			}
		}
	}
	return nil
}

// noteOther records a packet of the peer from another remote than the route's.
func (t *Tunnel) noteOther(o *otherRemote, now time.Time) {
	if o.previous {
		return
	}
	t.noteReceived(now)
	if !o.heard.Swap(true) {
		t.wakeControl()
	}
}

// setRemote sets the remote, and forgets what was learnt of another one.
func (c *control) setRemote(remote netip.Addr) {
	if remote == c.remote {
		return
	}
	c.remote = remote
	c.forgetPath()
	c.probeAnswered.Store(false)
	c.peerProbes.Store(false)
	c.peerOwnAddress.Store(0)
	c.peerAnswers = peerAnswers{}
}

// forgetPath forgets what was learnt of the path.
func (c *control) forgetPath() {
	c.pathMTU = encap.PathMTU{Floor: c.pathMTU.Floor}
	c.reach, c.protoUnreachable = encap.Reachability{}, false
	c.unreachable.Store(false)
}
