package tunnel

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"ipipd/internal/netstate"
	"ipipd/internal/warning"
	"ipipd/keepalive"
	"ipipd/test/memory"
)

func TestReflectsBehindNAT(t *testing.T) {
	const public = "198.51.100.1"
	echo := func(c *Config) {
		c.KeepaliveProbe, c.KeepaliveTarget = keepalive.FormEcho, netip.MustParseAddr("10.255.0.2")
		c.Addresses = []netstate.InterfaceAddress{{Prefix: netip.MustParsePrefix("10.255.0.1/30")}}
	}
	for _, x := range []struct {
		name, local, remote string
		set                 func(*Config)
		want                bool
	}{
		{"RFC 1918", "10.0.0.5", public, nil, true},
		{"RFC 1918", "172.31.0.5", public, nil, true},
		{"RFC 1918", "192.168.0.5", public, nil, true},
		{"RFC 6598", "100.64.0.5", public, nil, true},
		{"link-local", "169.254.0.5", public, nil, true},
		{"public", "192.0.2.1", public, nil, false},
		{"next to RFC 1918", "172.32.0.5", public, nil, false},
		{"next to RFC 6598", "100.128.0.5", public, nil, false},
		{"both private", "10.0.0.5", "192.168.7.7", nil, false},
		{"only the peer is private", "192.0.2.1", "10.0.0.5", nil, false},
		{"keepalive off", "10.0.0.5", public, func(c *Config) { c.Keepalive = keepalive.Config{} }, false},
		{"echo", "10.0.0.5", public, echo, false},
		{"empty", "10.0.0.5", public, func(c *Config) { c.KeepaliveProbe = keepalive.FormEmpty }, false},
	} {
		socket, _ := memory.NewSocketPair()
		s := start(t, socket, netip.MustParseAddr(x.local), netip.MustParseAddr(x.remote), func(c *Config) {
			c.Keepalive = keepalive.Default
			if x.set != nil {
				x.set(c)
			}
		})
		if got := s.warned(warning.KeepaliveBehindNAT); got != x.want {
			t.Errorf("%s, %s to %s: it warns %v, want %v", x.name, x.local, x.remote, got, x.want)
		}
		s.noteProbeAnswer(time.Now())
		s.wakeControl()
		eventually(t, "an answer ends it", func() bool { return !s.warned(warning.KeepaliveBehindNAT) })
	}
}

// The command contains the inner addresses that are known, and the flags are the same settings.
func TestConfigEchoRemedy(t *testing.T) {
	for own, want := range map[string]string{
		"10.255.0.1/30":              "keepalive-target=10.255.0.2",
		"10.255.0.6/30":              "keepalive-target=10.255.0.5",
		"10.255.0.4/31":              "keepalive-target=10.255.0.5",
		"10.255.0.4/30":              "keepalive-target=PEER-INNER-ADDRESS",
		"10.255.0.1/24":              "keepalive-target=PEER-INNER-ADDRESS",
		"10.255.0.1 peer 10.255.0.2": "keepalive-target=10.255.0.2",
		"":                           "keepalive-target=PEER-INNER-ADDRESS address=INNER-ADDRESS/30",
	} {
		c := Default()
		if own != "" {
			a, want := parseAddress(own)
			if want != "" {
				t.Fatalf("%s: want %s", own, want)
			}
			c.Addresses = []netstate.InterfaceAddress{a}
		}
		if got := c.EchoRemedy("ipip1"); got != "ipipd set ipip1 keepalive-probe=echo "+want {
			t.Errorf("%s: %s", own, got)
		}
		if got := c.EchoRemedy(""); got != "--keepalive-probe echo --"+strings.ReplaceAll(strings.ReplaceAll(want, "=", " "), " address", " --address") {
			t.Errorf("%s: %s", own, got)
		}
		c.KeepaliveTarget = netip.MustParseAddr("10.9.9.9")
		if got := c.PeerInner(); got != c.KeepaliveTarget {
			t.Errorf("%s: %v", own, got)
		}
	}
}
