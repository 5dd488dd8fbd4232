package tunnel

import (
	"testing"

	"ipipd/test/memory"
	"ipipd/tun"
)

func TestInterfaceName(t *testing.T) {
	for name, want := range map[string]string{
		"": "", "ipip1": "ipip1", "fifteen-bytes-x": "fifteen-bytes-x",
		"sixteen-bytes-xx": "ipip-dff977091d", "a b": "ipip-c8687a08aa", "é": "ipip-4a99557e40",
	} {
		got := InterfaceName(name)
		if got != want || got != "" && !tun.CheckName(got) {
			t.Errorf("%q: %q, want %q", name, got, want)
		}
	}
}

// A tunnel goes by its Config.Name, whatever its interface is called.
func TestTunnelName_long(t *testing.T) {
	const name, line = "ipip tunnel to Riga", "name=ipip~tunnel~to~Riga remote-address=198.51.100.1"
	socket, _ := memory.NewSocketPair()
	e, m := newModel(t, socket)
	apply(t, e, line)
	a, ifname := e.Tunnel(name), InterfaceName(name)
	device := m.devices[ifname]
	if a == nil || device == nil {
		t.Fatalf("no tunnel, or no interface: %v %v", a, m)
	}
	if s := a.Status(); a.Name() != name || s.Name() != name || s.Interface != ifname || s.RenamedFrom != "" {
		t.Errorf("tunnel %q, status %q %q %q", a.Name(), s.Name(), s.Interface, s.RenamedFrom)
	}
	state, _ := device.State()
	state.Name = "tunx"
	device.SetState(state)
	m.fakeNetwork.set(func(*fakeNetwork) {})
	eventually(t, "print shows the new name", func() bool {
		s := a.Status()
		return s.Name() == "tunx" && s.RenamedFrom == name && s.Interface == "" && a.Name() == "tunx"
	})
	apply(t, e, line+" dscp=46")
	if e.Tunnel(name) != a {
		t.Error("the tunnel was made again")
	}
}
