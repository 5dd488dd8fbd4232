package tunnel

import (
	"context"
	"fmt"
	"sync"
	"time"

	"ipipd/internal/netstate"
)

// What no netlink message tells of is polled, by one goroutine for all tunnels and only while there is
// traffic:
//   - captures on the egress of an interface, which packets of the fast path skip as they skip its
//     qdisc: the fast path is disabled while either is present, as in RouterOS (netlink tells of the
//     qdisc: netstate.Answer.Egress);
//   - sockets of other processes for protocol 4, from which a fast path with many remotes would keep
//     what it refuses;
//   - legacy iptables;
//   - neighbours in use, whose entries the kernel would let expire;
//   - lost fragments.

const (
	// pollInterval is the period while there is traffic.
	pollInterval = time.Second
	// pollIdle is the period without traffic while a tunnel has the fast path, whose packets
	// wake nobody. Without such a tunnel the poller sleeps until the data path wakes it.
	pollIdle = 10 * time.Second
	// activeFor is how long a tunnel counts as active after its last packet.
	activeFor = 3 * time.Second
	// refreshInterval is the period of Refresh and Recheck, and of updateReception.
	refreshInterval = 5 * time.Second
)

// activity is what poll knows of one tunnel.
type activity struct {
	packets       uint64 // sent and received, as last read
	last          time.Time
	refreshed     time.Time
	checked       time.Time // when checkTaps and checkOthers were last called
	reassembledAt time.Time // when reassembled was read; zero is never
	reassembled   reassembled
}

// active records the tunnel's packet counters and reports whether there was traffic lately.
func (a *activity) active(packets uint64, now time.Time) bool {
	if packets != a.packets {
		a.packets, a.last = packets, now
	}
	return now.Sub(a.last) < activeFor
}

// noteTraffic wakes the poller if it sleeps. The data path calls it after it has counted a batch.
func (e *Engine) noteTraffic() {
	if e.pollerAsleep.Load() && e.pollerAsleep.CompareAndSwap(true, false) {
		select {
		case e.traffic <- struct{}{}:
		default:
		}
	}
}

// poll is the goroutine that polls. It returns when ctx is done.
func (e *Engine) poll(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	var last time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-e.traffic:
			if wait := pollInterval - time.Since(last); wait > 0 {
				timer.Reset(wait)
				continue
			}
		case <-timer.C:
		}
		last = time.Now()
		// Beforehand, so that traffic that pollTunnels does not see yet wakes it again.
		e.pollerAsleep.Store(true)
		switch active, fast := e.pollTunnels(last); {
		case active:
			e.pollerAsleep.Store(false)
			select {
			case <-e.traffic:
			default:
			}
			timer.Reset(pollInterval)
		case fast:
			timer.Reset(pollIdle)
		default:
			timer.Stop()
		}
	}
}

// pollTunnels polls once, and reports whether a tunnel is active, and whether one has the fast
// path.
func (e *Engine) pollTunnels(now time.Time) (active, anyFast bool) {
	others := sync.OnceValue(e.othersReceive)
	taps, reassembly := sync.OnceValue(e.egressTaps), sync.OnceValues(func() (reassembled, error) {
		done, failed, err := e.network.Reassembly()
		return reassembled{done, failed}, err
	})
	for _, t := range *e.table.Load() {
		a := &t.activity
		rx, _, tx, _ := t.totals()
		isActive := a.active(rx+tx, now)
		active = active || isActive
		fast, tap := t.fast.active(), t.fast.tap.Load()
		anyFast = anyFast || fast
		if tap != nil {
			active = true
		}
		if tap != nil || fast && (isActive || now.Sub(a.checked) >= pollIdle) {
			a.checked = now
			t.checkTaps(taps)
			t.checkOthers(others)
		}
		if isActive && now.Sub(a.refreshed) >= refreshInterval {
			a.refreshed = now
			if t.many != nil {
				t.confirmDue.Store(true) // no event: ICMP errors that strangers send can fill the queue
				t.wakeControl()
			} else {
				t.confirmNextHop()
			}
		}
		if isActive {
			t.checkFragmentLoss(now, reassembly)
		}
	}
	if active && now.Sub(e.rechecked) >= refreshInterval {
		e.rechecked = now
		e.network.Recheck()
		e.updateReception() // partialChecksums may have timed out, and a failed SetReceive is tried again
	}
	return active, anyFast
}

// checkTaps wakes control if a tap has appeared or gone.
func (t *Tunnel) checkTaps(taps func() egressTaps) {
	var found *string
	if tap := taps().on(t.iface.Load().Index); tap != "" {
		found = &tap
	}
	old := t.fast.tap.Swap(found)
	if (old == nil) != (found == nil) || old != nil && *old != *found {
		t.wakeControl()
	}
}

// egressTaps are the packet sockets (AF_PACKET) that see what interfaces send, or why they are not known.
type egressTaps struct {
	netstate.Taps
	err error
}

func (e *Engine) egressTaps() (t egressTaps) {
	t.Taps, t.err = e.network.EgressTaps()
	return t
}

// on names a capture that the fast path would hide the interface's packets from; "" if there is none.
func (t egressTaps) on(ifindex int) string {
	if t.err != nil {
		return fmt.Sprintf("cannot tell which captures there are: %v", t.err)
	}
	return t.On(ifindex)
}
