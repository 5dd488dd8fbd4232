package encap_test

import (
	"testing"
	"time"

	"ipipd/encap"
)

var start = time.Date(2024, 5, 1, 12, 0, 0, 0, time.UTC)

func TestPathMTUIsLearntAndOnlyEverLowered(t *testing.T) {
	var p encap.PathMTU
	if p.Get() != 0 || p.Effective(1500) != 1500 {
		t.Errorf("at first: Get %d, Effective %d", p.Get(), p.Effective(1500))
	}
	for _, step := range []struct {
		nextHopMTU  int
		wantChanged bool
		want        int
	}{
		{1400, true, 1400},
		{1400, false, 1400},
		{1450, false, 1400}, // late, or forged
		{1300, true, 1300},
		{1399, false, 1300},
	} {
		if changed := p.TooBig(start, step.nextHopMTU, 1500); changed != step.wantChanged || p.Get() != step.want {
			t.Errorf("TooBig(%d): changed %v, MTU %d, want %v, %d", step.nextHopMTU, changed, p.Get(), step.wantChanged, step.want)
		}
	}
	if p.Effective(1500) != 1300 || p.Effective(1200) != 1200 {
		t.Errorf("Effective(1500) = %d, Effective(1200) = %d", p.Effective(1500), p.Effective(1200))
	}
}

func TestPathMTUIsNeverBelow68(t *testing.T) {
	for _, nextHopMTU := range []int{1, 67, 68} {
		var p encap.PathMTU
		if p.TooBig(start, nextHopMTU, 1500); p.Get() != 68 {
			t.Errorf("TooBig(%d): MTU %d, want 68", nextHopMTU, p.Get())
		}
	}
	var p encap.PathMTU
	if p.TooBig(start, 0, 20); p.Get() != 68 {
		t.Errorf("no next-hop MTU, quoted 20: MTU %d, want 68", p.Get())
	}
}

func TestPathMTUWithoutANextHopMTUIsThePlateauBelow(t *testing.T) {
	for _, test := range []struct{ quoted, want int }{
		{65535, 32000}, {32001, 32000}, {32000, 17914}, {9000, 8166}, {4352, 2002}, {1500, 1492}, {1492, 1006},
		{1006, 508}, {508, 296}, {297, 296}, {296, 68}, {68, 68},
	} {
		var p encap.PathMTU
		if changed := p.TooBig(start, 0, test.quoted); !changed || p.Get() != test.want {
			t.Errorf("quoted %d: changed %v, MTU %d, want %d", test.quoted, changed, p.Get(), test.want)
		}
	}
}

func TestPathMTUExpiresTenMinutesAfterTheLastTooBig(t *testing.T) {
	var p encap.PathMTU
	if p.Tick(start) {
		t.Error("nothing learnt, and it changed")
	}
	p.TooBig(start, 1400, 1500)
	p.TooBig(start.Add(5*time.Minute), 1400, 1500) // confirms it
	p.TooBig(start.Add(9*time.Minute), 1450, 1500) // does not
	if at := start.Add(15*time.Minute - time.Nanosecond); p.Tick(at) || p.Get() != 1400 {
		t.Errorf("%v after the last: MTU %d", at.Sub(start.Add(5*time.Minute)), p.Get())
	}
	if !p.Tick(start.Add(15*time.Minute)) || p.Get() != 0 || p.Effective(1500) != 1500 {
		t.Errorf("10 minutes after the last: MTU %d", p.Get())
	}
	if !p.TooBig(start.Add(16*time.Minute), 1450, 1500) || p.Get() != 1450 {
		t.Errorf("learnt anew: MTU %d", p.Get())
	}
}

func TestReachabilityIsSoftState(t *testing.T) {
	var r encap.Reachability
	if !r.Reachable(start) {
		t.Error("at first: unreachable")
	}
	if !r.Unreachable(start) || r.Reachable(start) {
		t.Error("after an error: reachable")
	}
	if r.Unreachable(start.Add(20 * time.Second)) {
		t.Error("a second error is no change")
	}
	if r.Reachable(start.Add(50*time.Second - 1)) {
		t.Error("30 s after the last error are not over")
	}
	if !r.Reachable(start.Add(50 * time.Second)) {
		t.Error("30 s after the last error: unreachable")
	}
	r.Unreachable(start)
	if r.Heard(); !r.Reachable(start) {
		t.Error("heard from the remote end: unreachable")
	}
}
