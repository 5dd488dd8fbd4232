package tunnel

import (
	"bytes"
	"testing"
	"time"

	"ipipd/internal/capture"
	"ipipd/internal/drop"
	"ipipd/internal/fastpath"
	"ipipd/test/netlab"
)

// A packet that the fast path has carried, or failed to send, is captured as inner and as outer packet, under one ID and
// with its length; a received one that it has dropped only as it came. A dropped one has the reason.
func TestCaptureFast(t *testing.T) {
	inner := datagram(200, nil)
	outer := outerPacket(t, outerB.As4(), inner)
	at := time.Unix(5, 7)
	ring := capture.NewRing(capture.Options{Snaplen: 64})
	for _, p := range []fastpath.Captured{
		{At: at, Outbound: true, Length: len(outer), Outer: outer[:90]},
		{At: at, Length: len(outer), Outer: outer[:90]},
		{At: at, Length: len(outer), Outer: outer[:90], Why: fastpath.NotInAcceptTo},
		{At: at, Length: len(outer), Outer: outer[:90], Why: fastpath.ReversePath},
		{At: at, Length: len(outer), Outer: outer[:90], Why: fastpath.NotInAcceptFrom},
		{At: at, Outbound: true, Length: len(outer), Outer: outer[:90], Why: fastpath.SendFailed},
	} {
		captureFast(capture.Rings{ring}, &p)
	}
	var out bytes.Buffer
	s, err := capture.NewStream(&out, ring, capture.Header{Tunnel: "t0"}, at)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.End(at); err != nil {
		t.Fatal(err)
	}
	f, err := netlab.ReadCapture(out.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	type seen struct {
		where, direction string
		of               int
		why              drop.Reason
	}
	want := []seen{
		{"inner", "out", 1, drop.None}, {"outer", "out", 1, drop.None}, {"outer", "in", 2, drop.None}, {"inner", "in", 2, drop.None},
		{"outer", "in", 3, drop.NotInAcceptTo}, {"outer", "in", 4, drop.ReversePath}, {"outer", "in", 5, drop.NotInAcceptFrom},
		{"inner", "out", 6, drop.SendFailed}, {"outer", "out", 6, drop.SendFailed},
	}
	if len(f.Packets) != len(want) {
		t.Fatalf("%d packets, want %d: %+v", len(f.Packets), len(want), f.Packets)
	}
	first := f.Packets[0].ID
	for i, w := range want {
		p, comment, packet := f.Packets[i], "", outer
		if w.why != drop.None {
			comment = w.why.Error() + "; remedy: " + w.why.Remedy()
		}
		if w.where == "inner" {
			packet = inner
		}
		if p.Interface != "t0 ("+w.where+")" || p.Direction != w.direction || p.Comment != comment || p.Length != len(packet) || !bytes.Equal(p.Packet, packet[:64]) || p.ID != first+uint64(w.of-1) {
			t.Errorf("packet %d: %+v, want %+v", i, p, w)
		}
	}
}
