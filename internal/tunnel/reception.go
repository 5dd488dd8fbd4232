package tunnel

import (
	"sync/atomic"
	"time"

	"ipipd/internal/netstate"
	"ipipd/internal/underlay"
)

// Reception of outer packets by the raw socket or from the link layer: see
// underlay.Reception.

const (
	// partialThreshold packets within partialWindow activate the detector. A complete checksum
	// looks partial once in 65,536 packets.
	partialThreshold = 8
	partialWindow    = time.Second
	// partialTimeout is the time without such packets that deactivates it.
	partialTimeout = time.Minute
)

// partialDetector detects packets with a partial checksum (CHECKSUM_PARTIAL) or of GSO, as come
// from a peer on the same machine. Only a packet socket gets that metadata; a raw socket does
// not. Its methods are safe for concurrent use. Times are nanoseconds after epoch.
type partialDetector struct {
	epoch time.Time
	since atomic.Int64 // start of the window
	count atomic.Int32 // in the window
	last  atomic.Int64 // when the threshold was last reached; 0 is never
}

// observe counts one such packet, and reports whether it activated the detector.
func (d *partialDetector) observe(now time.Time) (started bool) {
	at := max(int64(now.Sub(d.epoch)), 1)
	if at-d.since.Load() > int64(partialWindow) {
		d.since.Store(at)
		d.count.Store(0)
	}
	if d.count.Add(1) < partialThreshold {
		return false
	}
	started = !d.active(now)
	d.last.Store(at)
	return started
}

// active reports whether the threshold was reached within partialTimeout.
func (d *partialDetector) active(now time.Time) bool {
	last := d.last.Load()
	return last != 0 && int64(now.Sub(d.epoch))-last < int64(partialTimeout)
}

// updateReception selects reception by the raw socket or from the link layer. The link layer
// marks partial checksums and GSO packets, and lets threads share the flows by packet fanout.
// It costs more per packet and bypasses netfilter, so it is used only where needed and safe.
//
// Each of the tunnels votes anew; the others' votes stay, so that this takes constant time.
func (e *Engine) updateReception(tunnels ...*Tunnel) {
	socket, ok := e.socket.(underlay.ReceiveSetter)
	if !ok {
		return
	}
	e.receptionMu.Lock()
	defer e.receptionMu.Unlock()
	for _, t := range tunnels {
		e.linkVotes.cast(t)
	}
	want := e.wantedReception(time.Now())
	// Repeat it even if unchanged: an earlier call may have failed in part.
	err := socket.SetReceive(want)
	if want == e.reception {
		return
	}
	e.reception = want
	if err != nil {
		e.log.Warn("cannot choose where packets are received", "link-layer", want.LinkLayer, "device", want.Device, "err", err)
	} else {
		e.log.Debug("where packets are received", "link-layer", want.LinkLayer, "link-device", want.LinkDevice,
			"device", want.Device, "only-from", address(want.Remote), "only-to", address(want.Local))
	}
}

// wantedReception derives the reception from the present tunnels.
func (e *Engine) wantedReception(now time.Time) (want underlay.Reception) {
	table := *e.table.Load()
	if len(table) == 1 && len(*e.others.Load()) == 0 { // several share the socket
		for _, t := range table {
			path := &t.route.Load().path
			want.Device, want.Mark = path.Device, path.Mark
			if t.many == nil {
				want.Local, want.Remote = path.Local, path.Remote
			}
		}
	}
	if device := e.linkVotes.device(); device != 0 && e.wantsLinkLayer(now) {
		want.LinkLayer, want.LinkDevice = true, device
	}
	return want
}

// linkVotes counts, by ifindex, the tunnels whose packets may be received from the link layer of that
// interface; under 0 those whose packets may not.
type linkVotes map[int]int

// cast replaces a tunnel's vote. One that is closing or suspended has none.
func (v linkVotes) cast(t *Tunnel) {
	if t.linkVoted {
		if v[t.linkVote]--; v[t.linkVote] == 0 {
			delete(v, t.linkVote)
		}
	}
	if t.linkVoted = !t.closing.Load() && !t.suspended(); !t.linkVoted {
		return
	}
	// A packet socket also sees the packets that the fast path forwards; with the fast
	// path active that is too expensive.
	t.linkVote = 0
	if route := t.route.Load(); route.bypassSafe && !t.fast.active() && t.fast.blocker.Load() != nil {
		t.linkVote = int(route.linkDevice)
	}
	v[t.linkVote]++
}

// device is the interface that all votes are for, 0 if there is none.
func (v linkVotes) device() int {
	if len(v) == 1 {
		for device := range v {
			return device
		}
	}
	return 0
}

// wantsLinkLayer reports whether the link layer is worth its cost per packet.
func (e *Engine) wantsLinkLayer(now time.Time) bool {
	return (e.threads > 1 || e.partialChecksums.active(now)) && !e.linkLayerFailed.Load()
}

// receptionDevice returns the ifindex that outer packets leave by, if they may be received from its link
// layer; 0 if not. A packet socket skips rp_filter, which must expect the remote on that interface.
func (c *control) receptionDevice(u *netstate.Route) int {
	if u.VRF || u.Local || c.answer.ReturnDevice != u.Device {
		return 0
	}
	return u.Device
}

// disableLinkLayer falls back to the raw socket permanently: packet fanout does not move the
// flows of a failed Receiver to the others.
func (e *Engine) disableLinkLayer(err error) {
	if e.linkLayerFailed.Swap(true) {
		return
	}
	e.log.Warn("packets are received from the raw socket only, by one thread", "err", err)
	e.updateReception()
}
