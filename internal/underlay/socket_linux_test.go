package underlay

import (
	"encoding/binary"
	"errors"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/encap"
	"ipipd/internal/drop"
	"ipipd/internal/packet"
	"ipipd/test/netlab"
)

var (
	hostA = [4]byte{192, 0, 2, 1}
	hostB = [4]byte{192, 0, 2, 2}
	pathA = &Path{Local: hostA, Remote: hostB, MTU: 1500}
	pathB = &Path{Local: hostB, Remote: hostA, MTU: 1500}
)

// twoHosts returns two namespaces connected by a veth pair: hostA on eth0 of a, hostB on eth0 of
// b, with neighbour entries resolved.
func twoHosts(t testing.TB) (a, b *netlab.NS) {
	t.Helper()
	a, b = netlab.New(t), netlab.New(t)
	netlab.Veth(t, a, b, netlab.End{Name: "eth0", Address: "192.0.2.1/24"}, netlab.End{Name: "eth0", Address: "192.0.2.2/24"})
	a.Run("ping", "-c", "1", "-w", netlab.Seconds(netlab.Timeout()), "192.0.2.2")
	return a, b
}

// open opens a Socket in a namespace and closes it at the end of the test.
func open(t testing.TB, ns *netlab.NS, o SocketOptions) Socket {
	t.Helper()
	var s Socket
	var err error
	ns.Do(func() { s, err = OpenSocket(o) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// outerPacket returns an outer packet of n bytes along path, with a payload whose bytes depend
// on their offset.
func outerPacket(path *Path, n int, id uint16) *packet.Buffer {
	b := packet.New(n)
	b.Space()
	b.SetLen(n)
	p := b.Bytes()
	p[0], p[1], p[8], p[9] = 0x45, 0x2c, 77, 4
	binary.BigEndian.PutUint16(p[2:], uint16(n))
	binary.BigEndian.PutUint16(p[4:], id)
	copy(p[12:], path.Local[:])
	copy(p[16:], path.Remote[:])
	var sum uint32
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(p[i:]))
	}
	sum = sum>>16 + sum&0xffff
	binary.BigEndian.PutUint16(p[10:], ^uint16(sum>>16+sum))
	for i := 20; i < n; i++ {
		p[i] = byte(i * i >> 3)
	}
	return b
}

// patience is how long a test waits for an expected event.
var patience = netlab.Timeout()

// readSome reads packets, and waits for the first.
func readSome(r Receiver, batch []*packet.Buffer) (n int, err error) {
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Microsecond) {
		if n, err = r.Read(batch); n > 0 || err != nil {
			return n, err
		}
		if time.Now().After(end) {
			return 0, errors.New("waited too long for a packet")
		}
	}
}

// read reads n packets, of up to size bytes each.
func read(t testing.TB, r Receiver, n, size int) []*packet.Buffer {
	t.Helper()
	batch := packet.NewBatch(n, size)
	for have := 0; have < n; {
		more, err := readSome(r, batch[have:])
		if err != nil {
			t.Fatalf("Read: %v", err)
		}
		have += more
	}
	return batch
}

// waits reports whether fd becomes readable within timeout.
func waits(t testing.TB, fd int, timeout time.Duration) bool {
	t.Helper()
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, int(timeout.Milliseconds()))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		return n == 1
	}
}

func mustWrite(t testing.TB, s Sender, path *Path, batch ...*packet.Buffer) {
	t.Helper()
	if n, err := s.Write(batch, []*Path{path}); n != len(batch) || err != nil {
		t.Fatalf("Write sent %d of %d packets: %v", n, len(batch), err)
	}
}

// activeReceiver returns the Receiver that o makes packets arrive at.
func activeReceiver(s Socket, o SocketOptions) Receiver {
	if o.PacketReceive {
		return s.Receivers()[1]
	}
	return s.Receivers()[0]
}

func activeReceiverFD(s Socket, o SocketOptions) int {
	if o.PacketReceive {
		return s.(*socket).packetSockets[0]
	}
	return s.(*socket).raw.FD()
}

func TestRawReceiver(t *testing.T) {
	a, b := twoHosts(t)
	sender := open(t, a, SocketOptions{}).NewSender()
	receiver := open(t, b, SocketOptions{}).Receivers()[0]
	var sent []*packet.Buffer
	for i := range 100 {
		sent = append(sent, outerPacket(pathA, 20+i*14, uint16(i+1)))
	}
	mustWrite(t, sender, pathA, sent...)
	for i, got := range read(t, receiver, len(sent), 1500) {
		if string(got.Bytes()) != string(sent[i].Bytes()) {
			t.Fatalf("packet %d is\n%x, want\n%x", i, got.Bytes(), sent[i].Bytes())
		}
	}
}

