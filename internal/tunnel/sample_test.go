package tunnel

import (
	"fmt"
	"net/netip"
	"reflect"
	"testing"
	"time"

	"ipipd/internal/drop"
	"ipipd/keepalive"
	"ipipd/test/memory"
)

// A Sample has the numbers of Status, and those of the keepalive's probes.
func TestSample(t *testing.T) {
	a, b := pair(t, func(c *Config) {
		c.Name, c.Comment = "ipip1", "to the office"
		c.Keepalive = keepalive.Config{Interval: time.Second, Retries: 3}
	})
	a.send(t, b, datagram(100, nil))
	b.send(t, a, datagram(300, nil))
	notIPv4 := datagram(40, nil)
	notIPv4[0] = 6 << 4
	if err := a.device.Inject(notIPv4); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a probe is answered, and what is no IPv4 counted", func() bool {
		s := a.sample()
		return s.ProbesAnswered > 0 && s.Drops[drop.InnerNotIPv4] == 1
	})
	s, status := a.engine.Samples().Tunnels[0], a.Status()
	if s.Name != "ipip1" || s.Interface != "ipip1" || s.Comment != "to the office" || s.LocalAddress != outerA.String() || s.RemoteAddress != outerB.String() {
		t.Errorf("it is about %+v", s)
	}
	if s.RxPackets != 1 || s.RxBytes != 300 || s.TxPackets != 1 || s.TxBytes != 100 || status.RxByte != s.RxBytes || status.TxByte != s.TxBytes {
		t.Errorf("counted %d, %d, %d, %d; print says %+v", s.RxPackets, s.RxBytes, s.TxPackets, s.TxBytes, status.State)
	}
	if !s.Started || !s.Running || s.Disabled || s.FastPath || s.MTU != 1480 || s.Encrypted {
		t.Errorf("its state is %+v", s)
	}
	if s.ProbesSent < s.ProbesAnswered || !s.ProbesHaveAnswers || s.RoundTrip <= 0 || s.RoundTrip > patience {
		t.Errorf("%d probes, %d answers (%v), %v there and back", s.ProbesSent, s.ProbesAnswered, s.ProbesHaveAnswers, s.RoundTrip)
	}
	if s.LastHeard.IsZero() || status.LastHeard.Before(s.LastHeard) {
		t.Errorf("last heard %v, print says %v", s.LastHeard, status.LastHeard)
	}
	if s.StateChanges != 0 {
		t.Errorf("%d changes of a tunnel that runs since its start", s.StateChanges)
	}
	b.Close()
	eventually(t, "the silence has changed the state once", func() bool { s := a.sample(); return !s.Running && s.StateChanges == 1 })
}

// One answer counts for each probe; a packet that no probe has asked for is no answer.
func TestTunnel_noteProbeAnswer(t *testing.T) {
	n := &Tunnel{epoch: time.Now()}
	epoch := n.epoch.Add(time.Second)
	n.noteProbeAnswer(epoch)
	n.noteProbe(keepalive.FormEmpty, epoch)
	n.noteProbeAnswer(epoch)
	n.noteProbe(keepalive.FormReflect, epoch)
	n.noteProbeAnswer(epoch.Add(20 * time.Millisecond))
	n.noteProbeAnswer(epoch.Add(30 * time.Millisecond))
	if p := &n.probes; p.sent.Load() != 2 || p.answered.Load() != 1 || p.roundTrip.Load() != int64(20*time.Millisecond) {
		t.Errorf("%d sent, %d answered, %v there and back", p.sent.Load(), p.answered.Load(), time.Duration(p.roundTrip.Load()))
	}
	if !n.probeAnswered.Load() {
		t.Error("the peer is not known to answer")
	}
}

// The Sample of a tunnel that is not started has its name and addresses, and nothing more.
func TestNewSample(t *testing.T) {
	c := Default()
	c.Name, c.RemoteAddress, c.Comment, c.Disabled = "ipip1", "office.example", "later", true
	if s, want := NewSample(&c), (Sample{Name: "ipip1", Interface: "ipip1", Comment: "later", RemoteAddress: "office.example", Disabled: true}); !reflect.DeepEqual(s, want) {
		t.Errorf("%+v, want %+v", s, want)
	}
	c.LocalAddress = outerA
	if s := NewSample(&c); s.LocalAddress != outerA.String() {
		t.Errorf("local address %q", s.LocalAddress)
	}
}

func TestSamples_process(t *testing.T) {
	a, _ := pair(t, nil)
	a.engine.count(drop.UnknownPeer, 3)
	if s := a.engine.Samples(); s.Drops[drop.UnknownPeer] != 3 || s.Drops[drop.ReceiveOverflow] != a.socket.Overflows() {
		t.Errorf("%v", s.Drops)
	}
}

// BenchmarkSamples is one scrape of the metrics of many tunnels.
func BenchmarkSamples(b *testing.B) {
	a, _ := memory.NewSocketPair()
	e := newEndpoint(b, EngineOptions{}, a, outerA).engine
	var configs []Config
	for i := range 1000 {
		c := Default()
		c.Name, c.LocalAddress, c.Keepalive = fmt.Sprint("ipip", i), outerA, keepalive.Config{}
		c.RemoteAddress = netip.AddrFrom4([4]byte{198, 51, byte(i / 250), byte(1 + i%250)}).String()
		configs = append(configs, c)
	}
	if err := e.Apply(b.Context(), configs); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if s := e.Samples(); len(s.Tunnels) != len(configs) {
			b.Fatalf("%d tunnels", len(s.Tunnels))
		}
	}
}
