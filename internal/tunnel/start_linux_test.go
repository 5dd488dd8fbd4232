package tunnel

import (
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"ipipd/internal/ipsec/ike"
	"ipipd/internal/netstate"
	"ipipd/keepalive"
	"ipipd/test/memory"
	"ipipd/test/netlab"
	"ipipd/tun"
)

// The first SA changes the overhead. If it is established while the tunnel starts, the interface's
// MTU must be corrected.
func TestEngineStart_ipsecMTU(t *testing.T) {
	a, b := netlab.New(t), netlab.New(t)
	const localAddress, remoteAddress = "192.0.2.1", "192.0.2.2"
	netlab.Veth(t, a, b, netlab.End{Name: "veth0", Address: localAddress + "/24"}, netlab.End{Name: "veth0", Address: remoteAddress + "/24"})
	file := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(file, []byte("secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	netlab.Up(t, b, "t0", "--local-address", remoteAddress, "--remote-address", localAddress, "--ipsec-secret-file", file, "--ipsec-exchange", "ike2")

	w := &fakeNetwork{route: netstate.Route{Source: netip.MustParseAddr(localAddress).As4(), MTU: 1500}}
	socket, _ := memory.NewSocketPair()
	var device *memory.Device
	made := 0
	var c *control
	h, err := NewEngine(EngineOptions{Socket: socket, Network: w, OpenDevice: func(o tun.Options) (tun.Device, error) {
		made = o.MTU
		device = memory.NewDevice(o.Name, o.MTU)
		return &hookedDevice{device, sync.OnceFunc(func() {
			netlab.Eventually(t, "there is an SA", func() bool { return c.ipsecPolicy.established() })
		}), func() {}}, nil
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
	cfg.Name, cfg.RemoteAddress, cfg.Keepalive = "t0", remoteAddress, keepalive.Config{}
	cfg.IPsec.SecretFile, cfg.IPsec.Exchange = file, ike.IKE2
	secret, err := cfg.IPsec.secret()
	if err != nil {
		t.Fatal(err)
	}
	a.Do(func() { // the sockets of IKE are opened there
		c = h.newControl(&cfg, secret)
		err = h.start(c)
	})
	if err != nil {
		t.Fatal(err)
	}
	tunnel := c.Tunnel
	want := tunnel.ipsecPolicy.maxInner(1500)
	if made >= want {
		t.Fatalf("made with an MTU of %d, and the SA leaves %d: nothing has changed meanwhile", made, want)
	}
	eventually(t, "the interface has the MTU that the SA leaves", func() bool {
		has, err := device.State()
		return err == nil && has.MTU == want && tunnel.Status().ActualMTU == want
	})
}
