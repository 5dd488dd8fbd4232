package tun

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/internal/packet"
	"ipipd/test/netlab"
)

// readSome reads packets, and waits for the first.
func readSome(q Queue, s *Scratch, batch []*packet.Buffer) (n int, err error) {
	for {
		if n, err = q.Read(s, batch); n > 0 || err != nil {
			return n, err
		}
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(q.FD()), Events: unix.POLLIN}}, 100)
	}
}

// twoHosts returns two namespaces, 10.9.0.1 and 10.9.0.2, whose devices are connected by
// goroutines that read from one and write to the other:
//
//	10.9.0.1 ipip1 == Read, Write == ipip1 10.9.0.2
//
// seen, if not nil, is called with each batch.
func twoHosts(t testing.TB, o Options, seen func(batch []*packet.Buffer)) (a, b *netlab.NS) {
	t.Helper()
	a, b = netlab.New(t), netlab.New(t)
	open := func(ns *netlab.NS, address string) Device {
		var d Device
		var err error
		ns.Do(func() { d, err = Open(o) })
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOENT) {
			t.Skipf("needs /dev/net/tun and CAP_NET_ADMIN: %v", err)
		}
		if err != nil {
			t.Fatal(err)
		}
		ns.Run("ip", "address", "add", address, "dev", d.Name())
		ns.Run("ip", "link", "set", d.Name(), "up")
		return d
	}
	da, db := open(a, "10.9.0.1/24"), open(b, "10.9.0.2/24")
	var wg sync.WaitGroup
	for i := range da.Queues() {
		for _, pair := range [][2]Queue{{da.Queues()[i], db.Queues()[i]}, {db.Queues()[i], da.Queues()[i]}} {
			wg.Go(func() {
				runtime.LockOSThread()
				batch, scratch := packet.NewBatch(128, 2000), new(Scratch)
				for {
					n, err := readSome(pair[0], scratch, batch)
					if err != nil {
						if !errors.Is(err, os.ErrClosed) {
							t.Errorf("Read: %v", err)
						}
						return
					}
					if seen != nil {
						seen(batch[:n])
					}
					if _, err := pair[1].Write(scratch, batch[:n]); err != nil && !errors.Is(err, os.ErrClosed) {
						t.Errorf("Write: %v", err)
					}
				}
			})
		}
	}
	t.Cleanup(func() {
		da.Close()
		db.Close()
		wg.Wait()
	})
	return a, b
}

// transfer sends n bytes over one TCP connection from a to address in b.
func transfer(t testing.TB, a, b *netlab.NS, address string, n int) {
	t.Helper()
	var l net.Listener
	var err error
	b.Do(func() { l, err = net.Listen("tcp4", address+":0") })
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	want := patternBytes(1<<20, 0)
	got := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			got <- err
			return
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(time.Minute))
		buf := make([]byte, len(want))
		for total := 0; total < n; total += len(buf) {
			if _, err := io.ReadFull(c, buf); err != nil {
				got <- fmt.Errorf("after %d bytes: %w", total, err)
				return
			}
			if !bytes.Equal(buf, want) {
				got <- fmt.Errorf("wrong bytes after %d", total)
				return
			}
		}
		got <- nil
	}()
	var c net.Conn
	a.Do(func() { c, err = net.DialTimeout("tcp4", l.Addr().String(), 10*time.Second) })
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Minute))
	for range n / len(want) {
		if _, err := c.Write(want); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-got; err != nil {
		t.Error(err)
	}
}

func TestDevice_bulkTCP(t *testing.T) {
	for _, o := range []Options{{}, {Queues: 2}, {NoOffload: true}, {MTU: 1480}, {MTU: 576}} {
		t.Run(fmt.Sprintf("%+v", o), func(t *testing.T) {
			var mu sync.Mutex
			a, b := twoHosts(t, o, func(batch []*packet.Buffer) {
				mu.Lock() // several queues
				defer mu.Unlock()
				for _, p := range batch {
					if p.Len() > 1500 || !slowValid(p.Bytes()) {
						t.Errorf("%d bytes: %x", p.Len(), p.Bytes()[:min(p.Len(), 60)])
					}
				}
			})
			transfer(t, a, b, "10.9.0.2", 16<<20)
			transfer(t, b, a, "10.9.0.1", 16<<20)
		})
	}
}

// Datagrams written as superpackets keep their boundaries.
func TestQueueWrite_udpSuperpacket(t *testing.T) {
	ns := netlab.New(t)
	d := openIn(t, ns, Options{})
	c := dialIn(t, ns, "10.9.0.1:40000", "10.9.0.2:5201")
	var packets [][]byte
	for i := range 100 {
		size := 700
		if i%10 == 9 {
			size = 50 + i
		}
		packets = append(packets, spec{id: uint16(i), payload: patternBytes(size, i)}.build())
	}
	super := spec{payload: patternBytes(5000, 0), partial: true}.build()
	batch := buffers(append(packets, super)...)
	batch[100].Offload = packet.Offload{Checksum: packet.ChecksumPartial, SegmentSize: 1000}
	if n, err := d.Queues()[0].Write(new(Scratch), batch); n != len(batch) || err != nil {
		t.Fatalf("Write: %d, %v", n, err)
	}
	for i := range 5 {
		packets = append(packets, spec{payload: patternBytes(5000, 0)[i*1000 : (i+1)*1000]}.build())
	}
	got := make([]byte, 2000)
	c.SetReadDeadline(time.Now().Add(10 * time.Second))
	for i, p := range packets {
		n, err := c.Read(got)
		if err != nil || !bytes.Equal(got[:n], p[28:]) {
			t.Fatalf("datagram %d: %d bytes, %v; want %d", i, n, err, len(p)-28)
		}
	}
}

