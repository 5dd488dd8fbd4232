package tunnel

import (
	"context"
	"runtime"
	"time"

	"ipipd/fastpath"
)

// What the fast path receives is worth more work while it is bulk data of TCP.
//
// It waits twice in a queue of one processor: before the outer header is taken off, and
// again before the inner stack has it. As the sender's packets come by several
// processors they overtake each other, which TCP takes for loss. Spread by flow over all
// processors (Steer), the second wait is in one queue for each flow, and beside the
// first one's work.
//
// Where nothing on the way makes superpackets of the segments, as the peer's kernel and a
// NIC's GRO do, the host's TCP would get each by itself: they are put together by a
// merger.
//
// Acknowledgements and small datagrams lose by being spread, and go past the merger.

const (
	// While packets come it is looked often what they are, else seldom whether any
	// come.
	lookOften, lookSeldom = 100 * time.Millisecond, 500 * time.Millisecond
	// bulkRate is how many packets a second, a superpacket counting as the packets that
	// it stands for, are bulk data: 240 Mb/s.
	bulkRate = 20_000
	// lull is how long there has to be less before it counts as over.
	lull = 10 * time.Second
)

// load is what came between two looks.
type load int

const (
	light        load = iota // not much
	small                    // many packets, and small: acknowledgements of what is sent, datagrams
	segments                 // bulk data, each segment by itself
	superpackets             // bulk data
)

// weighLoad tells what came between two looks at the statistics.
func weighLoad(last, now fastpath.Stats, between time.Duration, mtu int) load {
	if now.RxPackets <= last.RxPackets { // fewer: another link
		return light
	}
	packets, bytes := now.RxPackets-last.RxPackets, now.RxBytes-last.RxBytes
	switch {
	case float64(packets) < bulkRate*between.Seconds():
		return light
	case bytes/packets < uint64(mtu)/2:
		return small
	case now.Merged.Equal(last.Merged):
		return segments
	}
	return superpackets
}

// care is what is done for bulk data.
type care struct{ spread, merge bool }

// after is the care to be taken when there was that load, and no bulk data for idle.
func (c care) after(l load, idle time.Duration) care {
	switch {
	case l == segments:
		return care{spread: true, merge: true}
	case l == superpackets:
		return care{spread: true}
	case idle > lull:
		return care{}
	case l == small: // which the merger is not in the way of
		c.spread = false
	}
	return c
}

// followBulk takes care of bulk data while there is some.
func (t *Tunnel) followBulk(ctx context.Context) {
	if runtime.NumCPU() == 1 {
		return
	}
	defer t.stopMerging()
	var (
		timer  = time.NewTimer(lookSeldom)
		looked = time.Now()
		busy   time.Time // when there was bulk data
		last   fastpath.Stats
		taken  care
		able   = care{true, true}
	)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		stats, now := t.fastStats(), time.Now()
		load := weighLoad(last, stats, now.Sub(looked), t.MTU())
		if load == segments || load == superpackets {
			busy = now
		}
		want := taken.after(load, now.Sub(busy))
		if want.spread != taken.spread && able.spread {
			if err := t.host.network.Steer(t.Name(), want.spread); err != nil && ctx.Err() == nil {
				able.spread = false
				t.log.Debug("flows that the fast path receives are not spread over the processors", "err", err)
			}
		}
		if want.merge && able.merge {
			if err := t.startMerging(); err != nil {
				able.merge = false
				t.log.Debug("segments that the fast path receives are not put together", "err", err)
			}
		} else {
			t.stopMerging()
		}
		taken = want
		wait := lookSeldom
		if stats.RxPackets != last.RxPackets {
			wait = lookOften
		}
		last, looked = stats, now
		timer.Reset(wait)
	}
}
