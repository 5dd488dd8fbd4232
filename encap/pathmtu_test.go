package encap_test

import (
	"testing"
	"time"

	"ipipd/encap"
	"ipipd/internal/drop"
)

var start = time.Date(2024, 5, 1, 12, 0, 0, 0, time.UTC)

// tooBig returns a datagram too big about a packet of quoted bytes with DF=1.
func tooBig(nextHopMTU, quoted int) *encap.OuterError {
	return &encap.OuterError{Type: 3, Code: 4, NextHopMTU: nextHopMTU, TotalLen: quoted, DF: true}
}

// The estimate is only ever lowered.
func TestPathMTUTooBig(t *testing.T) {
	var p encap.PathMTU
	if p.Get() != 0 || p.Effective(1500) != 1500 {
		t.Errorf("at first: Get %d, Effective %d", p.Get(), p.Effective(1500))
	}
	for _, step := range []struct {
		nextHopMTU  int
		wantChanged bool
		wantDrop    drop.Reason
		want        int
	}{
		{1400, true, drop.None, 1400},
		{1400, false, drop.None, 1400},
		{1450, false, drop.OuterErrorNotBelieved, 1400}, // late, or forged
		{1300, true, drop.None, 1300},
		{1399, false, drop.OuterErrorNotBelieved, 1300},
	} {
		if changed, d := p.TooBig(start, tooBig(step.nextHopMTU, 1500), 1500); changed != step.wantChanged || d != step.wantDrop || p.Get() != step.want {
			t.Errorf("TooBig(%d): changed %v, drop %v, MTU %d, want %v, %v, %d",
				step.nextHopMTU, changed, d, p.Get(), step.wantChanged, step.wantDrop, step.want)
		}
	}
	if p.Effective(1500) != 1300 || p.Effective(1200) != 1200 {
		t.Errorf("Effective(1500) = %d, Effective(1200) = %d", p.Effective(1500), p.Effective(1200))
	}
}

// Messages that no router would send do not change the estimate.
func TestPathMTUTooBig_plausibility(t *testing.T) {
	for _, test := range []struct {
		name         string
		e            *encap.OuterError
		link, before int // before: a next-hop MTU learnt before, or 0
		want         int // Get after TooBig
		drop         drop.Reason
	}{
		{"plausible", tooBig(1400, 1500), 1500, 0, 1400, drop.None},
		{"quoted-df-clear", &encap.OuterError{Type: 3, Code: 4, NextHopMTU: 1400, TotalLen: 1500}, 1500, 0, 0, drop.OuterErrorNotBelieved},
		{"quoted-fits", tooBig(1400, 1400), 1500, 0, 0, drop.OuterErrorNotBelieved},
		{"quoted-fits-the-floor", tooBig(100, 552), 1500, 0, 0, drop.OuterErrorNotBelieved},
		{"quoted-superpacket", tooBig(1400, 64000), 1500, 0, 1400, drop.None}, // a router with GRO
		{"more-than-the-link", tooBig(9000, 60000), 1500, 0, 0, drop.OuterErrorNotBelieved},
		{"as-the-link", tooBig(1500, 60000), 1500, 0, 0, drop.None},
		{"more-than-known", tooBig(1450, 1500), 1500, 1400, 1400, drop.OuterErrorNotBelieved},
		{"more-than-a-link-that-shrank", tooBig(1350, 1500), 1300, 1400, 1400, drop.OuterErrorNotBelieved},
	} {
		t.Run(test.name, func(t *testing.T) {
			var p encap.PathMTU
			if test.before != 0 {
				p.TooBig(start, tooBig(test.before, 1500), 1500)
			}
			changed, d := p.TooBig(start, test.e, test.link)
			if d != test.drop || p.Get() != test.want || changed != (test.want != test.before) {
				t.Errorf("changed %v, drop %v, MTU %d, want %v, %d", changed, d, p.Get(), test.drop, test.want)
			}
		})
	}
}

func TestPathMTUTooBig_floor(t *testing.T) {
	for _, floor := range []int{0, 68, 1280} {
		want := floor
		if floor == 0 {
			want = encap.DefaultFloor
		}
		for _, nextHopMTU := range []int{1, 67, 68} {
			p := encap.PathMTU{Floor: floor}
			if p.TooBig(start, tooBig(nextHopMTU, 1500), 1500); p.Get() != max(want, nextHopMTU) {
				t.Errorf("TooBig(%d): MTU %d, want %d", nextHopMTU, p.Get(), want)
			}
			if p.Tick(start.Add(time.Hour)); p.Floor != floor {
				t.Error("it forgets its floor")
			}
		}
	}
}

func TestPathMTUTooBig_plateaus(t *testing.T) {
	for _, test := range []struct{ quoted, want int }{
		{65535, 32000}, {32001, 32000}, {32000, 17914}, {9000, 8166}, {4352, 2002}, {1500, 1492}, {1492, 1006},
		{1006, 508}, {508, 296}, {297, 296}, {296, 68}, {69, 68},
	} {
		p := encap.PathMTU{Floor: 68}
		if changed, d := p.TooBig(start, tooBig(0, test.quoted), 65535); !changed || d != drop.None || p.Get() != test.want {
			t.Errorf("quoted %d: changed %v, drop %v, MTU %d, want %d", test.quoted, changed, d, p.Get(), test.want)
		}
	}
}

// The estimate expires ten minutes after the last too big that confirmed it.
func TestPathMTUTick(t *testing.T) {
	var p encap.PathMTU
	if p.Tick(start) {
		t.Error("nothing learnt, and it changed")
	}
	p.TooBig(start, tooBig(1400, 1500), 1500)
	p.TooBig(start.Add(5*time.Minute), tooBig(1400, 1500), 1500) // confirms it
	p.TooBig(start.Add(9*time.Minute), tooBig(1450, 1500), 1500) // does not
	if at := start.Add(15*time.Minute - time.Nanosecond); p.Tick(at) || p.Get() != 1400 {
		t.Errorf("%v after the last: MTU %d", at.Sub(start.Add(5*time.Minute)), p.Get())
	}
	if !p.Tick(start.Add(15*time.Minute)) || p.Get() != 0 || p.Effective(1500) != 1500 {
		t.Errorf("10 minutes after the last: MTU %d", p.Get())
	}
	if changed, _ := p.TooBig(start.Add(16*time.Minute), tooBig(1450, 1500), 1500); !changed || p.Get() != 1450 {
		t.Errorf("learnt anew: MTU %d", p.Get())
	}
}

// Reachability expires 30 s after the last error, or when a packet is received.
func TestReachability(t *testing.T) {
	var r encap.Reachability
	if !r.Reachable(start) {
		t.Error("at first: unreachable")
	}
	if r.MarkUnreachable(start); r.Reachable(start) {
		t.Error("after an error: reachable")
	}
	r.MarkUnreachable(start.Add(20 * time.Second))
	if r.Reachable(start.Add(50*time.Second - 1)) {
		t.Error("30 s after the last error are not over")
	}
	if !r.Reachable(start.Add(50 * time.Second)) {
		t.Error("30 s after the last error: unreachable")
	}
	r.MarkUnreachable(start)
	if r.MarkReachable(); !r.Reachable(start) {
		t.Error("after a packet from the remote end: unreachable")
	}
}
