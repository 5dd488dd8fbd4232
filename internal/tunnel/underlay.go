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
	// First what the data path reads for each packet that it sends, up to path.Link: with many remotes that is one
	// cache line, which is seldom in a cache. A route has the length of two, so that each begins one.
	outer encap.Outer
	// maxInner is the largest inner packet that path takes unfragmented, in bytes.
	maxInner    int
	txDrop      drop.Reason // if not drop.None, the reason to drop all outgoing packets
	unreachable bool        // of one of many remotes: as Tunnel.unreachable
	many        bool        // the remote is each packet's; path.Remote is zero
	// receiveOnly: it has many remotes, and accept-to without local-address: nothing is sent.
	receiveOnly bool
	// used, of one of many remotes, is 1 once a packet was sent by it since confirmRemotes. It is atomic.
	used uint32
	path underlay.Path // MTU and Link

	// clampMSS is Config.ClampTCPMSS. echo consumes the replies to probes; nil unless keepalive-probe
	// is echo.
	clampMSS   bool
	bypassSafe bool  // nothing objects to bypassing the IP stack: netstate.Answer.Bypass
	suspended  bool  // see Tunnel.suspended
	held       bool  // path.Remote is that of another RemoteAddress: see releaseRemote
	linkDevice int32 // see receptionDevice
	echo       *keepalive.Echo
	waiting    string // what the tunnel waits for: Status.WaitingFor
	// Of one of many remotes:
	base   *route  // what it was made of: the tunnel's own
	remote *remote // nil unless it is a gateway of a route
}

// maxInner is the largest inner packet in bytes that a path of that MTU takes unfragmented.
func (c *control) maxInner(mtu int) int {
	if c.ipsecPolicy != nil {
		return c.ipsecPolicy.maxInner(mtu)
	}
	return mtu - encap.Overhead
}

// largest is the largest inner packet in bytes that a sender may be asked to keep to, of an interface with that MTU: of one of
// many remotes what the first hop to it takes, if nobody is to fragment. A path MTU that was learnt does not count, which
// anybody can forge, and a connection has its MSS for good. r may be nil.
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

// query is what the network is asked for this tunnel.
func (c *control) query() netstate.Query { return c.queryFor(c.cfg, c.remote) }

// queryFor is query with another Config and its remote, which may not be known yet.
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

// defaultUnderlayMTU is that of an underlay that is not known yet, in bytes.
const defaultUnderlayMTU = 1500

// newRoute builds the route from an answer in which there is a path. It also sets underlay.
func (c *control) newRoute() *route {
	a, u := c.answer, c.answer.Route
	if c.intoItself(&u) {
		// A loop: the tunnel's own MTU would decrease step by step, and an inner address is
		// no source that the remote knows.
		u.MTU, u.Source = c.underlay.MTU, c.underlay.Source
	}
	if c.many != nil {
		u.MTU, c.narrowest = c.remotesMTU()
		u.Source = [4]byte{} // that of each remote
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

// pair is under which outer addresses the tunnel is to be in Engine.table; 0 if they are not known.
func (r *route) pair() outerPair {
	if r.many {
		return pairOf(r.path.Local, anyRemote)
	}
	if r.path.Local == [4]byte{} || r.path.Remote == [4]byte{} {
		return 0
	}
	return pairOf(r.path.Local, r.path.Remote)
}

// configureRoute sets what of a route is the Config's alone.
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

// bypassBlocker is why outer packets must go through the raw socket; "" if they need not.
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

// newLink is the Ethernet header to a next hop that is resolved.
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
			c.wait(next, nil)
			err = c.protect(next)
			next.maxInner = c.maxInner(next.path.MTU) // of the new session
		}
		c.retry = c.retry || err != nil
	}
	if err != nil {
		next = c.pathlessRoute()
		if c.register(next.pair()) != nil { // another tunnel has it
			_ = c.register(0)
		}
		c.wait(next, err)
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

// register has the tunnel in Engine.table under this pair, 0 for not at all. It fails if another tunnel
// has it.
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

// mtuPath is the path that an interface's MTU comes of: the underlay device, or one of many remotes.
type mtuPath struct {
	device int
	remote [4]byte
}

// narrowestText names the mtuPath.
func (c *control) narrowestText() string {
	if c.many != nil {
		return addressText(c.narrowest)
	}
	return c.underlay.DeviceName
}
