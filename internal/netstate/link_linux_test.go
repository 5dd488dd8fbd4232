package netstate

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ipipd/test/netlab"
)

// newTun makes a namespace with a TUN interface, tun0, which is down.
func newTun(t *testing.T) *netlab.NS {
	ns := netlab.New(t)
	ns.Run("ip", "tuntap", "add", "tun0", "mode", "tun")
	return ns
}

// prefixes parses its arguments.
func prefixes(texts ...string) (list []netip.Prefix) {
	for _, text := range texts {
		list = append(list, netip.MustParsePrefix(text))
	}
	return list
}

func TestAddAddresses(t *testing.T) {
	ns := newTun(t)
	device := index(t, ns, "tun0")
	ns.Do(func() {
		for _, want := range [][]netip.Prefix{prefixes("10.255.0.1/30"), nil} { // the second time is no error
			if added, err := AddAddresses(device, prefixes("10.255.0.1/30")); err != nil || !slices.Equal(added, want) {
				t.Fatal(added, err)
			}
		}
		if _, err := AddAddresses(device, prefixes("10.255.1.1/32")); err != nil {
			t.Fatal(err)
		}
		if err := SetUp(device); err != nil {
			t.Fatal(err)
		}
		routes := prefixes("10.1.0.0/16", "10.2.3.4/16", "10.3.0.1/32", "10.255.0.0/30", "0.0.0.0/0", "10.1.0.0/16")
		added, err := fresh.AddRoutes(device, routes)
		if want := prefixes("10.1.0.0/16", "10.2.3.4/16", "10.3.0.1/32", "0.0.0.0/0"); err != nil || !slices.Equal(added, want) {
			t.Error(added, err)
		}
		for _, r := range routes {
			if err := fresh.CheckRoute(device, r); err != nil {
				t.Error(err)
			}
		}
	})
	addresses, routes := ns.Run("ip", "address", "show", "tun0"), ns.Run("ip", "route")
	for _, want := range []string{"inet 10.255.0.1/30", "inet 10.255.1.1/32"} {
		if !strings.Contains(addresses, want) {
			t.Errorf("no %q in\n%s", want, addresses)
		}
	}
	for _, want := range []string{"10.1.0.0/16 dev tun0", "10.2.0.0/16 dev tun0", "10.3.0.1 dev tun0", "default dev tun0", "10.255.0.0/30 dev tun0"} {
		if !strings.Contains(routes, want) {
			t.Errorf("no %q in\n%s", want, routes)
		}
	}
}

func TestRequester_CheckRoute(t *testing.T) {
	ns := newTun(t)
	ns.Run("ip", "tuntap", "add", "tun1", "mode", "tun")
	ns.Run("ip", "link", "set", "tun1", "up")
	ns.Run("ip", "route", "add", "10.1.0.0/16", "dev", "tun1")
	device := index(t, ns, "tun0")
	ns.Do(func() {
		if err := SetUp(device); err != nil {
			t.Fatal(err)
		}
		if added, err := fresh.AddRoutes(device, prefixes("10.1.0.0/16")); len(added) != 0 || err != nil {
			t.Error(added, err)
		}
		err := fresh.CheckRoute(device, netip.MustParsePrefix("10.1.0.0/16"))
		if !errors.Is(err, unix.EEXIST) || !strings.Contains(err.Error(), "remove it first") || strings.Contains(err.Error(), "\n") {
			t.Errorf("%v", err)
		}
	})
	if out := ns.Run("ip", "route", "show", "10.1.0.0/16"); !strings.Contains(out, "tun1") || strings.Contains(out, "tun0") {
		t.Errorf("routes: %s", out)
	}
}

