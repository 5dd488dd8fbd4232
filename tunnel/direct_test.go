package tunnel

import (
	"testing"
	"time"

	"ipipd/encap"
)

func TestAFloodIsWhatMostIsSentToOneDevice(t *testing.T) {
	tunnels := table{}
	add := func(key uint64, link *encap.Link) *Tunnel {
		tn := new(Tunnel)
		tn.route.Store(&route{path: encap.Path{Link: link}})
		tn.counters.tx.add(1_000_000, 0) // of long ago
		tunnels[key] = tn
		return tn
	}
	onTwo, alsoOnTwo := add(1, &encap.Link{Device: 2}), add(2, &encap.Link{Device: 2})
	onThree, byRoute := add(3, &encap.Link{Device: 3}), add(4, nil)

	var f flood
	look := func(what string, device int, rate float64) {
		t.Helper()
		if f.look(tunnels, time.Second/10); f.device != device || f.rate != rate {
			t.Errorf("%s: %v packets a second to device %d, not %v to %d", what, f.rate, f.device, rate, device)
		}
	}
	look("what was sent before the first look", 0, 0)
	look("nothing", 0, 0)
	onTwo.counters.tx.add(100, 0)
	alsoOnTwo.counters.tx.add(150, 0)
	onThree.counters.tx.add(200, 0)
	byRoute.counters.tx.add(9000, 0)
	look("two on one device", 2, 2500)
	onThree.counters.tx.add(1, 0)
	look("one of another", 3, 10)
	delete(tunnels, 3)
	onThree.counters.tx.add(1, 0)
	look("one that has ended", 0, 0)
}
