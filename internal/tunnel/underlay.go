package tunnel

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"time"

	"ipipd/encap"
	"ipipd/internal/drop"
	"ipipd/internal/ipv4"
	"ipipd/internal/netstate"
	"ipipd/internal/underlay"
	"ipipd/internal/warning"
	"ipipd/keepalive"
)

// route is what the data path knows of a tunnel: the outer header and the path of its packets, and how
// received ones are handled. It is immutable; replaceRoute stores another.
type route struct {
	// The data path reads the fields up to path.Link for each packet that it sends. They are one cache line, which
	// with many remotes is seldom in a cache. A route is two cache lines long, so that each begins at one.
	outer encap.Outer
	// maxInner is the largest inner packet that path takes unfragmented, in bytes.
	maxInner    int
	txDrop      drop.Reason // if not drop.None, the reason to drop all outgoing packets
	unreachable bool        // as Tunnel.unreachable, for one of many remotes
	many        bool        // each packet has a remote of its own; path.Remote is zero
	// receiveOnly: nothing is sent, as remote-address is any, with accept-to and without local-address.
	receiveOnly bool
	// used is 1 if a packet was sent to this one of many remotes since confirmRemotes. It is accessed atomically.
	used uint32
	path underlay.Path

	// clampMSS is Config.ClampTCPMSS. echo consumes the replies to probes; nil unless keepalive-probe
	// is echo.
	clampMSS   bool
	bypassSafe bool  // nothing objects to bypassing the IP stack: netstate.Answer.Bypass
	suspended  bool  // see Tunnel.suspended
	held       bool  // path.Remote is still of the RemoteAddress before: see releaseRemote
	linkDevice int32 // see receptionDevice
	echo       *keepalive.Echo
	waiting    string // what the tunnel waits for: Status.WaitingFor
	// Of one of many remotes:
	base   *route  // the tunnel's own route, of which it was made
	remote *remote // a gateway, or learnt; nil if the remote has no state
}

// maxInner is the largest inner packet in bytes that a path of that MTU takes unfragmented.
func (c *control) maxInner(mtu int) int {
	if c.ipsecPolicy != nil {
		return c.ipsecPolicy.maxInner(mtu)
	}
	return mtu - encap.Overhead
}

// largest returns the largest inner packet, in bytes, to which the MSS of a connection is clamped on an interface with
// that MTU: with dont-fragment inherit at most what the first hop to one of many remotes takes. A path MTU that was learnt
// does not count: anybody can forge it, and a connection keeps its MSS for good. r may be nil.
func (r *route) largest(mtu int) int {
	if r != nil && r.remote != nil && r.outer.DontFragmentInherit {
		if n := int(r.remote.largest.Load()); n != 0 {
			return min(mtu, n)
		}
	}
	return mtu
}

// equal reports whether two routes are the same, with Link compared by value.
func (r *route) equal(other *route) bool {
	a, b := *r, *other
	if (a.path.Link == nil) != (b.path.Link == nil) || a.path.Link != nil && *a.path.Link != *b.path.Link {
		return false
	}
	a.path.Link, b.path.Link = nil, nil
	return a == b
}

// query returns what the network is asked for this tunnel.
func (c *control) query() netstate.Query { return c.queryFor(c.cfg, c.remote) }

// queryFor is query with another Config and its remote, the zero Addr if that is not resolved yet.
func (c *control) queryFor(cfg *Config, remote netip.Addr) netstate.Query {
	return netstate.Query{
		Remote: bytesOf(remote), Local: bytesOf(cfg.LocalAddress), Mark: cfg.FwMark, UnderlayDevice: cfg.UnderlayDevice, Interface: c.ifindex, Routes: cfg.plainRoutes(),
	}
}

// bytesOf returns an IPv4 address; zero if it is the zero Addr.
func bytesOf(a netip.Addr) (b [4]byte) {
	if a.IsValid() {
		b = a.As4()
	}
	return b
}

// defaultUnderlayMTU is the MTU, in bytes, that the underlay is taken to have until there is a route.
const defaultUnderlayMTU = 1500

