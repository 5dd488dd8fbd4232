package tunnel

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"ipipd/encap"
	"ipipd/internal/drop"
	"ipipd/internal/ipsec"
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
)

// Without a session nothing is sent.
func TestIPsecPolicy_noSession(t *testing.T) {
	c := Default()
	c.IPsec.Secret = []byte("secret")
	g := newIPsecPolicy(ipsec.NewManager(ipsec.Options{}), &c, c.IPsec.Secret, slog.New(slog.DiscardHandler), nil, nil)
	b := packet.New(100)
	for range 2 {
		if d := g.Seal(b); d != drop.ESPNoSA {
			t.Errorf("Seal: %v", d)
		}
	}
	if g.established() || g.quotesSA(&encap.OuterError{Protocol: ipv4.ProtocolESP}) {
		t.Error("it is open")
	}
}

func TestNewIPsecPolicy_shortSecret(t *testing.T) {
	for secret, warnings := range map[string]int{strings.Repeat("s", ipsec.WeakSecret-1): 1, strings.Repeat("s", ipsec.WeakSecret): 0} {
		c := Default()
		c.IPsec.Secret = []byte(secret)
		var log bytes.Buffer
		newIPsecPolicy(ipsec.NewManager(ipsec.Options{}), &c, c.IPsec.Secret, slog.New(slog.NewTextHandler(&log, nil)), nil, nil)
		if strings.Count(log.String(), "the secret is short") != warnings || strings.Contains(log.String(), secret) {
			t.Errorf("%d bytes: %s", len(secret), log.String())
		}
	}
}
