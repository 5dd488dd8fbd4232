package tunnel

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ipipd/encap"
	"ipipd/internal/ipsec"
	"ipipd/internal/ipsec/esp"
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
)

// Without a session nothing is sent and no cleartext accepted, and both are counted.
func TestIPsecPolicy_noSession(t *testing.T) {
	c := Default()
	c.IPsec.Secret = []byte("secret")
	g, err := newIPsecPolicy(ipsec.NewManager(ipsec.Options{}), &c, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	b := packet.New(100)
	for range 2 {
		if d := g.Seal(b); d != esp.DropNoSA {
			t.Errorf("Seal: %v", d)
		}
	}
	g.countCleartext()
	if g.established() || g.quotesSA(&encap.OuterError{Protocol: ipv4.ProtocolESP}) {
		t.Error("it is open")
	}
	drops := map[string]uint64{}
	g.addTo(drops)
	if d := cmp.Diff(map[string]uint64{"esp-no-sa": 2, "esp-plain-text": 1}, drops); d != "" {
		t.Error(d)
	}
}

func TestNewIPsecPolicy_shortSecret(t *testing.T) {
	for secret, warnings := range map[string]int{strings.Repeat("s", ipsec.WeakSecret-1): 1, strings.Repeat("s", ipsec.WeakSecret): 0} {
		c := Default()
		c.IPsec.Secret = []byte(secret)
		var log bytes.Buffer
		if _, err := newIPsecPolicy(ipsec.NewManager(ipsec.Options{}), &c, slog.New(slog.NewTextHandler(&log, nil)), nil); err != nil {
			t.Fatal(err)
		}
		if strings.Count(log.String(), "the secret is short") != warnings || strings.Contains(log.String(), secret) {
			t.Errorf("%d bytes: %s", len(secret), log.String())
		}
	}
}
