package tunnel

import (
	"context"
	"time"

	"ipipd/encap"
)

// Direct transmission (encap.DirectSetter) is for floods: a frame that is sent so is not
// seen by whoever begins to look in the meantime, and for few packets it is not worth that.

// flood is what the tunnels of a process send, as frames, between two looks.
type flood struct {
	sent   map[*Tunnel]uint64 // packets, when it was last looked
	device int                // the one of most of those sent since then
	rate   float64            // of them, packets a second
}

// look counts what was sent.
func (f *flood) look(tunnels table, between time.Duration) {
	before := f.sent
	f.sent = make(map[*Tunnel]uint64, len(tunnels))
	byDevice := map[int]uint64{}
	for _, t := range tunnels {
		sent, _ := t.counters.tx.load()
		f.sent[t] = sent
		if link := t.route.Load().path.Link; link != nil {
			if last, known := before[t]; known {
				byDevice[link.Device] += sent - last
			}
		}
	}
	f.device, f.rate = 0, 0
	for device, packets := range byDevice {
		if rate := float64(packets) / between.Seconds(); rate > f.rate {
			f.device, f.rate = device, rate
		}
	}
}

// followFlood has frames sent directly while there are many, and nobody is there who has
// to see them.
func (h *Host) followFlood(ctx context.Context, socket encap.DirectSetter) {
	var (
		f      flood
		busy   time.Time // when there was a flood
		device int       // that frames are sent to directly; 0 is none
		reason string    // why none are, as last logged
	)
	keepLooking(ctx, func(now time.Time, between time.Duration) (often bool) {
		f.look(*h.table.Load(), between)
		want := device
		switch {
		case f.rate >= bulkRate:
			busy, want = now, f.device
		case now.Sub(busy) > lull:
			want = 0
		}
		because := ""
		if want != 0 {
			because = h.network.SafeToSendDirectly(want)
		}
		if because != "" {
			want = 0
		}
		// Also where it is on: it may have ended by itself.
		if err := socket.SetDirect(want); err != nil && ctx.Err() == nil {
			because, want = err.Error(), 0
		}
		switch {
		case want == device && because == reason:
		case want != 0:
			h.log.Debug("frames go to the underlay device's driver directly", "device", want)
		case because != "":
			h.log.Debug("frames do not go to the underlay device's driver directly", "because", because)
		case device != 0:
			h.log.Debug("frames no longer go to the underlay device's driver directly: they are few")
		}
		device, reason = want, because
		return f.rate > 0 || device != 0
	})
}
