package capture

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"ipipd/internal/drop"
	"ipipd/test/netlab"
)

// file returns the pcapng file of packets that a ring captured, and the Result.
func file(t *testing.T, r *Ring, h Header, packets func(Rings)) ([]byte, Result) {
	t.Helper()
	var out bytes.Buffer
	s, err := NewStream(&out, r, h, time.Unix(1, 0))
	if err != nil {
		t.Fatal(err)
	}
	packets(Rings{r})
	for more := true; more; {
		if _, more, err = s.Copy(); err != nil {
			t.Fatal(err)
		}
	}
	result, err := s.End(time.Unix(3, 0))
	if err != nil {
		t.Fatal(err)
	}
	return out.Bytes(), result
}

// ping is an ICMP echo request, and outer the packet that it is in.
var (
	ping  = []byte("\x45\x00\x00\x1c\x00\x01\x00\x00\x40\x01\x65\xdd\x0a\xff\x00\x01\x0a\xff\x00\x02\x08\x00\xf7\xfd\x00\x01\x00\x01")
	outer = append([]byte("\x45\x00\x00\x30\x00\x01\x00\x00\x40\x04\xb6\xc6\xc0\x00\x02\x01\xc0\x00\x02\x02"), ping...)
)

func TestStream(t *testing.T) {
	at := time.Unix(2, 5)
	h := Header{Program: "ipipd test", Comment: "a comment", Tunnel: "t \xff", Description: "mtu=1480", Names: []Name{{[4]byte{192, 0, 2, 2}, "t-remote"}}}
	bytes, result := file(t, NewRing(Options{}), h, func(rings Rings) {
		rings.Packet(InnerOut, ping, 7, drop.None, at)
		rings.Packet(OuterOut, outer, 7, drop.None, at)
		rings.Packet(OuterIn, outer, 8, drop.ReceivedLoop, at)
		rings.Lost(drop.QueueFull, 3, at)
		rings.Packet(NoTunnel, outer[:1], 0, drop.UnknownPeer, at)
	})
	if result != (Result{Packets: 5}) {
		t.Errorf("%+v", result)
	}
	got, err := netlab.ReadCapture(bytes)
	if err != nil {
		t.Fatal(err)
	}
	comment := func(r drop.Reason) string { return r.Error() + "; remedy: " + r.Remedy() }
	if !got.Ended || got.Comment != "a comment" || got.Names[[4]byte{192, 0, 2, 2}] != "t-remote" || len(got.Interfaces) != 3 {
		t.Errorf("%+v", got)
	}
	if i := got.Interface("t \ufffd (outer)"); i == nil || i.LinkType != 228 || i.Description != "mtu=1480" || i.Delivered != 2 {
		t.Errorf("%+v", got.Interfaces)
	}
	want := []netlab.CapturedPacket{
		{Interface: "t \ufffd (inner)", Packet: ping, Length: len(ping), Direction: "out", ID: 7},
		{Interface: "t \ufffd (outer)", Packet: outer, Length: len(outer), Direction: "out", ID: 7},
		{Interface: "t \ufffd (outer)", Packet: outer, Length: len(outer), Direction: "in", ID: 8, Comment: comment(drop.ReceivedLoop)},
		{Interface: "t \ufffd (inner)", Packet: []byte{}, Direction: "out", Comment: "3 packets " + comment(drop.QueueFull)},
		{Interface: "no tunnel (outer)", Packet: outer[:1], Length: 1, Direction: "in", Comment: comment(drop.UnknownPeer)},
	}
	if d := cmp.Diff(want, got.Packets); d != "" {
		t.Error(d)
	}
}

// Of a flood of packets that belong to no tunnel, which anybody can send, little is written, and the rest counted.
func TestStream_strangers(t *testing.T) {
	long := append(bytes.Clone(outer), make([]byte, 1000)...)
	text, result := file(t, NewRing(Options{}), Header{Tunnel: "t0"}, func(rings Rings) {
		for i := range 3 * strangersPerSecond {
			rings.Packet(NoTunnel, long, 0, drop.UnknownPeer, time.Unix(2, int64(i)))
			rings.Packet(OuterIn, outer, 0, drop.ReceivedLoop, time.Unix(2, int64(i)))
		}
		rings.Packet(NoTunnel, long, 0, drop.UnknownPeer, time.Unix(3, 0))
	})
	if want := (Result{Packets: 4*strangersPerSecond + 1, Missed: 2 * strangersPerSecond}); result != want {
		t.Errorf("%+v, want %+v", result, want)
	}
	got, err := netlab.ReadCapture(text)
	if err != nil {
		t.Fatal(err)
	}
	if i := got.Interface("no tunnel (outer)"); i == nil || i.Delivered != strangersPerSecond+1 || i.Missed != 2*strangersPerSecond {
		t.Errorf("%+v", i)
	}
	for _, p := range got.Packets {
		if want := map[bool]int{true: strangersSnaplen, false: len(outer)}[p.Interface == "no tunnel (outer)"]; len(p.Packet) != want {
			t.Fatalf("%d bytes of a packet of %s, want %d", len(p.Packet), p.Interface, want)
		}
	}
}

