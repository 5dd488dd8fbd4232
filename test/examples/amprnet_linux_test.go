package examples

import (
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"ipipd/test/netlab"
)

// rip returns a RIPv2 response (RFC 2453) as amprgw sends it: a plain-text password, then a route for each subnet,
// whose next hop is the public address of its gateway.
func rip(routes map[string]string) []byte {
	b := []byte{2, 2, 0, 0} // response, version 2
	b = append(b, 0xff, 0xff, 0, 2)
	b = append(b, "pLaInTeXtpAsSwD\x00"...) // of ampr-ripd
	for subnet, gateway := range routes {
		p, hop := netip.MustParsePrefix(subnet), netip.MustParseAddr(gateway)
		b = append(b, 0, 2, 0, 4) // AF_INET, tag 4
		b = append(b, p.Addr().AsSlice()...)
		b = append(b, net.CIDRMask(p.Bits(), 32)...)
		b = append(b, hop.AsSlice()...)
		b = append(b, 0, 0, 0, 1)
	}
	return b
}

// ampr-ripd adds routes by amprgw's announcements, and packets go to the gateways that they name. Only amprgw
// may send from any source.
func TestAMPRNet(t *testing.T) {
	t.Parallel()
	ripd := need(t, "ampr-ripd", "ampr-ripd")
	u := newUnderlay(t)
	amprgw, _ := u.node(t, "169.228.34.84")
	peer, _ := u.node(t, "198.51.100.2")
	ours, _ := u.node(t, "192.0.2.1")
	netlab.Up(t, amprgw, "t0", "--local-address", "169.228.34.84", "--remote-address", "192.0.2.1", "--keepalive", "off", "--address", "44.0.0.1/32",
		"--route", "44.128.1.0/24", "--route", "224.0.0.9/32")
	amprgw.Run("ip", "address", "add", "203.0.113.77/32", "dev", "lo") // somebody in the Internet
	netlab.Up(t, peer, "t0", "--local-address", "198.51.100.2", "--remote-address", "192.0.2.1", "--keepalive", "off", "--address", "44.130.2.1/32",
		"--route", "44.128.1.0/24")
	peer.Run("ip", "address", "add", "203.0.113.78/32", "dev", "lo")

	dir := example(t, "amprnet")
	d := netlab.UpConfig(t, ours, "ampr0", filepath.Join(dir, "ipipd.yaml"))
	ours.Run(filepath.Join(dir, "routes"))
	ours.Sysctl("net.ipv4.conf.ampr0.rp_filter", "1")
	start(t, ours, ripd, "-d", "-i", "ampr0", "-t", "44", "-a", "44.128.1.0/24")
	announce := func(routes map[string]string) {
		t.Helper()
		var err error
		amprgw.Do(func() {
			var c *net.UDPConn
			if c, err = net.DialUDP("udp4", &net.UDPAddr{IP: net.IPv4(44, 0, 0, 1), Port: 520}, &net.UDPAddr{IP: net.IPv4(224, 0, 0, 9), Port: 520}); err == nil {
				_, err = c.Write(rip(routes))
				c.Close()
			}
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	netlab.Eventually(t, "the route that is announced is there", func() bool {
		announce(map[string]string{"44.130.2.0/24": "198.51.100.2", "44.128.1.0/24": "192.0.2.1"})
		out := ours.Run("ip", "route", "show", "table", "44")
		return strings.Contains(out, "44.130.2.0/24 via 198.51.100.2 dev ampr0 proto 44 onlink")
	})
	received := netlab.Capture(t, peer, "eth0", nil) // with ETH_P_ALL: sockets for ETH_P_IP come after the fast path
	netlab.Eventually(t, "packets go to that gateway", func() bool { return answered(ours, "44.130.2.1", "-I", "44.128.1.1") })
	received.Await(netlab.Outer(netlab.Source("192.0.2.1"), netlab.Inner(netlab.Source("44.128.1.1"), netlab.Destination("44.130.2.1"))))
	if !answered(amprgw, "44.128.1.1", "-I", "203.0.113.77") {
		t.Error("the Internet does not come through amprgw")
	}
	before := d.Drops("not-in-accept-from")
	if answered(peer, "44.128.1.1", "-I", "203.0.113.78") {
		t.Error("another gateway may send from a source of the Internet")
	}
	if d.Drops("not-in-accept-from") == before {
		t.Error("it is not counted")
	}
	// The subnet moves to amprgw.
	netlab.Eventually(t, "a new gateway is followed", func() bool {
		announce(map[string]string{"44.130.2.0/24": "169.228.34.84"})
		return strings.Contains(ours.Run("ip", "route", "show", "table", "44"), "44.130.2.0/24 via 169.228.34.84")
	})
	netlab.Eventually(t, "and who may send with it", func() bool { return !answered(peer, "44.128.1.1", "-I", "44.130.2.1") })
}
