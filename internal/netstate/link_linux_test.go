package netstate

import (
	"encoding/binary"
	"errors"
	"strings"
	"testing"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"ipipd/test/netlab"
)

func TestLink_missing(t *testing.T) {
	ns := netlab.New(t)
	h := openHost(t, ns)
	ns.Do(func() {
		_, err := fresh.DeviceIndex("nil0")
		if !errors.Is(err, unix.ENODEV) || !strings.Contains(err.Error(), `no interface "nil0": create it, or`) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%v", err)
		}
		_, addressErr := fresh.AddAddresses(1234, addressesOf("10.0.0.1/8"))
		_, routeErr := h.AddRoutes(1234, routesOf("10.0.0.0/8"))
		replaceErr := h.ReplaceRoutes(1234, routesOf("10.0.0.0/8"))
		configureErr := h.Configure([]Interface{{Index: 1234, Addresses: addressesOf("10.0.0.1/8")}})
		for _, err := range []error{fresh.SetUp(1234), addressErr, routeErr, replaceErr, configureErr} {
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
		{"a VRF", message(unix.AF_UNSPEC, name, mtu, attr(unix.IFLA_LINKINFO, append(attr(unix.IFLA_INFO_KIND, []byte("vrf\x00")...),
			attr(unix.IFLA_INFO_DATA, attr(nl.IFLA_VRF_TABLE, u32(77)...)...)...)...)),
			link{index: 7, name: "eth0", kind: unix.ARPHRD_ETHER, flags: unix.IFF_UP, mtu: 1500, vrfTable: 77}, true},
		{"another kind", message(unix.AF_UNSPEC, name, mtu, attr(unix.IFLA_LINKINFO, append(attr(unix.IFLA_INFO_KIND, []byte("vlan\x00")...),
			attr(unix.IFLA_INFO_DATA, attr(nl.IFLA_VRF_TABLE, u32(77)...)...)...)...)),
			link{index: 7, name: "eth0", kind: unix.ARPHRD_ETHER, flags: unix.IFF_UP, mtu: 1500}, true},
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
