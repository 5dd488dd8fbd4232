package netstate

import (
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// peer parses a route with a gateway.
func peer(prefix, gateway string) InterfaceRoute {
	return InterfaceRoute{Prefix: netip.MustParsePrefix(prefix), Gateway: netip.MustParseAddr(gateway)}
}

// A route with a gateway has RouteProtocolPeer, and only routes of that protocol are removed.
func TestInterfaceRoute_gateway(t *testing.T) {
	ns := newTun(t)
	ns.Run("ip", "link", "set", "lo", "up")
	h := openHost(t, ns)
	device := index(t, ns, "tun0")
	shown := func(want string) {
		t.Helper()
		if out := ns.Run("sh", "-c", "ip route show proto 94 | sed 's/ linkdown//; s/ *$//'"); out != want {
			t.Errorf("routes of protocol 94:\n%swant:\n%s", out, want)
		}
	}
	a, b := peer("10.1.0.0/16", "198.51.100.7"), peer("10.2.0.0/16", "198.51.100.8")
	if s := a.String(); s != "10.1.0.0/16 via 198.51.100.7" {
		t.Error(s)
	}
	for range 2 { // the second time is no error
		if err := h.Configure([]Interface{{Index: device, Routes: []InterfaceRoute{a, b}}}); err != nil {
			t.Fatal(err)
		}
	}
	const both = "10.1.0.0/16 via 198.51.100.7 dev tun0 onlink\n10.2.0.0/16 via 198.51.100.8 dev tun0 onlink\n"
	shown(both)
	ns.Run("ip", "route", "add", "10.3.0.0/16", "via", "198.51.100.7", "dev", "tun0", "onlink", "proto", "bird")
	other := peer("10.1.0.0/16", "198.51.100.9")
	if err := h.RemoveRoutes(device, []InterfaceRoute{other, peer("10.3.0.0/16", "198.51.100.7"), other.Slot()}); err != nil {
		t.Error(err)
	}
	shown(both)
	if added, err := h.AddRoutes(device, []InterfaceRoute{other}); len(added) != 0 || err != nil {
		t.Error(added, err)
	}
	if err := h.Configure([]Interface{{Index: device, Routes: []InterfaceRoute{other}}}); err == nil || !strings.Contains(err.Error(), "add route 10.1.0.0/16 via 198.51.100.9 to tun0: there is one that leads elsewhere") {
		t.Error(err)
	}
	if existing, err := h.ExistingRoutes([]Interface{{Index: device, Routes: []InterfaceRoute{a, other}}}); err != nil || len(existing) != 1 || !existing[a] {
		t.Error(existing, err)
	}
	// The next process has another remote for one prefix, and no longer has the other prefix.
	if err := h.Configure([]Interface{{Index: device, Adopted: true, Routes: []InterfaceRoute{other}}}); err != nil {
		t.Error(err)
	}
	shown("10.1.0.0/16 via 198.51.100.9 dev tun0 onlink\n")
	if out := ns.Run("ip", "route", "show", "10.3.0.0/16"); out == "" {
		t.Error("another's is gone")
	}
	ns.Run("ip", "address", "add", "192.0.2.1/24", "dev", "lo")
	if err := h.Configure([]Interface{{Index: device, Routes: []InterfaceRoute{peer("10.4.0.0/16", "192.0.2.1")}}}); err == nil ||
		err.Error() != "add route 10.4.0.0/16 via 192.0.2.1 to tun0: 192.0.2.1 is an address of this host, or not one of a host: give the other end's: "+unix.EINVAL.Error() {
		t.Error(err)
	}
	if err := h.RemoveRoutes(device, []InterfaceRoute{other}); err != nil {
		t.Error(err)
	}
	shown("")
}
