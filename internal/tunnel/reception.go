package tunnel

import (
	"sync/atomic"
	"time"

	"ipipd/internal/netstate"
	"ipipd/internal/underlay"
)

// Where outer packets are received: see underlay.Reception.

const (
	// unfinishedMany packets within unfinishedWithin are no chance: one finished checksum
	// in 65,536 looks unfinished.
	unfinishedMany   = 8
	unfinishedWithin = time.Second
	// unfinishedFor is how long they are remembered.
	unfinishedFor = time.Minute
)

// unfinished knows whether packets come whose checksum only the kernel knows to be
// unfinished, or that several were merged into: then the peer is on our own machine, and
// the link layer tells what the raw socket does not. Its methods may be called by several
// goroutines; times are since epoch.
type unfinished struct {
	epoch time.Time
	since atomic.Int64 // when counting began
	count atomic.Int32 // since then
	last  atomic.Int64 // when there last were many; 0 is never
}

// note counts one such packet, and reports whether many have come that did not before.
func (u *unfinished) note(now time.Time) (news bool) {
	at := max(int64(now.Sub(u.epoch)), 1)
	if at-u.since.Load() > int64(unfinishedWithin) {
		u.since.Store(at)
		u.count.Store(0)
	}
	if u.count.Add(1) < unfinishedMany {
		return false
	}
	news = !u.come(now)
	u.last.Store(at)
	return news
}

// come reports whether there are such packets now.
func (u *unfinished) come(now time.Time) bool {
	last := u.last.Load()
	return last != 0 && int64(now.Sub(u.epoch))-last < int64(unfinishedFor)
}

// chooseReceiving decides where packets are received. The link layer tells which
// checksums are unfinished and which packets are several merged into one, and
// lets several threads share the flows; it costs more for each packet, and is
// past netfilter, so it is taken where there is a need and no objection.
func (h *Engine) chooseReceiving() {
	socket, ok := h.socket.(underlay.ReceiveSetter)
	if !ok {
		return
	}
	h.choosing.Lock()
	defer h.choosing.Unlock()
	want := h.wantedReception(time.Now())
	// Also if it is as it was: it may not have been possible in all points.
	err := socket.SetReceive(want)
	if want == h.reception {
		return
	}
	h.reception = want
	if err != nil {
		h.log.Warn("cannot choose where packets are received", "link-layer", want.LinkLayer, "device", want.Device, "err", err)
	} else {
		h.log.Debug("where packets are received", "link-layer", want.LinkLayer, "link-device", want.LinkDevice,
			"device", want.Device, "only-from", address(want.Remote), "only-to", address(want.Local))
	}
}

// wantedReception is what follows from the tunnels as they are.
func (h *Engine) wantedReception(now time.Time) (want underlay.Reception) {
	table := *h.table.Load()
	link := h.wantsLink(now) && len(table) > 0
	for _, t := range table {
		route := t.route.Load()
		if len(table) == 1 { // several share the socket
			want.Device, want.Mark = route.path.Device, route.path.Mark
			want.Local, want.Remote = route.path.Local, route.path.Remote
		}
		// A socket of the link layer looks at the packets of every interface, also at
		// those that the kernel carries: too dear for what it leaves us.
		link = link && t.bypass.Load() && t.fast.link.Load() == nil &&
			route.linkDevice != 0 && (want.LinkDevice == 0 || want.LinkDevice == route.linkDevice)
		want.LinkDevice = route.linkDevice
	}
	if want.LinkLayer = link; !link {
		want.LinkDevice = 0
	}
	return want
}

// wantsLink reports whether the link layer is worth what it costs.
func (h *Engine) wantsLink(now time.Time) bool {
	return (h.threads > 1 || h.unfinished.come(now)) && !h.linkFailed.Load()
}

// receptionDevice is the index of the interface that outer packets leave by, if they may
// be received from its link layer: rp_filter has no objection to what comes from the
// remote by an interface that packets to it leave by. It follows the routes without a
// mark or a device, though. 0 is none.
func (t *Tunnel) receptionDevice(u netstate.Route, local, remote [4]byte, device int) int {
	if u.VRF || u.Local || !t.host.wantsLink(time.Now()) {
		return 0
	}
	if t.cfg.FwMark != 0 || device != 0 || !t.cfg.LocalAddress.IsValid() {
		back, err := t.host.network.Lookup(remote, local, 0, 0)
		if err != nil || back.Device != u.Device {
			return 0
		}
	}
	return u.Device
}

// leaveLink goes on with the raw socket alone, for good: the flows of a Receiver that has
// ended are not given to the others.
func (h *Engine) leaveLink(err error) {
	if h.linkFailed.Swap(true) {
		return
	}
	h.log.Warn("packets are received from the raw socket only, by one thread", "err", err)
	h.chooseReceiving()
}