// A route belongs in the table of the interface's VRF.
func TestRequester_AddRoutes(t *testing.T) {
	t.Run("vrf", func(t *testing.T) {
		ns := newTun(t)
		if out, err := ns.Try("ip", "link", "add", "red", "type", "vrf", "table", "77"); err != nil {
			t.Skip("the kernel has no VRF: " + strings.TrimSpace(out))
		}
		ns.Run("ip", "link", "set", "tun0", "up", "master", "red")
		device := index(t, ns, "tun0")
		ns.Do(func() {
			if added, err := fresh.AddRoutes(device, prefixes("10.1.0.0/16")); len(added) != 1 || err != nil {
				t.Error(added, err)
			}
			if err := fresh.CheckRoute(device, netip.MustParsePrefix("10.1.0.0/16")); err != nil {
				t.Error(err)
			}
		})
		if out := ns.Run("ip", "route", "show", "table", "77"); !strings.Contains(out, "10.1.0.0/16 dev tun0") {
			t.Errorf("table 77: %s", out)
		}
		if out := ns.Run("ip", "route"); strings.Contains(out, "10.1.0.0/16") {
			t.Errorf("main table: %s", out)
		}
	})
}

func TestLink_missing(t *testing.T) {
	netlab.New(t).Do(func() {
		_, err := DeviceIndex("nil0")
		if !errors.Is(err, unix.ENODEV) || !strings.Contains(err.Error(), `no interface "nil0": create it first`) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%v", err)
		}
		_, addressErr := AddAddresses(1234, prefixes("10.0.0.1/8"))
		_, routeErr := fresh.AddRoutes(1234, prefixes("10.0.0.0/8"))
		for _, err := range []error{SetUp(1234), addressErr, routeErr, fresh.CheckRoute(1234, netip.MustParsePrefix("10.0.0.0/8"))} {
			if !errors.Is(err, unix.ENODEV) || !strings.Contains(err.Error(), "no interface with index 1234 in this network namespace") || strings.Contains(err.Error(), "\n") {
				t.Errorf("%v", err)
			}
		}
	})
}

func TestParseLink(t *testing.T) {
	attr := func(kind uint16, value ...byte) []byte {
		b := binary.NativeEndian.AppendUint16(nil, uint16(4+len(value)))
		b = append(binary.NativeEndian.AppendUint16(b, kind), value...)
		return append(b, make([]byte, align(len(b))-len(b))...)
	}
	u32 := func(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }
	message := func(family byte, attrs ...[]byte) []byte {
		b := []byte{family, 0}
		b = binary.NativeEndian.AppendUint16(b, unix.ARPHRD_ETHER)
		b = append(append(append(b, u32(7)...), u32(unix.IFF_UP|unix.IFF_PROMISC)...), u32(0)...)
		for _, a := range attrs {
			b = append(b, a...)
		}
		return b
	}
	name, mtu := attr(unix.IFLA_IFNAME, []byte("eth0\x00")...), attr(unix.IFLA_MTU, u32(1500)...)
	for _, c := range []struct {
		name    string
		message []byte
		want    link
		ok      bool
	}{
		{"whole", message(unix.AF_UNSPEC, name, mtu, attr(unix.IFLA_MASTER, u32(3)...), attr(unix.IFLA_ADDRESS, 2, 0, 0, 0, 0, 1),
			attr(unix.IFLA_PROMISCUITY, u32(1)...), attr(unix.IFLA_LINKINFO|unix.NLA_F_NESTED, attr(iflaSlaveKind, []byte("vrf\x00")...)...),
			attr(iflaPropList|unix.NLA_F_NESTED, attr(iflaAltIfname, []byte("uplink\x00")...)...)),
			link{index: 7, name: "eth0", altNames: " uplink", kind: unix.ARPHRD_ETHER, flags: unix.IFF_UP, mtu: 1500, master: 3, slaveKind: "vrf",
				mac: [6]byte{2, 0, 0, 0, 0, 1}, hasMAC: true, promiscuous: true}, true},
		{"a bridge's port", message(unix.AF_BRIDGE, name, mtu), link{}, false},
		{"an event of wireless extensions", message(unix.AF_UNSPEC, name), link{}, false},
		{"cut off", message(unix.AF_UNSPEC, name, mtu)[:30], link{}, false},
		{"nothing", nil, link{}, false},
	} {
		if got, ok := parseLink(c.message); ok != c.ok || ok && got != c.want {
			t.Errorf("%s: %+v, %v", c.name, got, ok)
		}
	}
}