// A packet longer than the path's MTU is fragmented by the kernel, which keeps TOS, TTL,
// addresses and payload.
func TestSender_fragmentedByKernel(t *testing.T) {
	a, b := twoHosts(t)
	sender := open(t, a, SocketOptions{}).NewSender()
	receiver := open(t, b, SocketOptions{}).Receivers()[0]
	for _, size := range []int{1501, 3000, 65535} {
		sent := outerPacket(pathA, size, 1)
		mustWrite(t, sender, pathA, sent)
		got := read(t, receiver, 1, packet.MaxSize)[0].Bytes()
		want := sent.Bytes()
		if len(got) != size || string(got[20:]) != string(want[20:]) {
			t.Fatalf("%d bytes: the payload changed, %d bytes arrived", size, len(got))
		}
		if got[1] != want[1] || got[8] != want[8] || string(got[12:20]) != string(want[12:20]) {
			t.Errorf("%d bytes: header is %x, want TOS, TTL and addresses of %x", size, got[:20], want[:20])
		}
		if got[6]&0x40 != 0 {
			t.Errorf("%d bytes: DF is set", size)
		}
	}
}

// openFiles returns the number of open file descriptors of the process.
func openFiles(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// Close unblocks ReadError and leaks no file descriptor; Read fails after it.
func TestSocketClose(t *testing.T) {
	for _, o := range []SocketOptions{{}, {PacketReceive: true}} {
		testClose(t, o)
	}
}

func testClose(t *testing.T, o SocketOptions) {
	ns := netlab.New(t)
	before := openFiles(t)
	s := open(t, ns, o)
	if n, err := activeReceiver(s, o).Read(packet.NewBatch(1, 1500)); n != 0 || err != nil {
		t.Errorf("Read without a packet: %d, %v", n, err)
	}
	failed := make(chan error, 1)
	go func() {
		_, err := s.ReadError(make([]byte, 1500))
		failed <- err
	}()
	time.Sleep(50 * time.Millisecond) // by then it usually waits
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := <-failed; !errors.Is(err, os.ErrClosed) {
		t.Errorf("ReadError: got %v, want os.ErrClosed", err)
	}
	if _, err := activeReceiver(s, o).Read(packet.NewBatch(1, 1500)); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Read: got %v, want os.ErrClosed", err)
	}
	if _, err := s.NewSender().Write([]*packet.Buffer{outerPacket(pathA, 20, 1)}, []*Path{pathA}); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Write: got %v, want os.ErrClosed", err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if after := openFiles(t); after != before {
		t.Errorf("%d files are open after Close, were %d before", after, before)
	}
}

// Every socket is watched that packets come by: those of the link layer from the beginning, and
// the raw socket that takes the place of another.
func TestReceiver_watch(t *testing.T) {
	ns := netlab.New(t)
	s := open(t, ns, SocketOptions{}).(*socket)
	var watched [2][]int
	for i, r := range s.Receivers() {
		if err := r.Watch(func(fd int) error { watched[i] = append(watched[i], fd); return nil }); err != nil {
			t.Fatal(err)
		}
	}
	raw := s.raw.FD()
	if !slices.Equal(watched[0], []int{raw}) || !slices.Equal(watched[1], s.packetSockets) || len(watched[1]) != 1 {
		t.Fatalf("first %v are watched, not the raw socket %d and the packet socket %v", watched, raw, s.packetSockets)
	}
	setReceive(t, ns, s, Reception{LinkLayer: true})
	setReceive(t, ns, s, Reception{LinkLayer: true, Device: 1, Remote: [4]byte{127, 0, 0, 1}})
	setReceive(t, ns, s, Reception{LinkLayer: true, Device: 1})
	if !slices.Equal(watched[0], []int{raw, s.raw.FD()}) || !slices.Equal(watched[1], s.packetSockets) {
		t.Errorf("watched %v; the raw sockets were %d and %d, the packet socket is %v", watched, raw, s.raw.FD(), s.packetSockets)
	}
}

func TestSocket_noAllocations(t *testing.T) {
	a, b := twoHosts(t)
	framed := *pathA
	framed.Link = linkTo(t, a, b)
	for _, receive := range []SocketOptions{{}, {PacketReceive: true}} {
		for _, path := range []*Path{pathA, &framed} {
			sender := open(t, a, SocketOptions{}).NewSender()
			s := open(t, b, receive)
			r := activeReceiver(s, receive)
			// The last one is fragmented.
			out := []*packet.Buffer{outerPacket(path, 1400, 1), outerPacket(path, 40, 2), outerPacket(path, 3000, 3)}
			in, paths := packet.NewBatch(8, packet.MaxSize), []*Path{path}
			allocs := testing.AllocsPerRun(100, func() {
				if n, err := sender.Write(out, paths); n != len(out) || err != nil {
					t.Fatalf("Write sent %d packets: %v", n, err)
				}
				for have := 0; have < len(out); {
					n, err := readSome(r, in)
					if err != nil {
						t.Fatal(err)
					}
					have += n
				}
			})
			if allocs != 0 {
				t.Errorf("%+v, link %v: %v allocations a batch", receive, path.Link != nil, allocs)
			}
			s.Close()
		}
	}
}