// newRoute makes the tunnel's route from answer, in which there is a path. It also sets underlay.
func (c *control) newRoute() *route {
	a, u := c.answer, c.answer.Route
	if c.intoItself(&u) {
		// A loop: the tunnel's own MTU would decrease step by step, and an inner address is
		// no source that the remote knows.
		u.MTU, u.Source = c.underlay.MTU, c.underlay.Source
	}
	if c.many != nil {
		u.MTU, c.narrowest = c.remotesMTU()
		u.Source = [4]byte{} // each remote's route has its own
	}
	local, remote := u.Source, bytesOf(c.remote)
	if c.cfg.LocalAddress.IsValid() {
		local = c.cfg.LocalAddress.As4()
	}
	c.underlay = u
	pathMTU := c.pathMTU.Effective(u.MTU)
	next := &route{
		outer: encap.Outer{Local: local, Remote: remote},
		path: underlay.Path{
			Local: local, Remote: remote, Mark: c.cfg.FwMark, Device: a.Device,
			MTU:  pathMTU,
			Link: c.link(&u),
		},
		maxInner:   c.maxInner(pathMTU),
		linkDevice: int32(c.receptionDevice(&u)),
		bypassSafe: a.Bypass == "",
	}
	c.configureRoute(next)
	return next
}

// intoItself reports whether a route of outer packets leads into the tunnel's own interface.
func (c *control) intoItself(r *netstate.Route) bool {
	return c.ifindex != 0 && r.Device == c.ifindex && !c.iface.Load().Moved
}

// pathlessRoute builds the route while there is no path: the last one, without Link so that the kernel
// decides for each packet that is still sent, and with what is known of the outer addresses.
func (c *control) pathlessRoute() *route {
	next := &route{maxInner: c.maxInner(c.underlay.MTU)}
	if last := c.route.Load(); last != nil && !c.anew {
		*next = *last
	}
	local, remote := next.path.Local, bytesOf(c.remote)
	if c.cfg.LocalAddress.IsValid() {
		local = c.cfg.LocalAddress.As4()
	} else if remote != next.path.Remote {
		local = [4]byte{}
	}
	next.path.Local, next.path.Remote, next.path.Mark = local, remote, c.cfg.FwMark
	next.outer.Local, next.outer.Remote = local, remote
	next.path.Link, next.bypassSafe = nil, false
	c.configureRoute(next)
	return next
}

// pair returns the outer addresses under which Engine.table is to have the tunnel; 0 if they are not known.
func (r *route) pair() outerPair {
	if r.many {
		return pairOf(r.path.Local, anyRemote)
	}
	if r.path.Local == [4]byte{} || r.path.Remote == [4]byte{} {
		return 0
	}
	return pairOf(r.path.Local, r.path.Remote)
}

// configureRoute sets the fields of a route that do not depend on the network's answer.
func (c *control) configureRoute(r *route) {
	r.outer.DSCP, r.outer.DontFragmentInherit, r.outer.TTL = c.cfg.DSCP, c.cfg.DontFragment, uint8(c.cfg.TTL)
	r.clampMSS, r.echo, r.held = c.cfg.ClampTCPMSS, c.echo, c.held
	r.many = c.many != nil
	r.outer.Many = r.many
	r.receiveOnly = c.cfg.receiveOnly()
}

// protect has the ipsecPolicy, if there is one, negotiate between the ends of a route.
func (c *control) protect(r *route) error {
	if r.txDrop != drop.None || c.ipsecPolicy == nil {
		return nil
	}
	if c.many != nil {
		return c.ipsecPolicy.listen(r.path.Local, r.path.Device)
	}
	return c.ipsecPolicy.rebind(r.path.Local, r.path.Remote, r.path.Device)
}

// bypassBlocker returns why outer packets must go through the raw socket; "" if they need not.
func (c *control) bypassBlocker() string {
	switch u := &c.underlay; {
	case c.cfg.FwMark != 0:
		return "fwmark is set"
	case u.Local:
		return "the remote is this host"
	case !u.Ethernet:
		return "the next hop is not a plain Ethernet neighbour"
	}
	return c.answer.Bypass
}

// link returns the Ethernet header to the next hop, or nil if outer packets must go through the
// raw socket.
func (c *control) link(u *netstate.Route) *underlay.Link {
	if c.bypassBlocker() != "" || !u.Resolved {
		return nil
	}
	return newLink(u)
}

// newLink returns the Ethernet header to the next hop of u, whose neighbour is resolved.
func newLink(u *netstate.Route) *underlay.Link {
	l := &underlay.Link{Device: u.Device}
	copy(l.Header[0:], u.DestinationMAC[:])
	copy(l.Header[6:], u.SourceMAC[:])
	binary.BigEndian.PutUint16(l.Header[12:], ipv4.EtherType)
	return l
}

