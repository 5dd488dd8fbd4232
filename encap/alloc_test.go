package encap_test

import (
	"testing"

	"ipipd/encap"
	"ipipd/internal/drop"
	"ipipd/internal/ipv4"
)

// No function of the data path allocates, and neither does a Drop as an error.
func TestOuterEncapsulate_andOthersDoNotAllocate(t *testing.T) {
	p := segment(ipv4.ProtocolTCP, 1400, true)
	whole := build(received(), p)
	long := parse(t, build(received(), pattern(8000)))
	probe := build(received(), golden(t, goldenReflect))
	message := golden(t, goldenOuterError)
	b, big := bufferOf(whole), dirty(2000)
	into := buffers(8, 1500)
	for name, f := range map[string]func() drop.Reason{
		"Encapsulate": func() drop.Reason {
			b.Set(p)
			inner, _ := ipv4.Parse(b.Bytes())
			return asRouterOS.Encapsulate(b, inner, 1)
		},
		"Decapsulate": func() drop.Reason {
			b.Set(whole)
			outer, d := encap.ParseOuter(b)
			if d == drop.None {
				var inner ipv4.Packet
				if inner, _, d = encap.Decapsulate(b, outer, local, remote); d == drop.None {
					d = encap.DeriveOffload(b, inner, 1480)
				}
			}
			return d
		},
		"ReflectAnswer": func() drop.Reason {
			b.Set(probe)
			outer, _ := encap.ParseOuter(b)
			_, _, d := encap.Decapsulate(b, outer, local, remote)
			if d == drop.None {
				d = encap.ReflectAnswer(b, local, remote)
			}
			return d
		},
		"EncapsulateProbe": func() drop.Reason {
			b.Space()
			return asRouterOS.EncapsulateProbe(b, 1)
		},
		"Fragment": func() drop.Reason {
			_, d := encap.Fragment(into, long, 1500)
			return d
		},
		"TooBig": func() drop.Reason { return encap.TooBig(big, long, 1480, [4]byte{}) },
		"ParseError": func() drop.Reason {
			_, d := encap.ParseError(message)
			return d
		},
	} {
		if d := f(); d != drop.None {
			t.Errorf("%s: drop %v", name, d)
		}
		if n := testing.AllocsPerRun(100, func() { f() }); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}

	var sink error
	if n := testing.AllocsPerRun(100, func() { sink = drop.Loop }); n != 0 || sink == nil {
		t.Errorf("a Drop as an error: %v allocations", n)
	}
}
