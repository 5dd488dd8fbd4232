package esp

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"ipipd/internal/drop"
	"ipipd/internal/packet"
)

// 1438 and 1422 are RouterOS's numbers. For every suite a packet of MaxInner fits the MTU,
// and one byte more does not.
func TestSuiteMaxInner(t *testing.T) {
	cbc := Suite{AESCBC, 128, HMACSHA1}
	if got := cbc.MaxInner(1500, false); got != 1438 {
		t.Errorf("AES-CBC/SHA1 over 1500: %d, want 1438", got)
	}
	if got := cbc.MaxInner(1500, true); got != 1422 {
		t.Errorf("the same with NAT-T: %d, want 1422", got)
	}
	for _, s := range suites {
		for _, udp := range []bool{false, true} {
			for mtu := 100; mtu < 1600; mtu++ {
				c := Config{Suite: s}
				if udp {
					c.SourcePort, c.DestinationPort = 1, 2
				}
				if mtu > 100 && mtu < 1480 && mtu%97 != 0 {
					continue
				}
				o, _ := pair(t, c)
				n := s.MaxInner(mtu, udp)
				if got := sealed(t, o, datagram(n)).Len(); got > mtu {
					t.Errorf("%v: %d inner bytes become %d, over %d", s, n, got, mtu)
				}
				if got := sealed(t, o, datagram(n+1)).Len(); got <= mtu {
					t.Errorf("%v: %d inner bytes would have fitted into %d", s, n+1, mtu)
				}
			}
		}
	}
}

func TestKeys_notPrinted(t *testing.T) {
	k := Keys{[]byte("secretsecret"), []byte("SECRETSECRET")}
	var log bytes.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "keys", k, "config", Config{Keys: k})
	j, _ := json.Marshal(Config{Keys: k})
	all := fmt.Sprintf("%v %+v %#v %s %x %q %d", k, k, k, k, k, k, k) + fmt.Sprintf("%v %+v %#v", Config{Keys: k}, &Config{Keys: k}, Config{Keys: k}) + log.String() + string(j)
	for _, s := range []string{"secret", "SECRET", hex.EncodeToString([]byte("secret")), "115 101", "0x73"} {
		if strings.Contains(all, s) {
			t.Errorf("%q in %s", s, all)
		}
	}
}

func BenchmarkSuite(b *testing.B) {
	for _, s := range []Suite{suites[0], suites[3], suites[6], suites[8]} {
		o, i := pair(b, Config{Suite: s, ESN: true})
		p := datagram(1400)
		buf := packet.New(2000)
		b.Run(strings.ReplaceAll(s.String(), "/", "-")+"/seal", func(b *testing.B) {
			b.SetBytes(1400)
			for b.Loop() {
				buf.Set(p)
				o.Seal(buf)
			}
		})
		b.Run(strings.ReplaceAll(s.String(), "/", "-")+"/open", func(b *testing.B) {
			b.SetBytes(1400)
			buf.Set(p)
			o.Seal(buf)
			q := bytes.Clone(buf.Bytes())
			for b.Loop() {
				buf.Set(q)
				i.window.top.Store(0)
				for n := range i.window.slots {
					i.window.slots[n].Store(0)
				}
				if i.Open(buf) != drop.None {
					b.Fatal("lost")
				}
			}
		})
	}
}
