package underlay

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
	"ipipd/internal/vnet"
	"ipipd/test/netlab"
)

var hostC = [4]byte{192, 0, 2, 3} // a second address of the host that sends

// setReceive is SetReceive in the namespace of s.
func setReceive(t testing.TB, ns *netlab.NS, s Socket, r Reception) {
	t.Helper()
	var err error
	ns.Do(func() { err = s.(ReceiveSetter).SetReceive(r) })
	if err != nil {
		t.Fatal(err)
	}
}

// queued drains the present raw socket and the packet sockets, and returns the IP IDs of their
// packets. Packets still queued at a former raw socket are read by its Receiver only.
func queued(t testing.TB, s Socket) (raw, link []uint16) {
	t.Helper()
	take := func(fd, header int) (ids []uint16) {
		buf := make([]byte, 1500)
		for {
			n, _, err := unix.Recvfrom(fd, buf, unix.MSG_DONTWAIT)
			if err == unix.EAGAIN {
				return ids
			}
			if err != nil || n < header+20 {
				t.Fatalf("%d bytes, %v", n, err)
			}
			ids = append(ids, binary.BigEndian.Uint16(buf[header+4:]))
		}
	}
	raw = take(s.(*socket).raw.FD(), 0)
	for _, fd := range s.(*socket).packetSockets {
		link = append(link, take(fd, vnet.HeaderLen+etherHeaderLen)...)
	}
	return raw, link
}

func isIDs(got []uint16, want ...uint16) bool { return fmt.Sprint(got) == fmt.Sprint(want) }

// threeAddresses is twoHosts, where b has hostC too. settle waits until what b sent before has
// arrived at a.
func threeAddresses(t *testing.T) (a, b *netlab.NS, settle func()) {
	a, b = twoHosts(t)
	b.Run("ip", "address", "add", "192.0.2.3/24", "dev", "eth0")
	return a, b, func() { b.Run("ping", "-c", "1", "-w", "5", "192.0.2.1") }
}

var pathC = &Path{Local: hostC, Remote: hostA, MTU: 1500}

