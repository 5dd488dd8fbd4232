package tunnel

import (
	"bytes"
	"maps"
	"strings"
	"testing"

	"ipipd/internal/capture"
	"ipipd/internal/drop"
	"ipipd/internal/packet"
	"ipipd/test/netlab"
)

// Drop reasons that no packet from outside can provoke at will: each is counted, for print and for the metrics,
// and is the comment of the packet in a capture.
func TestTunnelDrop(t *testing.T) {
	good := outerPacket(t, outerB.As4(), datagram(100, nil))
	changed := func(change func([]byte)) func(*testing.T, *endpoint) {
		return func(t *testing.T, a *endpoint) {
			p := bytes.Clone(good)
			change(p)
			if err := a.socket.Inject(p, packet.Offload{}); err != nil {
				t.Fatal(err)
			}
		}
	}
	sum := func(p []byte) { // sets the header checksum
		p[10], p[11] = 0, 0
		var s uint32
		for i := 0; i < 20; i += 2 {
			s += uint32(p[i])<<8 | uint32(p[i+1])
		}
		s = s&0xffff + s>>16
		s = ^(s&0xffff + s>>16)
		p[10], p[11] = byte(s>>8), byte(s)
	}
	rows := map[string]func(*testing.T, *endpoint){
		"outer-malformed": changed(func(p []byte) { p[0] = 0x44 }),
		"outer-not-ipip":  changed(func(p []byte) { p[9] = 5; sum(p) }),
		"outer-fragment":  changed(func(p []byte) { p[6] = 0x20; sum(p) }),
		"outer-checksum":  changed(func(p []byte) { p[10]++ }),
		"write-failed": func(t *testing.T, a *endpoint) { // more packets than the queue of the device holds
			for range 1100 {
				if err := a.socket.Inject(good, packet.Offload{}); err != nil {
					t.Fatal(err)
				}
			}
		},
		"no-local-address": func(t *testing.T, a *endpoint) { // the packet was read before the address went
			a.network.set(func(w *fakeNetwork) { w.localAbsent = true })
			eventually(t, "the address is missed", func() bool { return a.route.Load().txDrop == drop.NoLocalAddress && !a.device.Running() })
			if err := a.device.SetCarrier(true); err != nil {
				t.Fatal(err)
			}
			if err := a.device.Inject(datagram(100, nil)); err != nil {
				t.Fatal(err)
			}
		},
		"esp-fragment": func(_ *testing.T, a *endpoint) { // as from ipsec.Manager
			p := outerPacket(t, outerB.As4(), make([]byte, 100))
			p[6], p[9] = 0x20, 50
			a.engine.dropPacket(drop.ESPFragment, p)
		},
		"fragment-failed": func(_ *testing.T, a *endpoint) { // as from encryptedTx
			b := packet.New(200)
			b.Set(outerPacket(t, outerA.As4(), datagram(100, nil)))
			a.sent(a.captures.Load(), []*packet.Buffer{b}, 0, 0, drop.FragmentFailed)
		},
	}
	provoked := map[string]bool{}
	for reason, provoke := range rows {
		provoked[reason] = true
		t.Run(reason, func(t *testing.T) {
			a, _ := pair(t, nil)
			of := startCapture(t, a.engine, "", capture.Options{Drops: true}, nil)
			provoke(t, a)
			eventually(t, "it is counted", func() bool { s := a.Status(); return s.Drops[reason]+s.ProcessDrops[reason] > 0 })
			samples := a.engine.Samples()
			var why drop.Reason
			for r := range drop.All() {
				if r.String() == reason {
					why = r
				}
			}
			if samples.Drops[why]+samples.Tunnels[0].Drops[why] == 0 {
				t.Error("the metrics do not have it")
			}
			for _, p := range of.end().Packets {
				if strings.HasSuffix(p.Comment, why.Error()+"; remedy: "+why.Remedy()) {
					return
				}
			}
			t.Error("the capture does not have it")
		})
	}
	if want := netlab.DropsProvoked(netlab.InMemory); !maps.Equal(provoked, want) {
		t.Errorf("provoked are %v, want %v", provoked, want)
	}
}