// tcpdump reads what a Stream writes: libpcap takes several interfaces only with the same link type and snapshot
// length, also where an interface follows packets.
func TestStream_tcpdump(t *testing.T) {
	tcpdump, err := exec.LookPath("tcpdump")
	if err != nil {
		t.Skip("needs tcpdump")
	}
	v6 := append([]byte{0x60, 0, 0, 0, 0, 0, 59, 1}, make([]byte, 32)...) // no next header
	bytes, _ := file(t, NewRing(Options{Snaplen: 128}), Header{Tunnel: "t0"}, func(rings Rings) {
		rings.Packet(InnerOut, ping, 7, drop.None, time.Unix(1, 0))
		rings.Packet(OuterOut, outer, 7, drop.None, time.Unix(2, 0))
		rings.Packet(InnerOut, v6, 8, drop.InnerNotIPv4, time.Unix(3, 0))
		rings.Packet(NoTunnel, outer, 0, drop.UnknownPeer, time.Unix(4, 0))
	})
	cmd := exec.Command(tcpdump, "-nttr", "-")
	cmd.Stdin = strings.NewReader(string(bytes))
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	rows := strings.Split(strings.TrimSuffix(string(out), "\n"), "\n")
	if err != nil || len(rows) != 4 {
		t.Fatalf("tcpdump: %v, says\n%s%s", err, out, stderr.String())
	}
	for i, want := range []string{
		"1.000000 IP 10.255.0.1 > 10.255.0.2: ICMP echo request",
		"2.000000 IP 192.0.2.1 > 192.0.2.2: IP 10.255.0.1 > 10.255.0.2: ICMP echo request",
		"3.000000 IP6 :: > ::",
		"4.000000 IP 192.0.2.1 > 192.0.2.2: IP 10.255.0.1",
	} {
		if !strings.HasPrefix(rows[i], want) {
			t.Errorf("packet %d: tcpdump says %q, want %q", i, rows[i], want)
		}
	}
}

// tshark reads what a Stream writes.
func TestStream_tshark(t *testing.T) {
	tshark, err := exec.LookPath("tshark")
	if err != nil {
		t.Skip("needs tshark")
	}
	bytes, _ := file(t, NewRing(Options{}), Header{Tunnel: "t0", Description: "mtu=1480", Names: []Name{{[4]byte{192, 0, 2, 2}, "t0-remote"}}}, func(rings Rings) {
		at := time.Unix(1234567890, 123456789)
		rings.Packet(InnerOut, ping, 7, drop.None, at)
		rings.Packet(OuterOut, outer, 7, drop.TooBig, at)
		rings.Lost(drop.ReceiveOverflow, 3, at)
	})
	name := filepath.Join(t.TempDir(), "t.pcapng")
	if err := os.WriteFile(name, bytes, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(tshark, "-r", name, "-t", "e", "-T", "fields", "-E", "separator=|", "-e", "frame.time_epoch", "-e", "frame.interface_name", "-e", "frame.interface_description",
		"-e", "frame.packet_id", "-e", "frame.packet_flags_direction", "-e", "frame.protocols", "-e", "frame.comment")
	cmd.Env = append(os.Environ(), "TZ=UTC", "HOME="+t.TempDir())
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, stderr.String())
	}
	rows := strings.Split(strings.TrimSuffix(string(out), "\n"), "\n")
	if len(rows) != 3 {
		t.Fatalf("tshark says\n%s%s", out, stderr.String())
	}
	for i, want := range [][]string{
		{"1234567890.123456789", "t0 (inner)", "mtu=1480", "7", "0x00000002", "ip:icmp", ""},
		{"1234567890.123456789", "t0 (outer)", "mtu=1480", "7", "0x00000002", "ip:ip:icmp", "dropped: too-big: "},
		{"1234567890.123456789", "no tunnel (outer)", "packets that belong", "", "0x00000001", "", "3 packets dropped: receive-overflow: "},
	} {
		got := strings.Split(rows[i], "|")
		for k := range want {
			if k >= len(got) || !strings.HasPrefix(got[k], want[k]) || want[k] == "" && k == 6 && got[k] != "" {
				t.Errorf("packet %d: tshark says %q, want %q", i, got, want)
				break
			}
		}
	}
}

