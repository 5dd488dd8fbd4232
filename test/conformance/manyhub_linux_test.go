package conformance

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"

	"ipipd/internal/ipv4"
	"ipipd/test/netlab"
)

// upSpokes starts the tunnels of the spokes of a mesh, in turns with one remote, the hub, and with many, and
// adds routes of the hub to their networks.
func upSpokes(t *testing.T, hub *netlab.NS, spoke []*netlab.NS) {
	t.Helper()
	for i, s := range spoke {
		n := 11 + i
		if i%2 == 0 {
			netlab.Up(t, s, "t0", "--local-address", outerOf(n), "--remote-address", outerOf(1), "--address", fmt.Sprintf("10.255.0.%d/32", n), "--keepalive", "off",
				"--route", "10.0.0.0/8")
		} else {
			variant{}.upAny(t, s, n)
			routeTo(s, "10.0.0.0/8", 1)
		}
		routeTo(hub, fmt.Sprintf("10.%d.0.0/16", n), n)
		routeTo(hub, fmt.Sprintf("10.255.0.%d/32", n), n)
	}
}

// changeRoutes runs scripts of ip -batch, a thousand commands and more in a second, until stop is called, which returns
// how many there were. None may change the route to a spoke's own network.
func changeRoutes(t *testing.T, ns *netlab.NS, script func(round int) string) (stop func() int) {
	t.Helper()
	end, ended, changes := make(chan struct{}), make(chan struct{}), 0
	go func() {
		defer close(ended)
		for round := 0; ; round++ {
			select {
			case <-end:
				return
			default:
			}
			batch := script(round)
			if out, err := ns.Try("sh", "-c", "ip -force -batch - <<'END'\n"+batch+"END"); err != nil {
				t.Errorf("ip -batch: %v: %s", err, out)
				return
			}
			changes += strings.Count(batch, "\n")
		}
	}()
	return sync.OnceValue(func() int {
		close(end)
		<-ended
		return changes
	})
}

// flapping returns changes of routes that overlap the mesh's, longer and shorter ones: they go from remote to remote.
func flapping(round int) string {
	var b strings.Builder
	for i := range 250 {
		fmt.Fprintf(&b, "route replace 10.%d.%d.0/24 via %s dev t0 onlink\n", 100+i%7, i, outerOf(11+(i+round)%10))
	}
	fmt.Fprintf(&b, "route replace 10.0.0.0/8 via %s dev t0 onlink\n", outerOf(11+round%10))
	for i := range 250 {
		fmt.Fprintf(&b, "route del 10.%d.%d.0/24 dev t0\n", 100+i%7, i)
	}
	return b.String()
}

// The hub of ten namespaces: ICMP and TCP in both directions and from spoke to spoke, while other routes change.
func TestManyHub_spokes(t *testing.T) {
	t.Parallel()
	hub, spoke := mesh(t, 10)
	hub.Sysctl("net.ipv4.ip_forward", "1")
	d := variant{}.upAny(t, hub, 1)
	upSpokes(t, hub, spoke)
	stop := changeRoutes(t, hub, flapping)
	defer stop()
	var all sync.WaitGroup
	for i, s := range spoke {
		n, next := 11+i, 11+(i+1)%len(spoke)
		all.Go(func() {
			ping(t, hub, "-I", "10.10.0.1", fmt.Sprintf("10.%d.0.1", n))
			ping(t, s, "-I", fmt.Sprintf("10.%d.0.1", n), "10.10.0.1")
			ping(t, s, "-I", fmt.Sprintf("10.%d.0.1", n), fmt.Sprintf("10.%d.0.1", next))
			transfer(t, hub, s, fmt.Sprintf("10.%d.0.1", n), 1<<20)
			transfer(t, s, hub, "10.10.0.1", 1<<20)
			transfer(t, s, spoke[(i+1)%len(spoke)], fmt.Sprintf("10.%d.0.1", next), 1<<20)
		})
	}
	all.Wait()
	if n := stop(); n == 0 {
		t.Error("no route has changed meanwhile")
	}
	for reason, n := range d.Status().AllDrops() {
		switch reason {
		case "queue-full", "receive-overflow": // what TCP is there for
		default:
			t.Errorf("%d packets dropped: %s", n, reason)
		}
	}
}

// A thousand changes of routes in a second lose no packet of another route.
func TestManyHub_routeStorm(t *testing.T) {
	t.Parallel()
	hub, spoke := mesh(t, 2)
	d := variant{}.upAny(t, hub, 1, "--allow-fast-path", "no")
	upSpokes(t, hub, spoke)
	ping(t, hub, "-I", "10.10.0.1", "10.11.0.1")
	before := d.Status()
	stop := changeRoutes(t, hub, flapping)
	defer stop()
	const count = 1000
	end := netlab.Stream(t, hub, "10.10.0.1", spoke[0], "10.11.0.1")
	netlab.Eventually(t, "enough is answered", func() bool { return d.Status().RxPacket >= before.RxPacket+count })
	end()
	n := stop()
	if n < 500 {
		t.Errorf("only %d changes", n)
	}
	s := d.Status()
	if s.TxPacket < before.TxPacket+count || len(s.Drops) > 0 {
		t.Errorf("%d packets sent during %d changes; dropped: %v", s.TxPacket-before.TxPacket, n, s.Drops)
	}
	t.Logf("%d changes of routes during %d datagrams", n, s.TxPacket-before.TxPacket)
}

