package conformance

import (
	"strings"
	"testing"
	"time"

	"ipipd/test/netlab"
)

func TestMain(m *testing.M) { netlab.Main(m, 4) }

// Two hosts on one link, and a tunnel between them:
//
//	a  192.0.2.1 ── veth0 ───── veth0 ── 192.0.2.2  b       the underlay
//	   10.255.0.1 ═══ t0 ═══════ t0 ═══ 10.255.0.2          the tunnel
const (
	outerA, outerB = "192.0.2.1", "192.0.2.2"
	innerA, innerB = "10.255.0.1", "10.255.0.2"
)

// hosts returns a and b, joined by a veth pair, without a tunnel.
func hosts(t *testing.T) (a, b *netlab.NS) {
	t.Helper()
	a, b = netlab.New(t), netlab.New(t)
	netlab.Veth(t, a, b, netlab.End{Name: "veth0", Address: outerA + "/24"}, netlab.End{Name: "veth0", Address: outerB + "/24"})
	return a, b
}

// Two hosts with a router between them:
//
//	a  192.0.2.1 ── 192.0.2.254  router  198.51.100.254 ── 198.51.100.1  b
const (
	farA, farB = "192.0.2.1", "198.51.100.1"
)

// routed returns two hosts and a forwarding router with interfaces to-a and to-b, without a
// tunnel.
func routed(t *testing.T) (a, router, b *netlab.NS) {
	t.Helper()
	a, router, b = netlab.New(t), netlab.New(t), netlab.New(t)
	netlab.Veth(t, a, router, netlab.End{Name: "veth0", Address: farA + "/24"}, netlab.End{Name: "to-a", Address: "192.0.2.254/24"})
	netlab.Veth(t, b, router, netlab.End{Name: "veth0", Address: farB + "/24"}, netlab.End{Name: "to-b", Address: "198.51.100.254/24"})
	router.Sysctl("net.ipv4.ip_forward", "1")
	a.Run("ip", "route", "add", "default", "via", "192.0.2.254")
	b.Run("ip", "route", "add", "default", "via", "198.51.100.254")
	return a, router, b
}

// upA and upB start one end of the tunnel, with more flags.
func upA(t *testing.T, a *netlab.NS, more ...string) *netlab.Daemon {
	t.Helper()
	return netlab.Up(t, a, "t0", append([]string{"--local-address", outerA, "--remote-address", outerB, "--address", innerA + "/24"}, more...)...)
}

func upB(t *testing.T, b *netlab.NS, more ...string) *netlab.Daemon {
	t.Helper()
	return netlab.Up(t, b, "t0", append([]string{"--local-address", outerB, "--remote-address", outerA, "--address", innerB + "/24"}, more...)...)
}

// answered reports whether a ping is answered within a second of an idle machine.
func answered(from *netlab.NS, to string) bool {
	_, err := from.Try("ping", "-c", "1", "-W", netlab.Seconds(netlab.Scale(time.Second)), to)
	return err == nil
}

// ping sends an echo request each second until one is answered: the kernel drops a reply now and then, see
// netlab.Stream. It fails the test without any. It waits until the kernel has seen
// the carrier of each interface (linkwatch): before that it drops what is sent.
func ping(t *testing.T, from *netlab.NS, args ...string) string {
	t.Helper()
	netlab.Eventually(t, "each carrier is seen", func() bool {
		for link := range strings.Lines(from.Run("ip", "-o", "link")) {
			if strings.Contains(link, "LOWER_UP") && strings.Contains(link, "state DOWN") {
				return false
			}
		}
		return true
	})
	return from.Run("ping", append([]string{"-c", "1", "-w", netlab.Seconds(netlab.Timeout())}, args...)...)
}
