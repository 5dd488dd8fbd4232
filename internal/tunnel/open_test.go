package tunnel

import (
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"ipipd/internal/drop"
	"ipipd/internal/netstate"
	"ipipd/internal/packet"
	"ipipd/test/memory"
)

// Confine is called once, when the interfaces of the first Apply are made, and before a packet is read.
func TestEngineOptions_Confine(t *testing.T) {
	socket, _ := memory.NewSocketPair()
	m := &hostModel{
		fakeNetwork: &fakeNetwork{route: netstate.Route{Source: outerA.As4(), MTU: 1500}},
		resolved:    map[string]netip.Addr{}, addresses: map[configuredAddress]bool{}, routes: map[netstate.InterfaceRoute]int{}, rps: map[string]string{}, devices: map[string]*memory.Device{},
	}
	stray := []byte{0x45, 0, 0, 40, 0, 0, 0, 0, 64, 4, 0, 0, 203, 0, 113, 9, 192, 0, 2, 1, 0x45, 0, 0, 20, 0, 0, 0, 0, 64, 59, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2}
	calls := 0
	e, err := NewEngine(EngineOptions{
		Log: slog.New(slog.NewTextHandler(m.fakeNetwork, nil)), Socket: socket, Network: m, OpenDevice: m.open,
		LookupName: m.lookUp,
		Confine: func(fastPath bool) bool {
			calls++
			if n := len(m.devices); n != 2 || fastPath {
				t.Errorf("%d interfaces, fast path %v", n, fastPath)
			}
			if socket.ReceiveWithin(10*time.Second) == nil {
				t.Error("a packet has been read before")
			}
			return false
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	if err := socket.Inject(stray, packet.Offload{}); err != nil {
		t.Fatal(err)
	}
	apply(t, e, lineA, lineB)
	apply(t, e, lineA)
	if calls != 1 {
		t.Errorf("called %d times", calls)
	}
	if err := socket.Inject(stray, packet.Offload{}); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(time.Minute); e.Samples().Drops == (drop.Counts{}); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("no packet is read afterwards")
		}
	}
}
