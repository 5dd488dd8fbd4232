package capture

import (
	"bytes"
	"encoding/binary"
	"sync"
	"testing"
	"time"

	"ipipd/internal/drop"
)

// filled returns a packet of n bytes that has producer and i in it.
func filled(n int, producer, i uint32) []byte {
	p := bytes.Repeat([]byte{byte(i)}, n)
	binary.BigEndian.PutUint32(p, producer)
	binary.BigEndian.PutUint32(p[4:], i)
	return p
}

// Packets of several goroutines come out whole, in the order of each, and what there was no room for is counted.
func TestRing_concurrent(t *testing.T) {
	r := NewRing(Options{})
	const producers, each = 4, 40_000
	var wg sync.WaitGroup
	for producer := range uint32(producers) {
		wg.Go(func() {
			for i := range uint32(each) {
				h := Rings{r}.Hold(OuterIn, filled(8+int(i*7919%1500), producer, i), i, time.Unix(1, 0))
				h.Settle(drop.None)
			}
		})
	}
	ended := make(chan struct{})
	go func() {
		wg.Wait()
		close(ended)
	}()
	var last [producers]uint32
	taken := uint64(0)
	for done := false; ; {
		s := r.next()
		if s == nil {
			if done {
				break
			}
			select {
			case <-ended:
				done = true // once more
			default:
			}
			continue
		}
		p := s.bytes
		producer, i := binary.BigEndian.Uint32(p), binary.BigEndian.Uint32(p[4:])
		if i < last[producer] || len(p) != 8+int(i*7919%1500) || !bytes.Equal(p[8:], bytes.Repeat([]byte{byte(i)}, len(p)-8)) {
			t.Fatalf("packet %d of %d has %d bytes: %x", i, producer, len(p), p)
		}
		last[producer] = i + 1
		taken++
		r.release(s)
	}
	if missed := r.missed[outerInterface].Load(); taken+missed != producers*each || taken < ringSlots/4 {
		t.Errorf("%d were taken out, %d were missed, of %d", taken, missed, producers*each)
	}
}

// The positions of slots and of bytes wrap at 2³².
func TestRing_wrap(t *testing.T) {
	r := NewRing(Options{})
	const start = 1<<32 - 3
	r.head.Store(start<<32 | 1<<32 - 1000)
	r.tail.Store(start<<32 | 1<<32 - 1000)
	for i := range uint32(3 * ringSlots) {
		p := filled(900, 0, i)
		Rings{r}.Packet(InnerOut, p, i, drop.None, time.Unix(1, 0))
		s := r.next()
		if s == nil || !bytes.Equal(s.bytes, p) || s.id != i {
			t.Fatalf("packet %d: %+v", i, s)
		}
		r.release(s)
	}
	if missed := r.missed[innerInterface].Load(); missed > 0 {
		t.Errorf("%d were missed", missed)
	}
}

// A ring that nobody reads takes what it has room for, and counts as missed the rest of what its Options want.
func TestRing_full(t *testing.T) {
	all, drops, inner := NewRing(Options{}), NewRing(Options{Drops: true}), NewRing(Options{InnerOnly: true})
	rings := Rings{all, drops, inner}
	const n = 3 * ringSlots
	for range n {
		h := rings.Hold(OuterIn, make([]byte, 1500), 1, time.Unix(1, 0))
		h.Settle(drop.None)
		rings.Packet(OuterIn, nil, 1, drop.None, time.Unix(1, 0))
	}
	for range n {
		rings.Packet(OuterIn, make([]byte, 100), 1, drop.OuterChecksum, time.Unix(1, 0))
		rings.Lost(drop.TooBig, 2, time.Unix(1, 0))
	}
	for name, want := range map[string]struct {
		ring      *Ring
		wanted    uint64
		discarded bool
	}{"all": {all, 5 * n, false}, "drops": {drops, 3 * n, true}, "inner": {inner, 2 * n, false}} {
		taken, missed := uint64(0), uint64(0)
		for s := want.ring.next(); s != nil; s = want.ring.next() {
			if !s.discard {
				taken += uint64(max(1, s.lost))
			}
			want.ring.release(s)
		}
		for i := range want.ring.missed {
			missed += want.ring.missed[i].Load()
		}
		if taken+missed != want.wanted || missed == 0 || taken == 0 && !want.discarded {
			t.Errorf("%s: %d were taken out, %d missed, want %d in all", name, taken, missed, want.wanted)
		}
		if h := (Rings{want.ring}).Hold(InnerIn, make([]byte, MaxSnaplen), 1, time.Unix(1, 0)); h.slots[0] == nil {
			t.Errorf("%s: there is no room afterwards", name)
		}
	}
}

