package tunnel

import (
	"net"
	"net/netip"
	"testing"

	"ipipd/internal/netstate"
	"ipipd/internal/underlay"
	"ipipd/keepalive"
	"ipipd/test/netlab"
	"ipipd/tun"
)

// socketIn is a Socket whose SetReceive runs in ns.
type socketIn struct {
	underlay.ReceiveSetter
	ns *netlab.NS
}

func (s socketIn) SetReceive(r underlay.Reception) (err error) {
	s.ns.Do(func() { err = s.ReceiveSetter.SetReceive(r) })
	return err
}

// kernelTunnel starts a tunnel in ns with the kernel's TUN device and sockets.
func kernelTunnel(t *testing.T, ns *netlab.NS, local, remote, inner string) *Tunnel {
	t.Helper()
	var socket underlay.Socket
	var err error
	ns.Do(func() { socket, err = underlay.OpenSocket(underlay.SocketOptions{}) })
	if err != nil {
		t.Skipf("needs root: %v", err)
	}
	w := &fakeNetwork{route: netstate.Route{Source: netip.MustParseAddr(local).As4(), MTU: 1500}}
	h, err := NewEngine(EngineOptions{Socket: socketIn{socket.(underlay.ReceiveSetter), ns}, Network: w, OpenDevice: func(o tun.Options) (d tun.Device, err error) {
		ns.Do(func() { d, err = tun.Open(o) })
		return d, err
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	cfg := Default()
	cfg.Name, cfg.RemoteAddress, cfg.TunQueues, cfg.Keepalive = "t0", remote, 1, keepalive.Config{}
	tunnel, err := h.Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	ns.Run("ip", "address", "add", inner, "dev", tunnel.Name())
	ns.Run("ip", "link", "set", "up", "dev", tunnel.Name())
	return tunnel
}

// With occasional pings one thread serves both directions; in a flood each direction has its own. The tunnel
// is closed while out is parked.
func TestHandoff_pingAndFlood(t *testing.T) {
	a, b := netlab.New(t), netlab.New(t)
	netlab.Veth(t, a, b, netlab.End{Name: "veth0", Address: "192.0.2.1/24"}, netlab.End{Name: "veth0", Address: "192.0.2.2/24"})
	ta, tb := kernelTunnel(t, a, "192.0.2.1", "192.0.2.2", "10.0.0.1/24"), kernelTunnel(t, b, "192.0.2.2", "192.0.2.1", "10.0.0.2/24")
	parked := func(t *Tunnel) bool { return t.engine.workers[0].parked.Load() }
	idle := func() bool {
		_, err := a.Try("ping", "-c", "3", "-i", "0.01", "-W", "5", "10.0.0.2") // the flood may have filled the queue
		return err == nil && parked(ta) && parked(tb)
	}
	eventually(t, "one thread has both directions", idle)

	var conn net.Conn
	var err error
	a.Do(func() { conn, err = net.Dial("udp4", "10.0.0.2:9") })
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	eventually(t, "each direction has its own", func() bool {
		for range 2000 {
			_, _ = conn.Write(make([]byte, 64)) // ECONNREFUSED: nothing listens there
		}
		return !parked(ta) && !parked(tb)
	})
	eventually(t, "one has both again", idle)
}
