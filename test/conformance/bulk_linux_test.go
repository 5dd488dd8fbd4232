package conformance

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"ipipd/test/netlab"
)

// underlay is a kind of link between a and b, with flags of the tunnel over it.
type underlay struct {
	name  string
	wire  func(a, b *netlab.NS)
	flags []string
	// merges: the receiver has GRO.
	merges bool
}

var underlays = []underlay{
	{name: "offload"}, // checksums and segmentation are left to the receiver
	{name: "no-offload", wire: func(a, b *netlab.NS) {
		netlab.DisableOffload(a, "veth0")
		netlab.DisableOffload(b, "veth0")
	}},
	{name: "gro", merges: true, wire: func(a, b *netlab.NS) {
		for _, ns := range []*netlab.NS{a, b} {
			netlab.DisableOffload(ns, "veth0") // so that there are segments to merge
		}
		for _, ns := range []*netlab.NS{a, b} {
			ns.Run("ethtool", "-K", "veth0", "gro", "on")
			// A veth delivers each packet before the next is sent. Delay it, as a
			// NIC with interrupt moderation does.
			ns.Run("unshare", "-m", "sh", "-c", "mount -t sysfs none /sys && echo 2000000 >/sys/class/net/veth0/gro_flush_timeout")
		}
	}},
	{name: "mtu-65515", flags: []string{"--mtu", "65515"}}, // outer fragments
	{name: "fwmark", flags: []string{"--fwmark", "7"}},     // routed by the kernel
	{name: "dont-fragment-inherit", flags: []string{"--dont-fragment", "inherit"}},
}

// eachUnderlay runs a test over each underlay with each variant.
func eachUnderlay(t *testing.T, test func(t *testing.T, u underlay, a, b *netlab.NS, da, db *netlab.Daemon)) {
	for _, u := range underlays {
		t.Run(u.name, func(t *testing.T) {
			eachVariant(t, func(t *testing.T, c variant) {
				a, b := hosts(t)
				if u.wire != nil {
					if _, err := exec.LookPath("ethtool"); err != nil {
						t.Skip("needs ethtool (package ethtool)")
					}
					u.wire(a, b)
				}
				test(t, u, a, b, c.upA(t, a, u.flags...), c.upB(t, b, u.flags...))
			})
		})
	}
}

// TCP streams arrive unchanged in both directions, alone and several at once.
func TestBulk_tcp(t *testing.T) {
	t.Parallel()
	eachUnderlay(t, func(t *testing.T, u underlay, a, b *netlab.NS, da, db *netlab.Daemon) {
		superpackets := netlab.Capture(t, b, "veth0", func(f netlab.Frame) bool { return !f.Outgoing && len(f.Packet) > 2000 })
		transfer(t, a, b, innerB, 16<<20)
		if u.merges && len(superpackets.Frames()) == 0 {
			t.Error("b's kernel has merged nothing: this tests nothing")
		}
		transfer(t, b, a, innerA, 16<<20)

		var streams sync.WaitGroup
		for i := range 4 {
			streams.Go(func() {
				from, to, address := a, b, innerB
				if i%2 != 0 {
					from, to, address = b, a, innerA
				}
				transfer(t, from, to, address, 4<<20)
			})
		}
		streams.Wait()
		for _, d := range []*netlab.Daemon{da, db} {
			for reason, n := range d.Status().AllDrops() {
				switch reason {
				case "queue-full", "receive-overflow": // what TCP is there for
				default:
					t.Errorf("%d packets dropped: %s", n, reason)
				}
			}
		}
	})
}

// UDP datagrams of many sizes, many at once, keep their bytes and their boundaries.
func TestBulk_udp(t *testing.T) {
	t.Parallel()
	eachUnderlay(t, func(t *testing.T, u underlay, a, b *netlab.NS, da, db *netlab.Daemon) {
		largest := da.Status().ActualMTU - 28
		var sizes []int
		for _, n := range []int{0, 1, 2, 3, 7, 8, 100, 511, 512, 513, 1024, 1400, 1451, 1452} {
			sizes = append(sizes, n, n, n) // equal sizes, which GRO merges
		}
		sizes = append(sizes, largest-1, largest, largest, 5000, 20001) // the host fragments the larger ones
		rand.Shuffle(len(sizes), func(i, j int) { sizes[i], sizes[j] = sizes[j], sizes[i] })
		echo(t, a, b, sizes, 0)
	})
}

