package tunnel

import (
	"context"
	"runtime"
	"time"

	"ipipd/fastpath"
)

// What the fast path receives waits twice in a queue of one processor: before the
// outer header is taken off, and again before the inner stack has it. Where every
// segment comes by itself that is the bottleneck, and while the sender's packets come
// by several processors they overtake each other, which TCP takes for loss. Spread by
// flow over all processors, the second wait is in one queue for each flow, and beside
// the first one's work: a TCP stream over an underlay without GRO gains half as much
// again. Superpackets have nothing to gain, and lose the warmth of their cache.

const (
	// steerEvery is how often it is looked at what comes, and steerFrom how many
	// packets in that time say anything.
	steerEvery = time.Second
	steerFrom  = 1000
)

// followSteering spreads what the fast path receives over the processors while that
// is data in single segments. Acknowledgements and small datagrams only lose.
func (t *Tunnel) followSteering(ctx context.Context) {
	if runtime.NumCPU() == 1 {
		return
	}
	ticker := time.NewTicker(steerEvery)
	defer ticker.Stop()
	var last fastpath.Stats
	steered := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		now := t.fastStats()
		if want := steers(steered, last, now, t.MTU()); want != steered {
			if err := t.host.network.Steer(t.Name(), want); err != nil {
				if ctx.Err() == nil {
					t.log.Debug("flows that the fast path receives are not spread over the processors", "err", err)
				}
				return
			}
			steered = want
		}
		last = now
	}
}

// steers reports whether what came between two looks is to be spread, or what there
// is to stay as it is.
func steers(steered bool, last, now fastpath.Stats, mtu int) bool {
	packets, bytes := now.RxPackets-last.RxPackets, now.RxBytes-last.RxBytes
	switch {
	case now.RxPackets < last.RxPackets: // another link
		return false
	case packets < steerFrom:
		return steered
	}
	return now.Merged.Equal(last.Merged) && bytes/packets >= uint64(mtu)/2
}