// A Stream ends after Count packets; those that Settle discards do not count.
func TestStream_count(t *testing.T) {
	bytes, result := file(t, NewRing(Options{Count: 2, Drops: true}), Header{Tunnel: "t0"}, func(rings Rings) {
		for range 3 {
			h := rings.Hold(InnerIn, ping, 1, time.Unix(2, 0))
			h.Settle(drop.None)
			rings.Packet(InnerIn, ping, 1, drop.WriteFailed, time.Unix(2, 0))
		}
	})
	if got, err := netlab.ReadCapture(bytes); err != nil || len(got.Packets) != 2 || result.Packets != 2 || !got.Ended {
		t.Errorf("%+v, %v: %+v", result, err, got)
	}
}

// The file says how many packets were not written, and where.
func TestStream_missed(t *testing.T) {
	r := NewRing(Options{})
	bytes, result := file(t, r, Header{Tunnel: "t0"}, func(rings Rings) {
		for range ringSlots + 5 {
			rings.Packet(OuterIn, nil, 1, drop.None, time.Unix(2, 0))
		}
		for range ringSlots / 2 {
			r.release(r.next())
		}
		rings.Packet(OuterIn, ping, 1, drop.None, time.Unix(2, 0))
	})
	got, err := netlab.ReadCapture(bytes)
	if err != nil || result != (Result{Packets: ringSlots/2 + 1, Missed: 5}) {
		t.Fatalf("%+v, %v", result, err)
	}
	if last := got.Packets[len(got.Packets)-1]; last.Missed != 5 || got.Packets[0].Missed != 0 {
		t.Errorf("the last packet: %+v", last)
	}
	if i := got.Interface("t0 (outer)"); i.Missed != 5 || i.Delivered != ringSlots/2+1 {
		t.Errorf("%+v", i)
	}
}

// A text that is too long for an option is cut, between two characters.
func TestStream_longText(t *testing.T) {
	bytes, _ := file(t, NewRing(Options{}), Header{Tunnel: "t0", Description: "x" + strings.Repeat("ä", 40_000)}, func(Rings) {})
	got, err := netlab.ReadCapture(bytes)
	if err != nil || !strings.HasPrefix(got.Interfaces[0].Description, "xää") || !strings.HasSuffix(got.Interfaces[0].Description, "ä…") {
		t.Errorf("%v, %d bytes", err, len(got.Interfaces[0].Description))
	}
}

// An error of the writer is returned by Copy and by End.
func TestStream_writerFails(t *testing.T) {
	broken := errors.New("broken")
	w := &failing{after: 1, err: broken}
	r := NewRing(Options{})
	s, err := NewStream(w, r, Header{Tunnel: "t0"}, time.Unix(1, 0))
	if err != nil {
		t.Fatal(err)
	}
	Rings{r}.Packet(InnerIn, ping, 1, drop.None, time.Unix(2, 0))
	if _, _, err := s.Copy(); err != broken {
		t.Errorf("Copy: %v", err)
	}
	Rings{r}.Packet(InnerIn, ping, 1, drop.None, time.Unix(2, 0))
	if _, err := s.End(time.Unix(3, 0)); err != broken {
		t.Errorf("End: %v", err)
	}
}

// failing is a writer that fails from some call on.
type failing struct {
	after int
	err   error
}

func (w *failing) Write(p []byte) (int, error) {
	if w.after--; w.after < 0 {
		return 0, w.err
	}
	return len(p), nil
}

// Copy returns although there is more to copy, so that a capture can be ended.
func TestStreamCopy_more(t *testing.T) {
	for _, o := range []Options{{}, {Drops: true}} {
		r := NewRing(o)
		s, err := NewStream(io.Discard, r, Header{Tunnel: "t0"}, time.Unix(1, 0))
		if err != nil {
			t.Fatal(err)
		}
		total := 0
		for total < 3*ringSlots {
			for range 2000 {
				h := Rings{r}.Hold(InnerIn, ping, 1, time.Unix(2, 0))
				h.Settle(drop.None)
			}
			n, _, err := s.Copy()
			if total += n; err != nil || n == 0 {
				t.Fatalf("%d, %v", n, err)
			}
		}
		r = NewRing(o)
		s.ring = r
		for range ringSlots {
			h := Rings{r}.Hold(InnerIn, ping, 1, time.Unix(2, 0))
			h.Settle(drop.None)
		}
		if n, more, err := s.Copy(); !more || err != nil || !o.Drops && n == ringSlots {
			t.Errorf("%+v: %d, %v, %v", o, n, more, err)
		}
	}
}
