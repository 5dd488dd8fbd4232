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
	"ipipd/internal/warning"
)

// Without a session no packet is sent.
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

func TestControlWarnIPsec_shortSecret(t *testing.T) {
	for secret, short := range map[string]bool{strings.Repeat("s", ipsec.WeakSecret-1): true, strings.Repeat("s", ipsec.WeakSecret): false} {
		cfg := Default()
		cfg.IPsec.Secret = []byte(secret)
		var log bytes.Buffer
		c := warningControl(&log)
		c.ipsecPolicy = newIPsecPolicy(ipsec.NewManager(ipsec.Options{}), &cfg, cfg.IPsec.Secret, c.log, nil, nil)
		c.warnIPsec()
		if c.warned(warning.WeakSecret) != short || strings.Contains(log.String(), secret) {
			t.Errorf("%d bytes: %+v, logged %s", len(secret), c.activeWarnings(), log.String())
		}
	}
}