// Each packet is either received or counted as an overflow.
func TestSocketOverflows(t *testing.T) {
	a, b := twoHosts(t)
	sender := open(t, a, SocketOptions{}).NewSender()
	for _, o := range []SocketOptions{{ReceiveBuffer: 1}, {ReceiveBuffer: 1, PacketReceive: true}} {
		s := open(t, b, o)
		for range 100 {
			mustWrite(t, sender, pathA, outerPacket(pathA, 1500, 1))
		}
		arrived := uint64(0)
		batch := packet.NewBatch(100, 1500)
		for deadline := time.Now().Add(patience); arrived+s.Overflows() < 100 && time.Now().Before(deadline); {
			if waits(t, activeReceiverFD(s, o), time.Millisecond) {
				n, err := activeReceiver(s, o).Read(batch)
				if err != nil {
					t.Fatal(err)
				}
				arrived += uint64(n)
			}
		}
		if got := s.Overflows(); got == 0 || got+arrived != 100 {
			t.Errorf("%+v: %d packets arrived and %d overflowed, want 100 together", o, arrived, got)
		}
		s.Close()
		if got := s.Overflows(); got+arrived != 100 {
			t.Errorf("%+v: after Close %d overflowed", o, got)
		}
	}
}

// A packet that does not fit the Buffer is dropped as malformed.
func TestReceiver_truncated(t *testing.T) {
	a, b := twoHosts(t)
	sender := open(t, a, SocketOptions{}).NewSender()
	for _, o := range []SocketOptions{{}, {PacketReceive: true}} {
		s := open(t, b, o)
		mustWrite(t, sender, pathA, outerPacket(pathA, 1500, 1))
		got := read(t, activeReceiver(s, o), 1, 1499)[0]
		if _, reason := encap.ParseOuter(got); reason != drop.OuterMalformed {
			t.Errorf("%+v: %d bytes: %v, want %v", o, got.Len(), reason, drop.OuterMalformed)
		}
		s.Close()
	}
}

// BenchmarkSender_fragment sends a packet of 64 KiB, which the kernel fragments, and receives it
// reassembled, in one thread.
func BenchmarkSender_fragment(b *testing.B) {
	from, to := twoHosts(b)
	sender := open(b, from, SocketOptions{}).NewSender()
	r := open(b, to, SocketOptions{}).Receivers()[0]
	out := []*packet.Buffer{outerPacket(pathA, packet.MaxSize, 1)}
	in := packet.NewBatch(1, packet.MaxSize)
	b.SetBytes(packet.MaxSize)
	b.ReportAllocs()
	for b.Loop() {
		mustWrite(b, sender, pathA, out...)
		if _, err := readSome(r, in); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkSocket sends a batch of 64 full packets over a veth pair and receives it, in one
// thread: the kernel's work is included.
func BenchmarkSocket(b *testing.B) {
	for _, receive := range []string{"raw", "packet"} {
		for _, send := range []string{"raw", "link"} {
			b.Run("send="+send+"/receive="+receive, func(b *testing.B) {
				from, to := twoHosts(b)
				path := *pathA
				if send == "link" {
					path.Link = linkTo(b, from, to)
				}
				sender := open(b, from, SocketOptions{}).NewSender()
				o := SocketOptions{PacketReceive: receive == "packet"}
				r := activeReceiver(open(b, to, o), o)
				var out []*packet.Buffer
				for range 64 {
					out = append(out, outerPacket(&path, 1500, 1))
				}
				in := packet.NewBatch(64, 1500)
				runtime.LockOSThread()
				defer runtime.UnlockOSThread()
				var sending time.Duration
				b.SetBytes(1500)
				b.ReportAllocs()
				b.ResetTimer()
				for i := 0; i < b.N; i += len(out) {
					start := time.Now()
					mustWrite(b, sender, &path, out...)
					sending += time.Since(start)
					for have := 0; have < len(out); {
						n, err := readSome(r, in)
						if err != nil {
							b.Fatal(err)
						}
						have += n
					}
				}
				b.ReportMetric(float64(sending.Nanoseconds())/float64(b.N), "ns-send/op")
			})
		}
	}
}

// SetReceive switches between raw and packet sockets while packets arrive.
func TestSocketSetReceive(t *testing.T) {
	a, b := twoHosts(t)
	sender := open(t, a, SocketOptions{}).NewSender()
	s := open(t, b, SocketOptions{}).(ReceiveSetter)
	for i, on := range []bool{false, true, false, true} {
		var err error
		if b.Do(func() { err = s.SetReceive(Reception{LinkLayer: on}) }); err != nil {
			t.Fatal(err)
		}
		mustWrite(t, sender, pathA, outerPacket(pathA, 100, uint16(i+1)))
		read(t, activeReceiver(s, SocketOptions{PacketReceive: on}), 1, 1500)
	}
}
