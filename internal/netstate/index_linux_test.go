package netstate

import (
	"net/netip"
	"testing"
)

func TestKeyIndex(t *testing.T) {
	h := newHost(Options{})
	followers := map[string]*Follower{}
	addresses := []string{"0.0.0.1", "192.0.2.0", "192.0.2.1", "192.0.2.255", "192.0.3.0", "255.255.255.255"}
	for _, a := range addresses {
		f := &Follower{host: h}
		h.setKeysLocked(f, []key{{kind: byAddress, address: netip.MustParseAddr(a).As4()}, {kind: byDevice, n: 2}})
		followers[a] = f
	}
	for _, c := range []struct {
		prefix string
		want   map[string]bool
	}{
		{"0.0.0.0/0", map[string]bool{"0.0.0.1": true, "192.0.2.0": true, "192.0.2.1": true, "192.0.2.255": true, "192.0.3.0": true, "255.255.255.255": true}},
		{"192.0.2.7/24", map[string]bool{"192.0.2.0": true, "192.0.2.1": true, "192.0.2.255": true}},
		{"192.0.2.0/23", map[string]bool{"192.0.2.0": true, "192.0.2.1": true, "192.0.2.255": true, "192.0.3.0": true}},
		{"192.0.2.1/32", map[string]bool{"192.0.2.1": true}},
		{"192.0.2.2/32", nil},
		{"128.0.0.0/1", map[string]bool{"192.0.2.0": true, "192.0.2.1": true, "192.0.2.255": true, "192.0.3.0": true, "255.255.255.255": true}},
		{"198.51.100.0/24", nil},
	} {
		p := netip.MustParsePrefix(c.prefix)
		h.markRangeLocked(p.Addr().As4(), p.Bits())
		for a, f := range followers {
			if got := f.dirty == dirtyRoute; got != c.want[a] {
				t.Errorf("%s concerns %s: %v", c.prefix, a, got)
			}
			f.dirty = 0
		}
	}
	for _, f := range followers {
		f.closed = true
		h.setKeysLocked(f, nil)
	}
	if len(h.index.sets)+len(h.index.addresses) != 0 {
		t.Errorf("%+v", h.index)
	}
}
