package ipsec

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"ipipd/internal/ipsec/ike"
	"ipipd/test/netlab"
)

// received reports whether the current ESP socket has a packet, and reads it.
func received(t *testing.T, m *Manager) bool {
	t.Helper()
	s := m.raw.(*rawESP)
	s.mu.Lock()
	defer s.mu.Unlock()
	_, _, err := unix.Recvfrom(s.raw.FD(), make([]byte, 1500), unix.MSG_DONTWAIT)
	if err != nil && err != unix.EAGAIN {
		t.Fatal(err)
	}
	return err == nil
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
	// send sends ESP, and returns when it has arrived.
	send := func(source string) {
		t.Helper()
		var err error
		b.Do(func() {
			var fd int
			if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ESP); err != nil {
				return
			}
			defer unix.Close(fd)
			if err = unix.Bind(fd, &unix.SockaddrInet4{Addr: as4(netip.MustParseAddr(source))}); err == nil {
				err = unix.Sendto(fd, make([]byte, 100), 0, &unix.SockaddrInet4{Addr: as4(addressA)})
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		b.Run("ping", "-c", "1", "-W", "5", "-I", source, "192.0.2.1") // arrives after it
	}
	first := protect(addressB)
	send("192.0.2.3")
	if received(t, m) {
		t.Error("one tunnel: a third host's packet is received")
	}
	send("192.0.2.2")
	if !received(t, m) {
		t.Error("one tunnel: the peer's packet is not received")
	}
	second := protect(netip.MustParseAddr("192.0.2.3"))
	for _, source := range []string{"192.0.2.3", "192.0.2.2"} {
		send(source)
		if !received(t, m) {
			t.Errorf("two tunnels: the packet of %s is not received", source)
		}
	}
	a.Do(first.Close)
	if received(t, m) {
		t.Error("the second tunnel's socket has earlier packets of others")
	}
	send("192.0.2.2")
	if received(t, m) {
		t.Error("the first tunnel has ended: its peer's packet is received")
	}
	send("192.0.2.3")
	if !received(t, m) {
		t.Error("the first tunnel has ended: the second peer's packet is not received")
	}
	second.Close()
}
