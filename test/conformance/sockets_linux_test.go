package conformance

import (
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"testing"
	"time"

	"ipipd/test/netlab"
)

// socketTimeout is the deadline of the tests' sockets.
var socketTimeout = netlab.Timeout()

// listenUDP opens a UDP socket in ns for the duration of the test.
func listenUDP(t *testing.T, ns *netlab.NS, address string) net.PacketConn {
	t.Helper()
	var conn net.PacketConn
	var err error
	ns.Do(func() { conn, err = net.ListenPacket("udp4", address) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(socketTimeout)); err != nil {
		t.Fatal(err)
	}
	return conn
}

// listenTCP opens a listening socket in ns on any port for the duration of the test.
func listenTCP(t *testing.T, ns *netlab.NS, address string) net.Listener {
	t.Helper()
	var l net.Listener
	var err error
	ns.Do(func() { l, err = net.Listen("tcp4", net.JoinHostPort(address, "0")) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// transfer sends random bytes by TCP from one namespace to an address of another, and fails
// the test unless they arrive unchanged.
func transfer(t *testing.T, from, to *netlab.NS, address string, bytes int64) {
	t.Helper()
	l := listenTCP(t, to, address)
	if err := stream(from, l, bytes); err != nil {
		t.Errorf("%d bytes to %v: %v", bytes, l.Addr(), err)
	}
}

// stream sends random bytes to l and compares the hashes at both ends.
func stream(from *netlab.NS, l net.Listener, bytes int64) error {
	arrived := make(chan error, 1)
	want := make(chan [sha256.Size]byte, 1)
	go func() {
		arrived <- func() error {
			conn, err := l.Accept()
			if err != nil {
				return err
			}
			defer conn.Close()
			hash := sha256.New()
			if err := conn.SetDeadline(time.Now().Add(socketTimeout)); err != nil {
				return err
			}
			n, err := io.Copy(hash, conn)
			if err != nil {
				return fmt.Errorf("after %d bytes: %w", n, err)
			}
			if n != bytes || [sha256.Size]byte(hash.Sum(nil)) != <-want {
				return fmt.Errorf("%d bytes came, and not those that were sent", n)
			}
			return nil
		}()
	}()
	var conn net.Conn
	var err error
	from.Do(func() { conn, err = net.DialTimeout("tcp4", l.Addr().String(), socketTimeout) })
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(socketTimeout)); err != nil {
		return err
	}
	hash := sha256.New()
	source := io.LimitReader(rand.NewChaCha8([32]byte{byte(rand.Uint32())}), bytes)
	if _, err := io.Copy(io.MultiWriter(conn, hash), source); err != nil {
		return err
	}
	want <- [sha256.Size]byte(hash.Sum(nil))
	if err := conn.Close(); err != nil {
		return err
	}
	return <-arrived
}
