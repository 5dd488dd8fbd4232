package esp

import (
	"bytes"
	"testing"

	"ipipd/internal/drop"
	"ipipd/internal/packet"
)

func FuzzInboundOpen(f *testing.F) {
	o, _ := pair(f, Config{Suite: suites[0]})
	f.Add(sealed(f, o, datagram(60)).Bytes(), byte(0))
	g, _ := pair(f, Config{Suite: suites[6], SourcePort: 4500, DestinationPort: 4500})
	f.Add(sealed(f, g, datagram(0)).Bytes(), byte(6))
	f.Add([]byte{0x45}, byte(9))
	f.Fuzz(func(t *testing.T, p []byte, which byte) {
		if len(p) > 3000 {
			return
		}
		_, i := pair(t, Config{Suite: suites[int(which)%len(suites)], ESN: which&0x80 != 0})
		b := packet.New(3000)
		b.Set(p)
		if len(p) > 9 && p[9] == 17 && stripUDP(b) != drop.None {
			return
		}
		d := i.Open(b)
		SPI(b)
		ClassifyUDP(p)
		if d == drop.None {
			if _, d := checkIPv4(b.Bytes()); d != drop.None {
				t.Fatalf("opened to %v: %x", d, b.Bytes())
			}
		}
	})
}

func FuzzOutboundSeal(f *testing.F) {
	f.Add(datagram(33), byte(3))
	f.Fuzz(func(t *testing.T, p []byte, which byte) {
		if len(p) > 3000 {
			return
		}
		o, i := pair(t, Config{Suite: suites[int(which)%len(suites)], ESN: which&0x80 != 0})
		b := packet.New(3000)
		b.Set(p)
		if d := o.Seal(b); d != drop.None {
			return
		}
		if d := i.Open(b); d != drop.None {
			t.Fatalf("own packet: %v", d)
		}
		want := bytes.Clone(p)
		finishIPv4(want, int(p[0]&15)*4, 4)
		if !bytes.Equal(b.Bytes(), want) {
			t.Fatalf("got %x want %x", b.Bytes(), want)
		}
	})
}
