package rtnl

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ipipd/internal/netlab"
)

// newTun is a namespace with the interface of a tunnel in it, tun0, still down.
func newTun(t *testing.T) *netlab.NS {
	ns := netlab.New(t)
	ns.Run("ip", "tuntap", "add", "tun0", "mode", "tun")
	return ns
}

func TestAddressesAndRoutesAreAdded(t *testing.T) {
	ns := newTun(t)
	ns.Do(func() {
		for range 2 { // doing it again is no error
			if err := AddAddress("tun0", netip.MustParsePrefix("10.255.0.1/30")); err != nil {
				t.Fatal(err)
			}
		}
		if err := AddAddress("tun0", netip.MustParsePrefix("10.255.1.1/32")); err != nil {
			t.Fatal(err)
		}
		if err := SetUp("tun0"); err != nil {
			t.Fatal(err)
		}
		for _, r := range []string{"10.1.0.0/16", "10.2.3.4/16", "10.3.0.1/32", "10.255.0.0/30", "0.0.0.0/0", "10.1.0.0/16"} {
			if err := AddRoute("tun0", netip.MustParsePrefix(r)); err != nil {
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

func TestARouteThatLeadsElsewhereIsLeftAlone(t *testing.T) {
	ns := newTun(t)
	ns.Run("ip", "tuntap", "add", "tun1", "mode", "tun")
	ns.Run("ip", "link", "set", "tun1", "up")
	ns.Run("ip", "route", "add", "10.1.0.0/16", "dev", "tun1")
	ns.Do(func() {
		if err := SetUp("tun0"); err != nil {
			t.Fatal(err)
		}
		err := AddRoute("tun0", netip.MustParsePrefix("10.1.0.0/16"))
		if !errors.Is(err, unix.EEXIST) || !strings.Contains(err.Error(), "remove it first") || strings.Contains(err.Error(), "\n") {
			t.Errorf("%v", err)
		}
	})
	if out := ns.Run("ip", "route", "show", "10.1.0.0/16"); !strings.Contains(out, "tun1") || strings.Contains(out, "tun0") {
		t.Errorf("routes: %s", out)
	}
}

func TestLinkStateTellsUpFromCarrier(t *testing.T) {
	a, b := netlab.New(t), netlab.New(t)
	netlab.Veth(t, a, b, netlab.End{Name: "eth0"}, netlab.End{Name: "eth0"})
	expect := func(wantUp, wantCarrier bool) {
		t.Helper()
		eventually(t, "the state of the link", func() bool {
			var up, carrier bool
			a.Do(func() {
				var err error
				if up, carrier, err = LinkState("eth0"); err != nil {
					t.Fatal(err)
				}
			})
			return up == wantUp && carrier == wantCarrier
		})
	}
	expect(true, true)
	b.Run("ip", "link", "set", "eth0", "down")
	expect(true, false)
	a.Run("ip", "link", "set", "eth0", "down")
	expect(false, false)
}

func TestAMissingInterfaceIsNamed(t *testing.T) {
	netlab.New(t).Do(func() {
		_, indexErr := DeviceIndex("nil0")
		_, _, stateErr := LinkState("nil0")
		for _, err := range []error{
			indexErr, stateErr, SetUp("nil0"),
			AddAddress("nil0", netip.MustParsePrefix("10.0.0.1/8")), AddRoute("nil0", netip.MustParsePrefix("10.0.0.0/8")),
		} {
			if !errors.Is(err, unix.ENODEV) || !strings.Contains(err.Error(), `no interface "nil0": create it first`) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%v", err)
			}
		}
	})
}
