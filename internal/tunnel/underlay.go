package tunnel

import (
	"encoding/binary"
	"time"

	"ipipd/encap"
	"ipipd/internal/drop"
	"ipipd/internal/ipv4"
	"ipipd/internal/netstate"
	"ipipd/internal/underlay"
)

// route holds the outer header and the path of a tunnel's packets. It is immutable; replaceRoute
// stores another.
type route struct {
	outer encap.Outer
	path  underlay.Path
	// maxInner is the largest inner packet that path takes unfragmented, in bytes.
	maxInner   int
	linkDevice int         // see receptionDevice
	txDrop     drop.Reason // if not drop.None, the reason to drop all outgoing packets: see txDropFor
}

// maxInner is the largest inner packet in bytes that a path of that MTU takes unfragmented.
func (t *Tunnel) maxInner(mtu int) int {
	if t.ipsecPolicy != nil {
		return t.ipsecPolicy.maxInner(mtu)
	}
	return mtu - encap.Overhead
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

// lookup looks up the remote in the kernel and builds a route. It also sets underlay and
// bypassBlocker, and rebinds the ipsecPolicy. The caller holds mu, or is Start.
func (t *Tunnel) lookup() (*route, error) {
	var local [4]byte
	if t.cfg.LocalAddress.IsValid() {
		local = t.cfg.LocalAddress.As4()
	}
	device, err := t.underlayDevice()
	if err != nil {
		return nil, err
	}
	remote := t.remote.As4()
	u, err := t.engine.network.Lookup(remote, local, t.cfg.FwMark, device)
	if err != nil {
		return nil, err
	}
	if t.device != nil && u.Device == t.iface.Index && !t.iface.Moved {
		// A loop: the tunnel's own MTU would decrease step by step, and an inner address is
		// no source that the remote knows.
		u.MTU, u.Source = t.underlay.MTU, t.underlay.Source
	}
	if !t.cfg.LocalAddress.IsValid() {
		local = u.Source
	}
	t.underlay = u
	txDrop := t.txDropFor(local, nil)
	if txDrop == drop.None && t.ipsecPolicy != nil {
		if err := t.ipsecPolicy.rebind(local, remote, device); err != nil {
			return nil, err
		}
	}
	pathMTU := t.pathMTU.Effective(u.MTU)
	next := &route{
		outer: encap.Outer{Local: local, Remote: remote, DSCP: t.cfg.DSCP, DontFragmentInherit: t.cfg.DontFragment, TTL: uint8(t.cfg.TTL)},
		path: underlay.Path{
			Local: local, Remote: remote, Mark: t.cfg.FwMark, Device: device,
			MTU:  pathMTU,
			Link: t.link(u, local, remote),
		},
		maxInner:   t.maxInner(pathMTU),
		linkDevice: t.receptionDevice(u, local, remote, device),
		txDrop:     txDrop,
	}
	if txDrop != drop.None {
		next.path.Link = nil
	}
	return next, nil
}

// link returns the Ethernet header to the next hop, or nil if outer packets must go through the
// raw socket, and sets bypassBlocker. The caller holds mu, or is Start.
func (t *Tunnel) link(u netstate.Route, local, remote [4]byte) *underlay.Link {
	reason := t.engine.network.SafeToBypass(u.Device, local, remote)
	t.bypassSafe.Store(reason == "")
	switch {
	case t.cfg.FwMark != 0:
		reason = "fwmark is set"
	case u.Local:
		reason = "the remote is this host"
	case !u.Ethernet:
		reason = "the next hop is not a plain Ethernet neighbour"
	}
	t.bypassBlocker = reason
	if reason != t.loggedBlocker && t.log != nil {
		t.loggedBlocker = reason
		if reason != "" {
			t.log.Debug("outer packets are sent through the raw socket", "because", reason)
		} else {
			t.log.Debug("outer packets are sent as Ethernet frames", "device", u.DeviceName)
		}
	}
	if reason != "" {
		return nil
	}
	if err := t.engine.network.Resolve(u, remote); err != nil && t.log != nil {
		t.log.Debug("the next hop is not resolved", "err", err)
	}
	if !u.Resolved {
		return nil
	}
	l := &underlay.Link{Device: u.Device}
	copy(l.Header[0:], u.DestinationMAC[:])
	copy(l.Header[6:], u.SourceMAC[:])
	binary.BigEndian.PutUint16(l.Header[12:], ipv4.EtherType)
	return l
}

// wantedMTU is the MTU that the interface should have: the configured one, or the route's less
// the overhead.
func (t *Tunnel) wantedMTU() int {
	if t.cfg.MTU != 0 {
		return t.cfg.MTU
	}
	return max(t.maxInner(t.underlay.MTU), encap.MinPathMTU)
}

// updateRoute repeats the route look-up and applies changes to the table, the route, the MTU and
// the fast path. Only the supervisor calls it.
func (t *Tunnel) updateRoute(now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.updatePathMTU(now)
	defer t.syncFastPath()
	t.updateInterface(now)
	next, err := t.lookup()
	if err != nil {
		if !t.noRoute {
			t.log.Warn("no way to the remote; it is looked for", "err", err)
		}
		t.noRoute = true
		t.bypassSafe.Store(false)
		old := t.route.Load()
		if txDrop := t.txDropFor(old.path.Local, err); old.path.Link != nil || txDrop != old.txDrop {
			// Without Link the kernel decides for each packet.
			next := *old
			next.path.Link, next.txDrop = nil, txDrop
			t.replaceRoute(&next, now)
		}
		return
	}
	if t.noRoute {
		t.log.Info("there is a way to the remote again")
		t.noRoute = false
	}
	if old := t.route.Load(); !next.equal(old) {
		if next.path.Local != old.path.Local || next.path.Remote != old.path.Remote {
			if err := t.engine.register(t, &next.path); err != nil {
				t.log.Error("cannot follow the route", "err", err)
				t.bypassSafe.Store(false)
				return
			}
			t.log.Info("outer addresses changed", "local-address", address(next.path.Local), "remote-address", address(next.path.Remote))
		}
		t.replaceRoute(next, now)
	}
	t.updateMTU(now)
}

// updateMTU sets the interface's MTU if wantedMTU has changed. The caller holds mu.
func (t *Tunnel) updateMTU(now time.Time) {
	want := t.wantedMTU()
	if want == t.appliedMTU || t.mtuFeedback(want, now) {
		return
	}
	if err := t.device.SetMTU(want); err != nil {
		if t.rejectedMTU != want {
			t.log.Error("cannot set the MTU", "mtu", want, "err", err)
		}
		t.rejectedMTU = want
		return
	}
	t.log.Info("MTU follows the route", "actual-mtu", want)
	t.appliedMTU, t.rejectedMTU = want, 0
	t.mtu.Store(int32(want))
}

// mtuFeedback reports a recursive route: it leads into another tunnel whose route leads into this
// one, and each lowers the other's MTU by 20. It is detected by repeated decreases on one
// device within a minute, as a real link's MTU does not show.
func (t *Tunnel) mtuFeedback(want int, now time.Time) bool {
	const (
		steps  = 3
		within = time.Minute
	)
	if want > t.appliedMTU || t.underlay.Device != t.mtuDecreases.device || now.Sub(t.mtuDecreases.last) > within {
		t.mtuDecreases = mtuDecreases{device: t.underlay.Device}
	}
	if want > t.appliedMTU {
		return false
	}
	t.mtuDecreases.last = now
	t.mtuDecreases.n++
	if t.mtuDecreases.n == steps+1 {
		t.log.Warn("the MTU is not lowered any further: the route to the remote seems to lead, through another tunnel, into this one",
			"actual-mtu", t.appliedMTU, "device", t.underlay.DeviceName)
	}
	return t.mtuDecreases.n > steps
}

// mtuDecreases counts recent decreases of the MTU on one device.
type mtuDecreases struct {
	device, n int
	last      time.Time
}