// Of a packet no more than Snaplen is kept, and the length is the packet's.
func TestRing_snaplen(t *testing.T) {
	r := NewRing(Options{Snaplen: 64})
	Rings{r}.Packet(InnerIn, filled(1000, 1, 2), 1, drop.None, time.Unix(1, 0))
	if s := r.next(); len(s.bytes) != 64 || s.length != 1000 {
		t.Errorf("%d of %d bytes", len(s.bytes), s.length)
	}
}

// A held packet is not taken out before it is settled or discarded, nor is any packet after it.
func TestHeld(t *testing.T) {
	r := NewRing(Options{})
	h := Rings{r}.Hold(InnerIn, []byte{1}, 1, time.Unix(1, 0))
	gone := Rings{r}.Hold(InnerIn, []byte{2}, 2, time.Unix(1, 0))
	Rings{r}.Packet(InnerIn, []byte{3}, 3, drop.None, time.Unix(1, 0))
	gone.Discard()
	if s := r.next(); s != nil {
		t.Fatalf("taken out: %+v", s)
	}
	h.Settle(drop.WriteFailed)
	for _, want := range []struct {
		id      uint32
		discard bool
		why     drop.Reason
	}{{1, false, drop.WriteFailed}, {2, true, drop.None}, {3, false, drop.None}} {
		s := r.next()
		if s == nil || s.id != want.id || s.discard != want.discard || s.why != want.why {
			t.Fatalf("%+v, want %+v", s, want)
		}
		r.release(s)
	}
}

// A ring that was full takes packets again once half of it is free, so that it has long runs without a gap.
func TestRing_reopens(t *testing.T) {
	r := NewRing(Options{})
	rings := Rings{r}
	put := func() { rings.Packet(OuterIn, nil, 1, drop.None, time.Unix(1, 0)) }
	for range ringSlots {
		put()
	}
	if rings.Full() || rings.Room() {
		t.Fatal("it is full before a packet has no room, or has room")
	}
	put()
	for i := range ringSlots / 2 {
		if !rings.Full() {
			t.Fatalf("it takes packets again when %d are taken out", i)
		}
		put()
		r.release(r.next())
	}
	if rings.Full() || !rings.Room() {
		t.Fatal("it takes no packet again")
	}
	put()
	rings.Missed(OuterIn, drop.None, 3)
	if n := r.missed[outerInterface].Load(); n != 1+ringSlots/2+3 {
		t.Errorf("%d were missed", n)
	}
}

// Missed counts in each ring the packets that its Options want. Wanted returns what the rings want together.
func TestRings_Missed(t *testing.T) {
	all, drops, inner := NewRing(Options{}), NewRing(Options{Drops: true, Snaplen: 100}), NewRing(Options{InnerOnly: true, Snaplen: 200})
	rings := Rings{all, drops, inner}
	rings.Missed(InnerOut, drop.None, 1)
	rings.Missed(OuterOut, drop.TooBig, 10)
	for i, want := range []uint64{11, 10, 1} {
		if got := rings[i].missed[innerInterface].Load() + rings[i].missed[outerInterface].Load(); got != want {
			t.Errorf("ring %d has missed %d, want %d", i, got, want)
		}
	}
	for _, x := range []struct {
		of      Rings
		snaplen int
		drops   bool
	}{{rings, MaxSnaplen, false}, {Rings{drops}, 100, true}, {Rings{inner, drops}, 200, false}} {
		if snaplen, drops := x.of.Wanted(); snaplen != x.snaplen || drops != x.drops {
			t.Errorf("wanted are %d bytes, drops: %v; want %+v", snaplen, drops, x)
		}
	}
}

// Of a packet of which only the beginning is given the length is that of the whole packet.
func TestRings_Snapped(t *testing.T) {
	r := NewRing(Options{Snaplen: 64})
	Rings{r}.Snapped(InnerIn, filled(100, 1, 2), 60_000, 1, drop.None, time.Unix(1, 0))
	if s := r.next(); len(s.bytes) != 64 || s.length != 60_000 {
		t.Errorf("%d of %d bytes", len(s.bytes), s.length)
	}
}

// Nothing is allocated for a packet.
func TestRings_allocs(t *testing.T) {
	r := NewRing(Options{})
	rings, p, now := Rings{r, NewRing(Options{Drops: true})}, make([]byte, 1500), time.Now()
	if n := testing.AllocsPerRun(1000, func() {
		h := rings.Hold(InnerIn, p, 1, now)
		h.Settle(drop.None)
		rings.Packet(OuterOut, p, 1, drop.TooBig, now)
		rings.Lost(drop.NoPath, 1, now)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkRings_Packet(b *testing.B) {
	r := NewRing(Options{})
	p, now := make([]byte, 1500), time.Now()
	for b.Loop() {
		Rings{r}.Packet(OuterOut, p, 1, drop.None, now)
		if s := r.next(); s != nil {
			r.release(s)
		}
	}
}
