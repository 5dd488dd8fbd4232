package tunnel

import (
	"context"
	"runtime"
	"time"

	"ipipd/fastpath"
)

// What the fast path receives it gives to the host's stack on the processor that it came
// by, packet by packet. Where that is many packets, there are two better ways.
//
// TCP segments that come by themselves, since nothing on the way makes superpackets of
// them as the peer's kernel and a NIC's GRO do, go through a merger: that hands them to
// another processor, put together.
//
// Superpackets of bulk data are spread by flow over all processors (Steer). They wait
// twice in a queue of one processor: before the outer header is taken off, and again
// before the inner stack has it. As the sender's packets come by several processors
// they overtake each other, which TCP takes for loss; spread, the second wait is in one
// queue for each flow, and beside the first one's work.
//
// Acknowledgements lose by being spread, and go past the merger. So do datagrams.

const (
	// While packets come it is looked often what they are, else seldom whether any
	// come.
	lookOften, lookSeldom = 100 * time.Millisecond, 500 * time.Millisecond
	// bulkRate is how many packets a second, a superpacket counting as the packets that
	// it stands for, are worth something: 240 Mb/s of TCP.
	bulkRate = 20_000
	// lull is how long there have to be less before that counts as over.
	lull = 10 * time.Second
	// mergerTries is how often in a row a merger may fail to be made before there is to
	// be none: somebody may take it away before it is complete.
	mergerTries = 3
)

// load is what came between two looks.
type load int

const (
	light        load = iota // not much
	single                   // TCP data, each segment by itself
	superpackets             // bulk data
	other                    // datagrams, acknowledgements of what is sent, or a mixture
)

// weighLoad tells what came between two looks at the statistics.
func weighLoad(last, now fastpath.Stats, between time.Duration, mtu int) load {
	if now.RxPackets <= last.RxPackets { // fewer: another link
		return light
	}
	packets, bytes := now.RxPackets-last.RxPackets, now.RxBytes-last.RxBytes
	threshold := bulkRate * between.Seconds()
	switch merged := !now.Merged.Equal(last.Merged); {
	case float64(packets) < threshold:
		return light
	case merged && bytes/packets >= uint64(mtu)/2:
		return superpackets
	case !merged && float64(now.Single-last.Single) >= threshold:
		return single
	}
	return other
}

// care is what is done about it.
type care struct{ spread, merge bool }

// after is the care to be taken when there was that load, and none that is worth any for
// idle. Without a merger single segments are spread.
func (c care) after(l load, idle time.Duration, canMerge bool) care {
	switch {
	case l == single:
		return care{spread: !canMerge, merge: canMerge}
	case l == superpackets:
		return care{spread: true}
	case idle > lull:
		return care{}
	case l == other:
		c.spread = false
	}
	return c
}

// keepLooking calls look until ctx ends: seldom, and often while look says so. between is
// the time since the call before.
func keepLooking(ctx context.Context, look func(now time.Time, between time.Duration) (often bool)) {
	looked, timer := time.Now(), time.NewTimer(lookSeldom)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		now := time.Now()
		wait := lookSeldom
		if look(now, now.Sub(looked)) {
			wait = lookOften
		}
		looked = now
		timer.Reset(wait)
	}
}

// followBulk takes care of many packets while they come.
func (t *Tunnel) followBulk(ctx context.Context) {
	if runtime.NumCPU() == 1 {
		return
	}
	defer t.stopMerging()
	var (
		busy      time.Time // when there was a load that is worth care
		last      fastpath.Stats
		taken     care
		canSpread = true
		failures  int // in a row, to make a merger
	)
	keepLooking(ctx, func(now time.Time, between time.Duration) (often bool) {
		stats := t.fastStats()
		load := weighLoad(last, stats, between, t.MTU())
		if load == single || load == superpackets {
			busy = now
		}
		want := taken.after(load, now.Sub(busy), failures < mergerTries)
		if want.spread != taken.spread && canSpread {
			if err := t.host.network.Steer(t.Name(), want.spread); err != nil && ctx.Err() == nil {
				canSpread = false
				t.log.Debug("flows that the fast path receives are not spread over the processors", "err", err)
			}
		}
		if !want.merge {
			t.stopMerging()
		} else if err := t.startMerging(); err == nil {
			failures = 0
		} else {
			want.merge = false
			if failures++; failures == mergerTries {
				t.log.Debug("TCP segments that the fast path receives are not put together", "err", err)
			}
		}
		taken = want
		often = stats.RxPackets != last.RxPackets
		last = stats
		return often
	})
}
