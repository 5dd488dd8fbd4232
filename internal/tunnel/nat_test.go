package tunnel

import (
	"net/netip"
	"testing"

	"ipipd/internal/netstate"
	"ipipd/keepalive"
	"ipipd/test/memory"
)

func TestTunnelWarnNAT(t *testing.T) {
	const public = "198.51.100.1"
	echo := func(c *Config) {
		c.KeepaliveProbe, c.KeepaliveTarget = keepalive.FormEcho, netip.MustParseAddr("10.255.0.2")
		c.Addresses = []netstate.InterfaceAddress{{Prefix: netip.MustParsePrefix("10.255.0.1/30")}}
	}
	for _, x := range []struct {
		name, local, remote string
		set                 func(*Config)
		want                int
	}{
		{"RFC 1918", "10.0.0.5", public, nil, 1},
		{"RFC 1918", "172.31.0.5", public, nil, 1},
		{"RFC 1918", "192.168.0.5", public, nil, 1},
		{"RFC 6598", "100.64.0.5", public, nil, 1},
		{"link-local", "169.254.0.5", public, nil, 1},
		{"public", "192.0.2.1", public, nil, 0},
		{"next to RFC 1918", "172.32.0.5", public, nil, 0},
		{"next to RFC 6598", "100.128.0.5", public, nil, 0},
		{"both private", "10.0.0.5", "192.168.7.7", nil, 0},
		{"only the peer is private", "192.0.2.1", "10.0.0.5", nil, 0},
		{"keepalive off", "10.0.0.5", public, func(c *Config) { c.Keepalive = keepalive.Config{} }, 0},
		{"echo", "10.0.0.5", public, echo, 0},
		{"empty", "10.0.0.5", public, func(c *Config) { c.KeepaliveProbe = keepalive.FormEmpty }, 0},
	} {
		socket, _ := memory.NewSocketPair()
		s := start(t, socket, netip.MustParseAddr(x.local), netip.MustParseAddr(x.remote), func(c *Config) {
			c.Keepalive = keepalive.Default
			if x.set != nil {
				x.set(c)
			}
		})
		if got := s.network.logged("behind a NAT"); got != x.want {
			t.Errorf("%s, %s to %s: %d warnings, want %d", x.name, x.local, x.remote, got, x.want)
		}
	}
}