func TestReception(t *testing.T) {
	// Several processes have one tunnel each: the kernel copies no packet of another tunnel to
	// them, whether they use the raw socket or packet sockets.
	t.Run("foreign-packets-are-not-copied", func(t *testing.T) {
		a, b, settle := threeAddresses(t)
		sender := open(t, b, SocketOptions{}).NewSender()
		eth0 := deviceIndex(t, a, "eth0")
		type process struct {
			Socket
			remote [4]byte
			link   bool
		}
		var processes []process
		for _, link := range []bool{false, true} {
			for _, remote := range [][4]byte{hostB, hostC} {
				s := open(t, a, SocketOptions{})
				r := Reception{Local: hostA, Remote: remote}
				if link {
					r.LinkLayer, r.LinkDevice = true, eth0
				}
				setReceive(t, a, s, r)
				processes = append(processes, process{s, remote, link})
			}
		}
		for i, path := range []*Path{pathB, pathC, {Local: hostB, Remote: hostA, MTU: 1500}} {
			mustWrite(t, sender, path, outerPacket(path, 100, uint16(i+1)))
		}
		settle()
		for _, p := range processes {
			raw, link := queued(t, p.Socket)
			other := raw
			if p.link {
				raw, link = link, nil
				if len(other) != 0 {
					t.Errorf("link %v, %v: the raw socket has %v besides", p.link, p.remote, other)
				}
			}
			want := []uint16{1, 3}
			if p.remote == hostC {
				want = []uint16{2}
			}
			if !isIDs(raw, want...) || len(link) != 0 {
				t.Errorf("link %v, %v: %v and %v came, want %v", p.link, p.remote, raw, link, want)
			}
		}
	})

	// No change of the Reception loses a packet.
	t.Run("nothing-is-lost-while-it-changes", func(t *testing.T) {
		a, b := twoHosts(t)
		s := open(t, a, SocketOptions{Receivers: 2})
		var mu sync.Mutex
		seen := map[uint16]bool{}
		var readers sync.WaitGroup
		for _, r := range s.Receivers() {
			readers.Go(func() {
				for batch := packet.NewBatch(8, 1500); ; {
					n, err := readSome(r, batch)
					if err != nil {
						if !errors.Is(err, os.ErrClosed) {
							t.Error(err)
						}
						return
					}
					mu.Lock()
					for _, p := range batch[:n] {
						seen[binary.BigEndian.Uint16(p.Bytes()[4:])] = true
					}
					mu.Unlock()
				}
			})
		}
		eth0 := deviceIndex(t, a, "eth0")
		done := make(chan struct{})
		go func() {
			defer close(done)
			one := Reception{Local: hostA, Remote: hostB}
			for range 20 {
				for _, r := range []Reception{
					{}, one,
					{Local: hostA, Remote: hostB, LinkLayer: true, LinkDevice: eth0},
					{LinkLayer: true, LinkDevice: eth0}, one, {Device: eth0},
					{Device: eth0, LinkLayer: true, LinkDevice: eth0},
				} {
					setReceive(t, a, s, r)
				}
			}
		}()
		sender := open(t, b, SocketOptions{}).NewSender()
		sent := 0
		for running := true; running && sent < 0xffff; {
			sent++
			mustWrite(t, sender, pathB, outerPacket(pathB, 100, uint16(sent)))
			select {
			case <-done:
				running = false
			default:
			}
		}
		<-done
		count := func() int {
			mu.Lock()
			defer mu.Unlock()
			return len(seen)
		}
		for end := time.Now().Add(patience); count() < sent && time.Now().Before(end); {
			time.Sleep(time.Millisecond)
		}
		if n := count(); n != sent {
			t.Errorf("%d of %d packets came, and %d overflowed", n, sent, s.Overflows())
		}
		s.Close()
		readers.Wait()
	})

	// Packets that enter by another interface than LinkDevice go to the raw socket, subject to
	// rp_filter, and no packet goes to both.
	for _, filter := range []string{"0", "1"} {
		t.Run("another-interface/rp_filter="+filter, func(t *testing.T) {
			a, b, settle := threeAddresses(t)
			netlab.Veth(t, a, b, netlab.End{Name: "eth1", Address: "198.51.100.1/24"}, netlab.End{Name: "eth1", Address: "198.51.100.2/24"})
			a.Sysctl("net.ipv4.conf.all.rp_filter", filter)
			a.Sysctl("net.ipv4.conf.eth1.rp_filter", filter)
			for _, r := range []Reception{{}, {Local: hostA, Remote: hostB}} {
				s := open(t, a, SocketOptions{})
				r.LinkLayer, r.LinkDevice = true, deviceIndex(t, a, "eth0")
				setReceive(t, a, s, r)
				b.Run("ping", "-c", "1", "-w", "5", "198.51.100.1")
				sender := open(t, b, SocketOptions{}).NewSender()
				mustWrite(t, sender, pathB, outerPacket(pathB, 100, 1))
				around := *pathB
				around.Link = &Link{Device: deviceIndex(t, b, "eth1")}
				copy(around.Link.Header[:], hardwareAddress(t, a, "eth1"))
				copy(around.Link.Header[6:], hardwareAddress(t, b, "eth1"))
				binary.BigEndian.PutUint16(around.Link.Header[12:], ipv4.EtherType)
				mustWrite(t, sender, &around, outerPacket(&around, 100, 2))
				settle()
				b.Run("ping", "-c", "1", "-w", "5", "198.51.100.1")
				var want []uint16
				if filter == "0" {
					want = []uint16{2}
				}
				if raw, link := queued(t, s); !isIDs(link, 1) || !isIDs(raw, want...) {
					t.Errorf("%+v: the link layer has %v and the raw socket %v, want [1] and %v", r, link, raw, want)
				}
				s.Close()
			}
		})
	}

	// A socket bound to an interface follows it when it is recreated. The kernel answers packets
	// from other interfaces, and counts them.
	t.Run("device-made-anew", func(t *testing.T) {
		a, b, settle := threeAddresses(t)
		s := open(t, b, SocketOptions{})
		sender := open(t, a, SocketOptions{}).NewSender()
		for round := range 2 {
			setReceive(t, b, s, Reception{Device: deviceIndex(t, b, "eth0"), Local: hostB, Remote: hostA})
			mustWrite(t, sender, pathA, outerPacket(pathA, 100, uint16(round+1)))
			settle()
			if round == 0 {
				b.Run("ip", "link", "del", "eth0")
				netlab.Veth(t, a, b, netlab.End{Name: "eth0", Address: "192.0.2.1/24"}, netlab.End{Name: "eth0", Address: "192.0.2.2/24"})
				a.Run("ping", "-c", "1", "-w", netlab.Seconds(netlab.Timeout()), "192.0.2.2")
			}
		}
		setReceive(t, b, s, Reception{Device: deviceIndex(t, b, "lo")})
		for i, got := range read(t, s.Receivers()[0], 2, 1500) {
			if id := binary.BigEndian.Uint16(got.Bytes()[4:]); id != uint16(i+1) {
				t.Errorf("packet %d has ID %d", i, id)
			}
		}
		ended := make(chan int)
		go func() {
			n, _ := readSome(s.Receivers()[0], packet.NewBatch(1, 1500))
			ended <- n
		}()
		if !netlab.WaitFor(func() bool {
			s.(*socket).overflowMu.Lock()
			defer s.(*socket).overflowMu.Unlock()
			return len(s.(*socket).receiveSockets) == 3 // the raw socket, its spare, the packet socket
		}) {
			t.Fatal("former sockets stay open")
		}
		mustWrite(t, sender, pathA, outerPacket(pathA, 100, 3))
		settle()
		if out := b.Run("nstat", "-asz", "IpInUnknownProtos"); !strings.Contains(out, "IpInUnknownProtos               1") {
			t.Errorf("the kernel counted:\n%s", out)
		}
		if s.Close(); <-ended != 0 {
			t.Error("a packet came by another interface")
		}
	})

	// connect needs a route. Without one the socket receives from any source, to its address,
	// and is connected later, when there is a route.
	t.Run("no-route", func(t *testing.T) {
		a, b, settle := threeAddresses(t)
		s := open(t, a, SocketOptions{})
		a.Run("ip", "route", "add", "blackhole", "192.0.2.2")
		setReceive(t, a, s, Reception{Local: hostA, Remote: hostB})
		sender := open(t, b, SocketOptions{}).NewSender()
		mustWrite(t, sender, pathC, outerPacket(pathC, 100, 1))
		b.Run("ping", "-c", "1", "-w", "5", "-I", "192.0.2.3", "192.0.2.1")
		if raw, _ := queued(t, s); !isIDs(raw, 1) {
			t.Errorf("without a route came %v", raw)
		}
		a.Run("ip", "route", "del", "blackhole", "192.0.2.2")
		setReceive(t, a, s, Reception{Local: hostA, Remote: hostB})
		mustWrite(t, sender, pathC, outerPacket(pathC, 100, 2))
		mustWrite(t, sender, pathB, outerPacket(pathB, 100, 3))
		settle()
		if raw, _ := queued(t, s); !isIDs(raw, 3) {
			t.Errorf("with a route came %v, want [3]", raw)
		}
	})

	// A local address that this host does not have, as on a VRRP backup, does not prevent bind
	// and connect.
	t.Run("foreign-local-address", func(t *testing.T) {
		a, b, settle := threeAddresses(t)
		s := open(t, a, SocketOptions{})
		virtual := [4]byte{192, 0, 2, 9}
		setReceive(t, a, s, Reception{Local: virtual, Remote: hostB})
		if !s.(*socket).raw.Connected() {
			t.Error("the socket is not connected")
		}
		a.Run("ip", "address", "add", "192.0.2.9/24", "dev", "eth0")
		path := &Path{Local: hostB, Remote: virtual, MTU: 1500}
		mustWrite(t, open(t, b, SocketOptions{}).NewSender(), path, outerPacket(path, 100, 1))
		settle()
		if raw, _ := queued(t, s); !isIDs(raw, 1) {
			t.Errorf("%v came, want [1]", raw)
		}
	})

	t.Run("icmp-errors-about-others", func(t *testing.T) {
		a, b, settle := threeAddresses(t)
		s := open(t, a, SocketOptions{})
		setReceive(t, a, s, Reception{Local: hostA, Remote: hostB})
		var fd int
		var err error
		b.Do(func() { fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP) })
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		for _, quoted := range []*Path{{Local: hostA, Remote: hostC}, {Local: hostC, Remote: hostB}, pathA} {
			message := append([]byte{3, 1, 0, 0, 0, 0, 0, 0}, outerPacket(quoted, 40, 1).Bytes()...)
			binary.BigEndian.PutUint16(message[2:], checksum(message))
			if err := unix.Sendto(fd, message, 0, &unix.SockaddrInet4{Addr: hostA}); err != nil {
				t.Fatal(err)
			}
		}
		settle()
		buf := make([]byte, 1500)
		n, _, err := unix.Recvfrom(s.(*socket).icmp, buf, unix.MSG_DONTWAIT)
		if err != nil || n != 20+8+40 || [4]byte(buf[28+16:]) != hostB || [4]byte(buf[28+12:]) != hostA {
			t.Errorf("the first error has %d bytes, %v: want the one about our packet", n, err)
		}
		if _, _, err := unix.Recvfrom(s.(*socket).icmp, buf, unix.MSG_DONTWAIT); err != unix.EAGAIN {
			t.Errorf("there is another one: %v", err)
		}
	})
}

func hardwareAddress(t *testing.T, ns *netlab.NS, name string) net.HardwareAddr {
	t.Helper()
	var i *net.Interface
	var err error
	ns.Do(func() { i, err = net.InterfaceByName(name) })
	if err != nil {
		t.Fatal(err)
	}
	return i.HardwareAddr
}

// checksum returns the checksum of an ICMP message whose checksum field is zero.
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	sum = sum>>16 + sum&0xffff
	return ^uint16(sum>>16 + sum)
}