// A UDP superpacket is split for a kernel without USO.
func TestQueueWrite_withoutUSO(t *testing.T) {
	ns := netlab.New(t)
	d := openIn(t, ns, Options{}).(*device)
	c := dialIn(t, ns, "10.9.0.1:40000", "10.9.0.2:5201")
	q, scratch := d.Queues()[0].(*queue), new(Scratch)
	q.uso = false
	batch := buffers(spec{payload: patternBytes(2500, 0), partial: true}.build())
	batch[0].Offload = packet.Offload{Checksum: packet.ChecksumPartial, SegmentSize: 1000}
	if n, err := q.Write(scratch, batch); n != 1 || err != nil {
		t.Fatalf("Write: %d, %v", n, err)
	}
	var got []byte
	buf := make([]byte, 2000)
	c.SetReadDeadline(time.Now().Add(10 * time.Second))
	for len(got) < 2500 {
		n, err := c.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, buf[:n]...)
	}
	if !bytes.Equal(got, patternBytes(2500, 0)) {
		t.Error("wrong bytes arrived")
	}
}

// With USO the kernel leaves splitting of UDP_SEGMENT datagrams to Read.
func TestQueueRead_udpSegment(t *testing.T) {
	ns := netlab.New(t)
	d := openIn(t, ns, Options{})
	c := dialIn(t, ns, "10.9.0.1:7000", "10.9.0.2:7001")
	raw, _ := c.SyscallConn()
	raw.Control(func(fd uintptr) {
		if err := unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, 1000); err != nil {
			t.Skipf("this kernel has no UDP_SEGMENT: %v", err)
		}
	})
	want := patternBytes(9500, 0)
	if _, err := c.Write(want); err != nil {
		t.Fatal(err)
	}
	batch, scratch := packet.NewBatch(4, 1500), new(Scratch)
	var got []byte
	for len(got) < len(want) {
		n, err := readSome(d.Queues()[0], scratch, batch)
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range batch[:n] {
			if !slowValid(b.Bytes()) {
				t.Errorf("bad length or checksum: %x", b.Bytes())
			}
			got = append(got, b.Bytes()[28:]...)
		}
	}
	if !bytes.Equal(got, want) {
		t.Error("wrong bytes arrived")
	}
}

func TestQueueWrite_interfaceDown(t *testing.T) {
	ns := netlab.New(t)
	d := openIn(t, ns, Options{})
	ns.Run("ip", "link", "set", d.Name(), "down")
	batch := buffers(spec{payload: patternBytes(10, 0)}.build())
	if n, err := d.Queues()[0].Write(new(Scratch), batch); n != 0 || err == nil {
		t.Errorf("Write: %d, %v", n, err)
	}
	ns.Run("ip", "link", "set", d.Name(), "up")
	if n, err := d.Queues()[0].Write(new(Scratch), batch); n != 1 || err != nil {
		t.Errorf("Write: %d, %v", n, err)
	}
}

func TestQueue_allocations(t *testing.T) {
	ns := netlab.New(t)
	d := openIn(t, ns, Options{})
	c := dialIn(t, ns, "10.9.0.1:7000", "10.9.0.2:7001")
	q, scratch := d.Queues()[0], new(Scratch)
	in := buffers(tcpSegments(40, 1000, nil)...)
	out := packet.NewBatch(8, 1500)
	message := patternBytes(1000, 0)
	if allocs := testing.AllocsPerRun(100, func() {
		if n, err := q.Write(scratch, in); n != len(in) || err != nil {
			t.Errorf("Write: %d, %v", n, err)
		}
		c.Write(message)
		if _, err := q.Read(scratch, out); err != nil {
			t.Errorf("Read: %v", err)
		}
	}); allocs != 0 {
		t.Errorf("%v allocations", allocs)
	}
}

// BenchmarkQueueWrite includes the host's stack, which drops the packets without a route.
func BenchmarkQueueWrite(b *testing.B) {
	for name, packets := range map[string][][]byte{"tcp": tcpSegments(45, mss, nil), "acks": tcpSegments(45, 0, nil)} {
		b.Run(name, func(b *testing.B) {
			ns := netlab.New(b)
			d := openIn(b, ns, Options{})
			ns.Run("ip", "address", "flush", "dev", d.Name())
			batch, scratch := buffers(packets...), new(Scratch)
			b.SetBytes(int64(len(bytes.Join(packets, nil))))
			b.ReportAllocs()
			for b.Loop() {
				for i, p := range packets { // Write changes them
					copy(batch[i].Bytes(), p[:min(len(p), 60)])
				}
				if _, err := d.Queues()[0].Write(scratch, batch); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*len(packets)), "ns/packet")
		})
	}
}

// BenchmarkDevice_tcp is one TCP connection between two devices.
func BenchmarkDevice_tcp(b *testing.B) {
	for _, o := range []Options{{MTU: 1480}, {MTU: 1480, NoOffload: true}} {
		name := "offload"
		if o.NoOffload {
			name = "water"
		}
		b.Run(name, func(b *testing.B) {
			from, to := twoHosts(b, o, nil)
			const n = 64 << 20
			b.SetBytes(n)
			for b.Loop() {
				transfer(b, from, to, "10.9.0.2", n)
			}
		})
	}
}