// echo sends datagrams of these sizes from a to an echo server at b, a few at a time, and
// fails the test unless each comes back unchanged. With a segment size other than 0 the kernel
// splits each write into datagrams of that size (UDP_SEGMENT). Lost datagrams are sent again.
func echo(t *testing.T, a, b *netlab.NS, sizes []int, segment int) {
	t.Helper()
	far := listenUDP(t, b, innerB+":0")
	go func() {
		buf := make([]byte, 1<<16)
		for {
			n, from, err := far.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = far.WriteTo(buf[:n], from)
		}
	}()
	near := segmented(t, a, innerA, segment)
	// wanted counts the outstanding datagrams by content.
	wanted := make(map[string]int)
	message := func(i, size int) []byte {
		b := make([]byte, size)
		_, _ = rand.NewChaCha8([32]byte{byte(i), byte(i >> 8)}).Read(b)
		return b
	}
	const window = 8
	buf := make([]byte, 1<<16)
	for at := 0; at < len(sizes); at += window {
		var group [][]byte
		for i, size := range sizes[at:min(at+window, len(sizes))] {
			b := message(at+i, size)
			group = append(group, b)
			for _, d := range segments(b, segment) {
				wanted[string(d)]++
			}
		}
		for tries := 0; len(wanted) > 0; tries++ {
			if tries == 20 {
				t.Fatalf("%d datagrams of %d sizes do not come back", len(wanted), len(sizes))
			}
			for _, b := range group {
				if _, err := near.WriteTo(b, far.LocalAddr()); err != nil {
					t.Fatalf("send %d bytes: %v", len(b), err)
				}
			}
			_ = near.SetReadDeadline(time.Now().Add(2 * time.Second))
			for len(wanted) > 0 {
				n, _, err := near.ReadFrom(buf)
				if errors.Is(err, os.ErrDeadlineExceeded) {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				got := string(buf[:n])
				switch {
				case wanted[got] > 1:
					wanted[got]--
				case wanted[got] == 1:
					delete(wanted, got)
				case !sentAny(group, segment, buf[:n]) && !duplicate(message, sizes[:at], segment, buf[:n]):
					t.Fatalf("a datagram of %d bytes came that was not sent", n)
				}
			}
		}
	}
}

// segments splits b as the kernel does with UDP_SEGMENT.
func segments(b []byte, segment int) (datagrams [][]byte) {
	for segment != 0 && len(b) > segment {
		datagrams, b = append(datagrams, b[:segment]), b[segment:]
	}
	return append(datagrams, b)
}

// sentAny reports whether got is one of the datagrams of group.
func sentAny(group [][]byte, segment int, got []byte) bool {
	for _, b := range group {
		for _, d := range segments(b, segment) {
			if bytes.Equal(d, got) {
				return true
			}
		}
	}
	return false
}

// duplicate reports whether got is a late reply to a retransmission.
func duplicate(message func(i, size int) []byte, sizes []int, segment int, got []byte) bool {
	for i, size := range sizes {
		if sentAny([][]byte{message(i, size)}, segment, got) {
			return true
		}
	}
	return false
}

// iperf3 opens and closes many connections at once, and has counters of its own.
func TestBulk_iperf3(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("iperf3"); err != nil {
		t.Skip("needs iperf3 (package iperf3)")
	}
	eachVariant(t, func(t *testing.T, c variant) {
		a, b := hosts(t)
		c.upA(t, a)
		c.upB(t, b)
		// Not --bidir, which hangs if its connections arrive out of order, as flows of
		// different threads may: https://github.com/esnet/iperf/issues/2029
		for i, modes := range [][]string{{"--parallel=4"}, {"--reverse"}, {"--parallel=1", "--reverse"}} {
			var clients sync.WaitGroup
			for j, mode := range modes {
				// A server for each: between two tests a server does not listen.
				port := fmt.Sprint(5201 + 10*i + j)
				b.Start(exec.Command("iperf3", "--server", "--one-off", "--bind", innerB, "--port", port))
				netlab.Eventually(t, "the server listens", func() bool {
					out, _ := b.Try("ss", "-Hltn", "sport", "=", ":"+port)
					return out != ""
				})
				clients.Go(func() {
					if out, err := a.Try("iperf3", "--client", innerB, "--port", port, "--bytes", "8M", mode); err != nil {
						t.Errorf("%s: %v\n%s", strings.Join(modes, " beside "), err, out)
					}
				})
			}
			clients.Wait()
		}
	})
}