// Packets with spoofed outer and inner sources: none gets in, memory does not grow, and no ping of another peer is
// lost. IPIPD_HOSTILE_PACKETS is how many, 40,000 if it is not set.
func TestManyHub_hostile(t *testing.T) {
	t.Parallel()
	total := 40000
	if v := os.Getenv("IPIPD_HOSTILE_PACKETS"); v != "" {
		var err error
		if total, err = strconv.Atoi(v); err != nil {
			t.Fatal(err)
		}
	}
	for _, test := range []struct {
		name, reason string
		flags        []string
	}{
		{"reverse-path", "reverse-path", nil},
		{"accept-from", "not-in-accept-from", []string{"--accept-from", "172.16.0.0/12", "--accept-to", "10.10.0.0/16"}},
		{"accept-to", "not-in-accept-to", []string{"--accept-from", "0.0.0.0/0", "--accept-to", "10.10.0.0/16"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			hub, spoke := mesh(t, 2)
			hub.Sysctl("net.ipv4.conf.br0.rp_filter", "0")
			d := variant{}.upAny(t, hub, 1, test.flags...)
			upSpokes(t, hub, spoke[:1])
			ping(t, hub, "-I", "10.10.0.1", "10.11.0.1")

			into := newInjector(t, spoke[1], "veth0", hub, "br0")
			packets := newMadeUp(test.name)
			const burst = 4000 // as many as the socket's buffer has room for, beside the pings
			within := func(sent int) {
				netlab.Eventually(t, "the packets are counted", func() bool { return d.Drops(test.reason) >= uint64(sent) })
			}
			sent := 0
			send := func(n int) {
				for range n {
					into.send(packets.next())
				}
				sent += n
				within(sent)
			}
			for range 2 {
				send(burst) // so that the buffers are allocated before memory is compared
			}
			memory, before := resident(t, d), d.Status()
			asked, answered := echoes(t, spoke[0])
			requests, done := make(chan uint64, 1), make(chan struct{})
			go func() {
				for n := uint64(0); ; {
					// The answers are counted where they leave: the kernel drops some before, if other tests on this machine
					// have many that wait.
					_, _ = hub.Try("ping", "-q", "-c", "20", "-i", "0.02", "-W", "1", "-I", "10.10.0.1", "10.11.0.1")
					n += 20
					select {
					case <-done:
						requests <- n
						return
					default:
					}
				}
			}()
			for left := total; left > 0; left -= burst {
				send(min(left, burst))
			}
			close(done)
			pings, come := <-requests, uint64(0)
			netlab.Eventually(t, "each ping arrives, and each answer, and nothing else comes in", func() bool {
				now, sent := echoes(t, spoke[0])
				come = sent - answered
				return now-asked == pings && come > 0 && d.Status().RxPacket-before.RxPacket == come
			})
			if grown := resident(t, d) - memory; grown > 16<<20 {
				t.Errorf("memory has grown from %d to %d bytes", memory, memory+grown)
			}
			t.Logf("%d packets, %d pings, %d answers; memory %d KiB, then %d KiB", sent, pings, come, memory>>10, resident(t, d)>>10)
		})
	}
}

// madeUp makes packets with spoofed sources that a tunnel of this mode must refuse.
type madeUp struct {
	random *rand.Rand
	mode   string
	p      []byte
}

func newMadeUp(mode string) *madeUp {
	inner := datagram(ipv4.Header{TTL: 64, Source: addr("10.11.0.1"), Destination: addr("10.10.0.1")}, 18)
	return &madeUp{rand.New(rand.NewPCG(1, 2)), mode, build(ipv4.Header{TTL: 64, Protocol: ipv4.ProtocolIPIP, Source: addr("203.0.113.9"), Destination: addr(outerOf(1))}, inner)}
}

// next returns the next packet, valid until the call after it.
func (f *madeUp) next() []byte {
	outer, inner := f.p[:ipv4.HeaderLen], f.p[ipv4.HeaderLen:]
	// A stranger with an inner source of the true peer's network, or with any, or the true peer with any.
	binary.BigEndian.PutUint32(outer[12:], 1<<24+f.random.Uint32N(126<<24))
	binary.BigEndian.PutUint32(inner[12:], 10<<24|11<<16|f.random.Uint32N(1<<16))
	if kind := f.random.IntN(4); kind >= 2 {
		binary.BigEndian.PutUint32(inner[12:], 1<<24+f.random.Uint32N(9<<24))
		if kind == 3 {
			copy(outer[12:], []byte{192, 0, 2, 11})
		}
	}
	if f.mode == "accept-to" {
		binary.BigEndian.PutUint32(inner[16:], 11<<24|f.random.Uint32N(1<<24))
	}
	for _, h := range [][]byte{outer, inner[:ipv4.HeaderLen]} {
		h[10], h[11] = 0, 0
		binary.BigEndian.PutUint16(h[10:], ipv4.Checksum(h, 0))
	}
	return f.p
}

// echoes returns how many echo requests a host has received, and how many answers it has sent.
func echoes(t *testing.T, ns *netlab.NS) (requests, answers uint64) {
	t.Helper()
	for _, c := range []struct {
		name string
		n    *uint64
	}{{"IcmpInEchos", &requests}, {"IcmpOutEchoReps", &answers}} {
		if _, err := fmt.Sscan(ns.Run("sh", "-c", "nstat -asz "+c.name+" | awk '$1 == \""+c.name+"\" { print $2 }'"), c.n); err != nil {
			t.Fatal(err)
		}
	}
	return requests, answers
}

// resident returns the resident memory of a daemon in bytes.
func resident(t *testing.T, d *netlab.Daemon) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", d.PID()))
	if err != nil {
		t.Fatal(err)
	}
	pages, err := strconv.Atoi(strings.Fields(string(b))[1])
	if err != nil {
		t.Fatal(err)
	}
	return pages * os.Getpagesize()
}
