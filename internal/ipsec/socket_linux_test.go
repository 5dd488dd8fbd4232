package ipsec

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/internal/ipsec/esp"
	"ipipd/internal/ipsec/ike"
	"ipipd/internal/ipv4"
	"ipipd/test/netlab"
)

// received reads the packets that the ESP socket has received, and returns their source addresses.
func received(t *testing.T, m *Manager) (sources []netip.Addr) {
	t.Helper()
	s := m.raw.(*rawESP)
	s.mu.Lock()
	defer s.mu.Unlock()
	for b := make([]byte, 1500); ; {
		n, _, err := unix.Recvfrom(s.raw.FD(), b, unix.MSG_DONTWAIT)
		if err == unix.EAGAIN {
			return sources
		}
		if err != nil || n < ipv4.HeaderLen {
			t.Fatalf("%d bytes: %v", n, err)
		}
		sources = append(sources, netip.AddrFrom4([4]byte(b[12:])))
	}
}

// With one tunnel the kernel delivers only its peer's ESP to the socket, with two all ESP,
// and with one again only its peer's.
func TestRawESPRestrict(t *testing.T) {
	a, b := netlab.New(t), netlab.New(t)
	netlab.Veth(t, a, b, netlab.End{Name: "eth0", Address: "192.0.2.1/24"}, netlab.End{Name: "eth0", Address: "192.0.2.2/24"})
	b.Run("ip", "address", "add", "192.0.2.3/24", "dev", "eth0")
	m := NewManager(Options{}) // without Serve packets stay in the socket
	defer m.Close()
	protect := func(remote netip.Addr) (p *Session) {
		t.Helper()
		var err error
		a.Do(func() {
			p, err = m.Protect(Config{Config: ike.Config{Local: addressA, Remote: remote, Secret: ike.Secret("a secret of some length")}})
		})
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	// arrive sends an ESP packet from each source, in this order, and checks that only those of want are received.
	third := netip.MustParseAddr("192.0.2.3")
	arrive := func(what string, sources []netip.Addr, want ...netip.Addr) {
		t.Helper()
		var err error
		b.Do(func() {
			for _, source := range sources {
				var fd int
				if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ESP); err != nil {
					return
				}
				defer unix.Close(fd)
				if err = unix.Bind(fd, &unix.SockaddrInet4{Addr: as4(source)}); err == nil {
					err = unix.Sendto(fd, make([]byte, 100), 0, &unix.SockaddrInet4{Addr: as4(addressA)})
				}
				if err != nil {
					return
				}
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		var got []netip.Addr
		netlab.Eventually(t, what+": what is to be received is", func() bool {
			got = append(got, received(t, m)...)
			return !slices.ContainsFunc(want, func(a netip.Addr) bool { return !slices.Contains(got, a) })
		})
		if len(got) != len(want) {
			t.Errorf("%s: packets of %v are received, want %v", what, got, want)
		}
	}
	first := protect(addressB)
	arrive("one tunnel", []netip.Addr{third, addressB}, addressB)
	second := protect(third)
	arrive("two tunnels", []netip.Addr{third, addressB}, third, addressB)
	a.Do(first.Close)
	if got := received(t, m); got != nil {
		t.Errorf("the second tunnel's socket has earlier packets, of %v", got)
	}
	arrive("the first tunnel has ended", []netip.Addr{addressB, third}, third)
	second.Close()
}

// Unverified answers that wait for ARP do not fill the send buffer, whatever the port and however small the buffer:
// messages to verified peers are still sent, and so are Unverified ones of other tunnels.
func TestPorts_send(t *testing.T) {
	const small = 128 << 10 // bytes, as where SO_SNDBUFFORCE is not permitted
	for _, port := range []uint16{portIKE, ipv4.PortNATT} {
		a, b := netlab.New(t), netlab.New(t)
		netlab.Veth(t, a, b, netlab.End{Name: "veth0", Address: "192.0.2.1/24"}, netlab.End{Name: "veth0", Address: "192.0.2.2/24"})
		a.Run("sysctl", "-qw", "net.ipv4.neigh.veth0.retrans_time_ms=600000") // ARP gives up no neighbour
		arrived := netlab.Capture(t, b, "veth0", func(f netlab.Frame) bool { return f.Packet[9] == unix.IPPROTO_UDP })
		e := newEndpoint(t, a, addressA, addressB)
		if err := e.protect(Config{Config: ike.Config{Passive: true, Secret: ike.Secret("a secret of some length")}}); err != nil {
			t.Fatal(err)
		}
		a.Run("ping", "-c", "1", "-w", netlab.Seconds(netlab.Timeout()), "192.0.2.2") // ARP has resolved the peer
		p := e.session.negotiator.ports
		fd := map[uint16]int{portIKE: p.ike, ipv4.PortNATT: p.natt}[port]
		if _, size := sendQueue(fd); size != 2*sendBuffer {
			t.Errorf("port %d: the send buffer has %d bytes", port, size)
		}
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, small); err != nil {
			t.Fatal(err)
		}

		now, answered := time.Now(), [40]time.Time{}
		for i := range 4000 {
			dead := i % len(answered)
			to := netip.AddrPortFrom(netip.MustParseAddr(fmt.Sprintf("192.0.2.%d", 100+dead)), port)
			p.send(ike.Send{LocalPort: port, To: to, Payload: make([]byte, 100), Unverified: true}, now, &answered[dead])
		}
		queued, size := sendQueue(fd)
		if queued < size/4 || queued >= size/2 {
			t.Errorf("port %d: %d of %d bytes wait for ARP", port, queued, size)
		}
		to, other := netip.AddrPortFrom(addressB, port), time.Time{}
		p.send(ike.Send{LocalPort: port, To: to, Payload: make([]byte, 201), Unverified: true}, now, &other)
		p.send(ike.Send{LocalPort: port, To: to, Payload: make([]byte, 201), Unverified: true}, now, &other) // within answerInterval: not sent
		p.send(ike.Send{LocalPort: port, To: to, Payload: make([]byte, 201), Unverified: true}, now.Add(answerInterval), &other)
		for i := range 50 {
			now = now.Add(time.Duration(i) * answerInterval)
			for dead := range answered {
				to := netip.AddrPortFrom(netip.MustParseAddr(fmt.Sprintf("192.0.2.%d", 100+dead)), port)
				p.send(ike.Send{LocalPort: port, To: to, Payload: make([]byte, 100), Unverified: true}, now, &answered[dead])
			}
		}
		p.send(ike.Send{LocalPort: port, To: to, Payload: make([]byte, 301)}, now, &other)
		sized := func(n int) netlab.Check {
			return netlab.TotalLen(28 + n + map[uint16]int{ipv4.PortNATT: esp.NonESPMarker}[port])
		}
		arrived.Await(sized(301))
		if n := len(arrived.Matching(sized(201))); n != 2 {
			t.Errorf("port %d: %d of 2 answers to another peer arrive", port, n)
		}
	}
}

// Unverified answers take half of the send buffer at most, and its second quarter at one per answerInterval.
func TestMayAnswer(t *testing.T) {
	for _, c := range []struct {
		queued, size uint32
		since        time.Duration
		want         bool
	}{
		{0, 4000, 0, true},
		{999, 4000, 0, true},
		{1000, 4000, answerInterval - 1, false},
		{1000, 4000, answerInterval, true},
		{1999, 4000, time.Hour, true},
		{2000, 4000, time.Hour, false},
		{5000, 4000, time.Hour, false},
	} {
		if got := mayAnswer(c.queued, c.size, c.since); got != c.want {
			t.Errorf("%d of %d bytes, the last one %v ago: %v", c.queued, c.size, c.since, got)
		}
	}
	if queued, size := sendQueue(-1); !mayAnswer(queued, size, 0) {
		t.Error("a kernel that does not say how much is in use: nothing is answered")
	}
}
