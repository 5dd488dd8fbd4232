package ipv4

import (
	"net/netip"
	"testing"
)

func TestIsUnicast(t *testing.T) {
	for text, want := range map[string]bool{
		"192.0.2.1": true, "127.0.0.1": true, "0.0.0.1": true, "240.0.0.1": true, "255.255.255.254": true,
		"0.0.0.0": false, "224.0.0.1": false, "239.255.255.255": false, "255.255.255.255": false, "2001:db8::1": false, "::ffff:192.0.2.1": false,
	} {
		if got := IsUnicast(netip.MustParseAddr(text)); got != want {
			t.Errorf("%s: %v, want %v", text, got, want)
		}
	}
	if IsUnicast(netip.Addr{}) {
		t.Error("no address is one of a host")
	}
}
