package tunnel

import (
	"testing"
	"time"

	"ipipd/internal/ipv4"
)

func TestLimiterAllow(t *testing.T) {
	for _, most := range []int32{perSecond, remotePerSecond} {
		testLimiterAllow(t, most)
	}
}

func testLimiterAllow(t *testing.T, most int32) {
	t.Helper()
	var l limiter
	second := time.Unix(1_700_000_000, 0)
	for _, now := range []time.Time{second, second.Add(time.Second), second.Add(time.Hour)} {
		for i := range 3 * most {
			if got, want := l.allow(now.Add(time.Duration(i)*time.Microsecond), most), i < most; got != want {
				t.Fatalf("event %d of a second: %v", i+1, got)
			}
		}
	}
}

// Many probes from one remote, or with its address forged, do not keep those of other remotes from being answered.
func TestTunnelReflects(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	of, one, other := new(Tunnel), &route{remote: new(remote)}, &route{remote: new(remote)}
	for i := range 3 * remotePerSecond {
		if got, want := of.reflects(one, now), i < remotePerSecond; got != want {
			t.Fatalf("probe %d of a remote: %v", i+1, got)
		}
	}
	if !of.reflects(other, now) || !of.reflects(nil, now) || !of.reflects(new(route), now) {
		t.Error("those of others are not answered")
	}
}

// ICMP errors to an inner sender that ignores them are rate-limited; its packets are all counted.
func TestTunnelSendICMPError_rateLimit(t *testing.T) {
	a, b := pair(t, func(c *Config) { c.DontFragment = true })
	p := datagram(1480, func(h *ipv4.Header) { h.DF = true })
	if err := a.socket.InjectError(outerError(outerA, outerB, p, 4, 1400)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the path MTU is learnt", func() bool { return a.Status().PathMTU == 1400 })
	var sent uint64
	eventually(t, "those that are not made are counted", func() bool {
		for range 100 {
			if err := a.device.Inject(p); err != nil {
				t.Fatal(err)
			}
			sent++
		}
		return a.Status().Drops["icmp-limited"] > 0
	})
	eventually(t, "all packets are counted", func() bool { return a.Status().Drops["too-big"] == sent })
	if p := datagram(1380, nil); len(a.send(t, b, p)) != len(p) {
		t.Error("what fits does not pass")
	}
}
