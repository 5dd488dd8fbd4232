package tunnel

import (
	"encoding/binary"
	"time"

	"ipipd/encap"
	"ipipd/internal/ipv4"
	"ipipd/internal/netstate"
	"ipipd/internal/underlay"
)

// route is how outer packets are made and where they go, at one time. It is never
// changed, only replaced.
type route struct {
	outer encap.Outer
	path  underlay.Path
	// maxInner is the largest inner packet that goes along path whole, in bytes.
	maxInner int
	// linkDevice is the interface whose link layer they may be received from: see receptionDevice.
	linkDevice int
	// refuse is why nothing must be sent: see Tunnel.refusal.
	refuse encap.Drop
}

// maxInner is the largest inner packet that goes along a path with that MTU whole.
func (t *Tunnel) maxInner(mtu int) int {
	if t.ipsecPolicy != nil {
		return t.ipsecPolicy.maxInner(mtu)
	}
	return mtu - encap.Overhead
}

// equal compares the Links by what they say.
func (r *route) equal(other *route) bool {
	a, b := *r, *other
	if (a.path.Link == nil) != (b.path.Link == nil) || a.path.Link != nil && *a.path.Link != *b.path.Link {
		return false
	}
	a.path.Link, b.path.Link = nil, nil
	return a == b
}

// lookup finds the way to the remote and makes a route of it. The caller holds
// mu, or is alone.
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
	u, err := t.host.network.Lookup(remote, local, t.cfg.FwMark, device)
	if err != nil {
		return nil, err
	}
	if t.device != nil && u.Device == t.iface.Index && !t.iface.Moved {
		// A loop. An MTU that followed from its own would go down by itself, and
		// an inner address would be a source that the remote does not know.
		u.MTU, u.Source = t.underlay.MTU, t.underlay.Source
	}
	if !t.cfg.LocalAddress.IsValid() {
		local = u.Source
	}
	t.underlay = u
	refuse := t.refusal(local, nil)
	if refuse == encap.DropNone && t.ipsecPolicy != nil {
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
		refuse:     refuse,
	}
	if refuse != encap.DropNone {
		next.path.Link = nil
	}
	return next, nil
}

// link is the Ethernet next hop, or nil where outer packets have to take the
// kernel's own way. The caller holds mu, or is alone.
func (t *Tunnel) link(u netstate.Route, local, remote [4]byte) *underlay.Link {
	reason := t.host.network.SafeToBypass(u.Device, local, remote)
	t.bypass.Store(reason == "")
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
	if err := t.host.network.Resolve(u, remote); err != nil && t.log != nil {
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

// wantedMTU is the MTU that the interface should have.
func (t *Tunnel) wantedMTU() int {
	if t.cfg.MTU != 0 {
		return t.cfg.MTU
	}
	return max(t.maxInner(t.underlay.MTU), encap.MinPathMTU)
}

// followRoute looks at the way to the remote again and puts what changed to use.
func (t *Tunnel) followRoute(now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.followPathMTU(now)
	defer t.syncFastPath()
	t.followInterface(now)
	next, err := t.lookup()
	if err != nil {
		if !t.noRoute {
			t.log.Warn("no way to the remote; it is looked for", "err", err)
		}
		t.noRoute = true
		t.bypass.Store(false)
		old := t.route.Load()
		if refuse := t.refusal(old.path.Local, err); old.path.Link != nil || refuse != old.refuse {
			// The kernel is to decide about each packet, not what it once said.
			next := *old
			next.path.Link, next.refuse = nil, refuse
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
			if err := t.host.register(t, &next.path); err != nil {
				t.log.Error("cannot follow the route", "err", err)
				t.bypass.Store(false)
				return
			}
			t.log.Info("outer addresses changed", "local-address", address(next.path.Local), "remote-address", address(next.path.Remote))
		}
		t.replaceRoute(next, now)
	}
	t.followMTU(now)
}

// followMTU sets the interface's MTU when the route calls for another. The caller
// holds mu.
func (t *Tunnel) followMTU(now time.Time) {
	want := t.wantedMTU()
	if want == t.wanted || t.mtuFeedback(want, now) {
		return
	}
	if err := t.device.SetMTU(want); err != nil {
		if t.unsettable != want {
			t.log.Error("cannot set the MTU", "mtu", want, "err", err)
		}
		t.unsettable = want
		return
	}
	t.log.Info("MTU follows the route", "actual-mtu", want)
	t.wanted, t.unsettable = want, 0
	t.mtu.Store(int32(want))
}

// mtuFeedback reports whether the MTU follows itself: the route leads into another
// tunnel whose own route leads into this one, and each takes 20 off the other's.
// A link that is made smaller does not do so step by step, again and again.
func (t *Tunnel) mtuFeedback(want int, now time.Time) bool {
	const (
		steps  = 3
		within = time.Minute
	)
	if want > t.wanted || t.underlay.Device != t.mtuDecreases.device || now.Sub(t.mtuDecreases.last) > within {
		t.mtuDecreases = mtuDecreases{device: t.underlay.Device}
	}
	if want > t.wanted {
		return false
	}
	t.mtuDecreases.last = now
	t.mtuDecreases.n++
	if t.mtuDecreases.n == steps+1 {
		t.log.Warn("the MTU is not lowered any further: the route to the remote seems to lead, through another tunnel, into this one",
			"actual-mtu", t.wanted, "device", t.underlay.DeviceName)
	}
	return t.mtuDecreases.n > steps
}

// mtuDecreases is how often the MTU had to go down, lately and on one device.
type mtuDecreases struct {
	device, n int
	last      time.Time
}
