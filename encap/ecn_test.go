package encap_test

import (
	"testing"

	"ipipd/encap"
	"ipipd/internal/drop"
	"ipipd/internal/ipv4"
)

// TestDecapsulatedECN has its own copy of the table of RFC 6040, section 4.2, written
// independently of the code's.
func TestDecapsulatedECN(t *testing.T) {
	const dropped = ipv4.ECN(4)
	outers := [4]ipv4.ECN{ipv4.NotECT, ipv4.ECT0, ipv4.ECT1, ipv4.CE}
	for _, row := range []struct {
		inner ipv4.ECN
		want  [4]ipv4.ECN
	}{
		{ipv4.NotECT, [4]ipv4.ECN{ipv4.NotECT, ipv4.NotECT, ipv4.NotECT, dropped}},
		{ipv4.ECT0, [4]ipv4.ECN{ipv4.ECT0, ipv4.ECT0, ipv4.ECT1, ipv4.CE}},
		{ipv4.ECT1, [4]ipv4.ECN{ipv4.ECT1, ipv4.ECT1, ipv4.ECT1, ipv4.CE}},
		{ipv4.CE, [4]ipv4.ECN{ipv4.CE, ipv4.CE, ipv4.CE, ipv4.CE}},
	} {
		for i, outer := range outers {
			want := row.want[i]
			in, out := inner(), received()
			in.TOS = 46<<2 | uint8(row.inner)
			out.TOS = 10<<2 | uint8(outer)
			b, _, d := decapsulate(build(out, build(in, nil)))
			if want == dropped {
				if d != drop.ECNCEOnNotECT {
					t.Errorf("inner %v, outer %v: drop %v, want %v", row.inner, outer, d, drop.ECNCEOnNotECT)
				}
				continue
			}
			if d != drop.None {
				t.Errorf("inner %v, outer %v: drop %v", row.inner, outer, d)
				continue
			}
			p := parse(t, b.Bytes())
			if p.ECN() != want || !p.HeaderChecksumValid() {
				t.Errorf("inner %v, outer %v: %v, checksum valid %v, want %v", row.inner, outer, p.ECN(), p.HeaderChecksumValid(), want)
			}
			if p.DSCP() != 46 {
				t.Errorf("DSCP %d, want the inner one: RFC 2983", p.DSCP())
			}
			if ecn, ok := encap.DecapsulatedECN(row.inner, outer); ecn != want || !ok {
				t.Errorf("DecapsulatedECN(%v, %v) = %v, %v", row.inner, outer, ecn, ok)
			}
		}
	}
	if _, ok := encap.DecapsulatedECN(ipv4.NotECT, ipv4.CE); ok {
		t.Error("DecapsulatedECN lets CE on Not-ECT pass")
	}
}

func TestOuterEncapsulate_ecn(t *testing.T) {
	for _, ecn := range []ipv4.ECN{ipv4.NotECT, ipv4.ECT0, ipv4.ECT1, ipv4.CE} {
		h := inner()
		h.TOS = uint8(ecn)
		outer, d := encapsulate(t, asRouterOS, build(h, nil), 1)
		if d != drop.None || outer.ECN() != ecn {
			t.Errorf("inner %v: outer %v, drop %v", ecn, outer.ECN(), d)
		}
	}
}