// wantedMTU is the MTU that the interface should have: the configured one, or the route's less
// the overhead.
func (c *control) wantedMTU() int {
	if c.cfg.MTU != 0 {
		return c.cfg.MTU
	}
	return max(c.maxInner(c.underlay.MTU), encap.MinPathMTU)
}

// updateRoute applies the network's answer and the path MTU to the table, the route and the
// interface's MTU.
func (c *control) updateRoute(now time.Time) {
	c.pathMTU.Tick(now) // RFC 1191, section 6.3
	var next *route
	err := c.pathError(c.answer, c.remote)
	if err != nil {
		c.pairTaken.Store(false)
	} else {
		next = c.newRoute()
		err = c.register(next.pair())
		c.pairTaken.Store(err != nil)
		if err == nil {
			c.setWaiting(next, nil)
			err = c.protect(next)
			next.maxInner = c.maxInner(next.path.MTU) // protect may have begun another session
		}
		c.retry = c.retry || err != nil
	}
	if err != nil {
		next = c.pathlessRoute()
		if c.register(next.pair()) != nil { // another tunnel has it
			_ = c.register(0)
		}
		c.setWaiting(next, err)
	}
	c.anew = false
	c.setNoPath(err)
	old := c.route.Load()
	if (old.path.Link == nil) != (next.path.Link == nil) {
		c.log.Debug("how outer packets are sent", "frames", next.path.Link != nil, "bypass-blocker", c.bypassBlocker())
	}
	if !old.suspended && !next.suspended {
		if before, now := old.path.Device, next.path.Device; before != now { // by name: one that is renamed is no longer used
			c.log.Info("underlay-device is another interface now", "underlay-device", c.cfg.UnderlayDevice, "index", now, "was", before)
		}
		if next.path.Local != old.path.Local || next.path.Remote != old.path.Remote {
			c.log.Info("outer addresses changed", "local-address", addressText(next.path.Local), "remote-address", addressText(next.path.Remote))
		}
	}
	c.acceptOthers(&next.path)
	c.replaceRoute(next, now)
	if err == nil || next.suspended {
		c.updateMTU(now)
	}
}

// register enters the tunnel in Engine.table under pair, or takes it out if pair is 0. It fails if another
// tunnel has the pair.
func (c *control) register(pair outerPair) error {
	if pair == c.pair {
		return nil
	}
	if err := c.engine.register(map[*Tunnel]outerPair{c.Tunnel: pair}, nil); err != nil {
		return errors.Unwrap(err)
	}
	c.pair = pair
	return nil
}

// updateMTU sets the interface's MTU if wantedMTU has changed.
func (c *control) updateMTU(now time.Time) {
	want := c.wantedMTU()
	if want == c.appliedMTU {
		c.clear(warning.MTUNotSet)
	}
	if want == c.appliedMTU || c.lost.gone || c.mtuFeedback(want, now) {
		return
	}
	err := c.device.SetMTU(want)
	if c.warnErr(warning.MTUNotSet, err); err != nil {
		c.retry = true
		return
	}
	c.log.Info("MTU follows the route", "actual-mtu", want)
	c.appliedMTU = want
	c.mtu.Store(int32(want))
}

// mtuFeedback reports a recursive route: it leads into another tunnel whose route leads into this
// one, and each lowers the other's MTU by 20. It is detected by repeated decreases by one
// path within a minute, as a real link's MTU does not show.
func (c *control) mtuFeedback(want int, now time.Time) bool {
	const within = time.Minute
	if by := (mtuPath{c.underlay.Device, c.narrowest}); want > c.appliedMTU || by != c.mtuDecreases.by || now.Sub(c.mtuDecreases.last) > within {
		c.mtuDecreases = mtuDecreases{by: by}
	}
	if want > c.appliedMTU {
		return false
	}
	c.mtuDecreases.last = now
	c.mtuDecreases.n++
	return c.mtuDecreases.n > mtuSteps
}

// mtuSteps is how many decreases within a minute are followed.
const mtuSteps = 3

// mtuDecreases counts recent decreases of the MTU by one path.
type mtuDecreases struct {
	by   mtuPath
	n    int
	last time.Time
}

// mtuPath is what an interface's MTU comes from: the underlay device, or one of many remotes.
type mtuPath struct {
	device int
	remote [4]byte
}

// narrowestText names what the interface's MTU comes from.
func (c *control) narrowestText() string {
	if c.many != nil {
		return addressText(c.narrowest)
	}
	return c.underlay.DeviceName
}
