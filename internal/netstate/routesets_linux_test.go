package netstate

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"ipipd/internal/drop"
	"ipipd/internal/ipv4"
	"ipipd/test/routesets"
)

// A forwarding table made of the followed routes sends each packet to the next hop of the kernel's own route
// look-up, which is the outer destination of Linux's own tunl0.
func TestRouteFollower_routesets(t *testing.T) {
	for _, s := range routesets.Sets {
		t.Run(s.Name, func(t *testing.T) {
			t.Parallel()
			ns := mirrorLab(t)
			h := openHost(t, ns)
			m := followRoutes(t, h, ns, "tun0")
			ns.Run("sh", "-ec", s.Script("tun0"))
			m.agree(t, ns, "tun0", s.Script("tun0"))
			for _, want := range s.Want {
				remote, why := m.fib().Remote(packetTo(t, want.Destination))
				if why != want.Drop || why == drop.None && !slices.Contains(want.Remotes, netip.AddrFrom4(remote).String()) {
					t.Errorf("%s: %v, %v; want %v, %v", want.Destination, netip.AddrFrom4(remote), why, want.Remotes, want.Drop)
				}
				got, err := ns.Try("ip", "route", "get", want.Destination)
				switch fields := strings.Fields(got); {
				case want.Kernel:
					if err == nil && strings.Contains(got, "dev tun0") {
						t.Errorf("%s: the kernel does not drop it: %s", want.Destination, got)
					}
				case err != nil || !strings.Contains(got, "dev tun0"):
					t.Errorf("%s: the kernel does not send it to the interface: %v %s", want.Destination, err, got)
				default:
					gateway := want.Destination
					if at := slices.Index(fields, "via"); at >= 0 {
						gateway = fields[at+1]
					}
					if why == drop.None && !slices.Contains(want.Remotes, gateway) {
						t.Errorf("%s: the kernel's next hop is %s, want one of %v", want.Destination, gateway, want.Remotes)
					}
				}
			}
		})
	}
}

// packetTo is an inner packet.
func packetTo(t *testing.T, destination string) ipv4.Packet {
	b := make([]byte, ipv4.HeaderLen)
	h := ipv4.Header{TotalLen: len(b), TTL: 64, Protocol: ipv4.ProtocolUDP, Source: [4]byte{10, 255, 0, 1}, Destination: netip.MustParseAddr(destination).As4()}
	h.Put(b)
	p, err := ipv4.Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	return p
}
