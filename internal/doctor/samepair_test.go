package doctor

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ipipd/internal/netstate"
)

func TestSamePairs(t *testing.T) {
	outer := func(name, local, remote string) Outer {
		l, _ := netip.ParseAddr(local)
		r, _ := netip.ParseAddr(remote)
		return Outer{name, l, r}
	}
	kernel := func(name, local, remote string) netstate.KernelTunnel {
		return netstate.KernelTunnel(outer(name, local, remote))
	}
	var got []string
	SamePairs(
		[]Outer{outer("a", "192.0.2.1", "192.0.2.9"), outer("b", "192.0.2.1", "192.0.2.8"), outer("c", "192.0.2.1", "192.0.2.7"),
			outer("again", "192.0.2.1", "192.0.2.8"), outer("waits", "192.0.2.1", ""), outer("waits too", "0.0.0.0", "192.0.2.6")},
		[]Outer{outer("other", "192.0.2.1", "192.0.2.9"), outer("unknown", "192.0.2.1", ""), outer("reversed", "192.0.2.7", "192.0.2.1")},
		[]netstate.KernelTunnel{kernel("tunl0", "", ""), kernel("k1", "192.0.2.1", "192.0.2.8"), kernel("k2", "0.0.0.0", "192.0.2.7"), kernel("k3", "192.0.2.2", "192.0.2.9")},
		func(i int, what, why, do string) { got = append(got, fmt.Sprintf("%d: %s: %s", i, what, do)) },
	)
	want := []string{
		"0: it has the same outer addresses as other: 192.0.2.1 and 192.0.2.9: ipipd down other, or another --local-address",
		"3: it has the same outer addresses as b: 192.0.2.1 and 192.0.2.8: ipipd down b, or another --local-address",
		"1: the kernel's tunnel k1 has the same outer addresses: 192.0.2.1 and 192.0.2.8: ip link delete k1",
		"2: the kernel's tunnel k2 has the same outer addresses: 192.0.2.1 and 192.0.2.7: ip link delete k2",
		"3: the kernel's tunnel k1 has the same outer addresses: 192.0.2.1 and 192.0.2.8: ip link delete k1",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}
