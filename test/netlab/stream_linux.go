package netlab

import (
	"net"
	"net/netip"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Stream sends numbered datagrams from the address source of from to the address destination of to, where each is
// answered: at most 500 a second, UDP port 7 at both ends. end stops it, and fails the test if one has got no
// answer.
//
// A ping is no measure of loss: the kernel answers it by a socket that all network namespaces of a processor share,
// and drops the answer if that one's send buffer is full, of answers for a dead neighbor in another test say.
func Stream(t testing.TB, from *NS, source string, to *NS, destination string) (end func()) {
	t.Helper()
	client := listenEcho(t, from, source)
	serveEcho(t, to, destination)
	var answered sync.Map
	go func() {
		buf := make([]byte, 64)
		for {
			n, _, err := client.ReadFrom(buf)
			if err != nil {
				return
			}
			answered.Store(string(buf[:n]), true)
		}
	}()
	stop, stopped := make(chan struct{}), make(chan int)
	go func() {
		at := net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(destination), echoPort))
		for n := 0; ; n++ {
			select {
			case <-stop:
				stopped <- n
				return
			case <-time.After(2 * time.Millisecond):
			}
			if _, err := client.WriteTo([]byte(strconv.Itoa(n)), at); err != nil {
				t.Errorf("datagram %d to %s: %v", n, destination, err)
			}
		}
	}()
	return func() {
		t.Helper()
		close(stop)
		sent := <-stopped
		var lost []int
		if !WaitFor(func() bool {
			lost = lost[:0]
			for n := range sent {
				if _, ok := answered.Load(strconv.Itoa(n)); !ok {
					lost = append(lost, n)
				}
			}
			return sent > 0 && len(lost) == 0
		}) {
			t.Errorf("of %d datagrams to %s there is no answer to %v", sent, destination, lost)
		}
	}
}

// Echo is Stream where packets may be lost: answered sends a datagram every 20 ms until one is answered, for the time within
// at most, and reports whether one was. It is not safe for concurrent use.
func Echo(t testing.TB, from *NS, source string, to *NS, destination string) (answered func(within time.Duration) bool) {
	t.Helper()
	client := listenEcho(t, from, source)
	serveEcho(t, to, destination)
	at, sent, buf := net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(destination), echoPort)), 0, make([]byte, 64)
	return func(within time.Duration) bool {
		t.Helper()
		first := sent
		for end := time.Now().Add(within); time.Now().Before(end); {
			if _, err := client.WriteTo([]byte(strconv.Itoa(sent)), at); err != nil {
				t.Errorf("a datagram to %s: %v", destination, err)
			}
			sent++
			for next := time.Now().Add(20 * time.Millisecond); ; { // answers to earlier calls do not count
				_ = client.SetReadDeadline(next)
				n, _, err := client.ReadFrom(buf)
				if err != nil {
					break
				}
				if number, _ := strconv.Atoi(string(buf[:n])); number >= first {
					return true
				}
			}
		}
		return false
	}
}

const echoPort = 7

// serveEcho answers each datagram to an address, until the test ends.
func serveEcho(t testing.TB, ns *NS, address string) {
	t.Helper()
	server := listenEcho(t, ns, address)
	go func() {
		buf := make([]byte, 64)
		for {
			n, from, err := server.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = server.WriteTo(buf[:n], from)
		}
	}()
}

// listenEcho opens a socket whose buffer holds the datagrams that arrive while its reader waits for a processor.
func listenEcho(t testing.TB, ns *NS, address string) net.PacketConn {
	t.Helper()
	var conn net.PacketConn
	var err error
	ns.Do(func() { conn, err = net.ListenPacket("udp4", net.JoinHostPort(address, strconv.Itoa(echoPort))) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	raw, err := conn.(*net.UDPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if failed := raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20)
	}); failed != nil || err != nil {
		t.Fatal(failed, err)
	}
	return conn
}
