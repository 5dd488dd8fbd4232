package interop

import (
	"testing"

	"ipipd/internal/ipv4"
	"ipipd/test/netlab"
)

// socat against the kernel, without ipipd: a failure here is the lab's.
func TestSocat_kernel(t *testing.T) {
	t.Parallel()
	l := newKernelLab(t)
	wire := l.record(t)
	socat(t, l.ours, ourOuter, peerOuter, ourInner)
	l.tunnel(t, "ttl 64 tos 0x28")
	ours := inNamespace(l.ours)

	for _, size := range []int{56, fullSize, manyFrags} {
		ping(t, ours, peerInner, size, "")
		ping(t, l.guest.Run, ourInner, size, "")
	}
	bulk(t, ours, l.guest.Run, peerInner, false)
	bulk(t, ours, l.guest.Run, peerInner, true)
	wire.Await(received(netlab.TTL(64), netlab.TOS(0x28), netlab.DF(true), request(netlab.Source(peerInner))))
}

// newSocatLab returns our end and a namespace with socat as the other end of the tunnel.
func newSocatLab(t *testing.T) (ours, peer *netlab.NS, end func()) {
	t.Helper()
	ours, peer = netlab.New(t), netlab.New(t)
	netlab.Veth(t, ours, peer, netlab.End{Name: "eth0", Address: ourOuter + "/24"}, netlab.End{Name: "eth0", Address: peerOuter + "/24"})
	return ours, peer, socat(t, peer, peerOuter, ourOuter, peerInner)
}

func TestSocat_ping(t *testing.T) {
	t.Parallel()
	ours, peer, _ := newSocatLab(t)
	wire := netlab.Capture(t, ours, "eth0", nil)
	d := up(t, ours)
	for _, size := range []int{0, 1, 56, fullSize - 1, fullSize, fullSize + 1, manyFrags} {
		ping(t, inNamespace(ours), peerInner, size, "")
		ping(t, inNamespace(peer), ourInner, size, "")
	}
	wire.Await(sent(netlab.TotalLen(1500), netlab.DF(false), netlab.TTL(255), request()))
	wire.Await(received(netlab.TotalLen(1500), reply()))
	if s := d.Status(); len(s.AllDrops()) > 0 {
		t.Errorf("drops are %v", s.AllDrops())
	}
}

func TestSocat_outerFragments(t *testing.T) {
	t.Parallel()
	ours, peer, _ := newSocatLab(t)
	wire := netlab.Capture(t, ours, "eth0", nil)
	up(t, ours, "--mtu", "9000")
	peer.Run("ip", "link", "set", "dev", "t0", "mtu", "9000")
	ping(t, inNamespace(ours), peerInner, manyFrags, "-M dont")
	ping(t, inNamespace(peer), ourInner, manyFrags, "-M dont")
	for _, source := range []string{ourOuter, peerOuter} {
		wire.Await(netlab.Protocol(ipv4.ProtocolIPIP), netlab.Source(source), netlab.MaxTotalLen(1500), netlab.Fragmented(true))
	}
}

func TestSocat_bulkTCP(t *testing.T) {
	t.Parallel()
	ours, peer, _ := newSocatLab(t)
	up(t, ours)
	bulk(t, inNamespace(ours), inNamespace(peer), peerInner, false)
	bulk(t, inNamespace(ours), inNamespace(peer), peerInner, true)
	// Without segmentation and checksum offload.
	netlab.DisableOffload(ours, "eth0")
	netlab.DisableOffload(peer, "eth0")
	bulk(t, inNamespace(ours), inNamespace(peer), peerInner, false)
	bulk(t, inNamespace(ours), inNamespace(peer), peerInner, true)
}

func TestSocat_echoKeepalive(t *testing.T) {
	t.Parallel()
	ours, peer, end := newSocatLab(t)
	d := up(t, ours, "--keepalive", "1s,3", "--keepalive-probe", "echo", "--keepalive-target", peerInner)
	awaitRunning(t, d, true, "up")
	end()
	awaitRunning(t, d, false, "lost")
	socat(t, peer, peerOuter, ourOuter, peerInner)
	awaitRunning(t, d, true, "up")
}
