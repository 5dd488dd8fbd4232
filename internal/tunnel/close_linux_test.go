package tunnel

import (
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"ipipd/internal/netstate"
	"ipipd/internal/underlay"
	"ipipd/internal/warning"
	"ipipd/test/netlab"
	"ipipd/tun"
)

// descriptors counts this process's open files.
func descriptors(t *testing.T) int {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(files)
}

// removalNetwork is hostNetwork, and keeps the error of Remove.
type removalNetwork struct {
	hostNetwork
	removed error
}

func (n *removalNetwork) Remove(devices []int) error {
	n.removed = n.hostNetwork.Remove(devices)
	return n.removed
}

// Tunnels that are closed together leave no interface and no descriptor, and none of them reports
// that its interface is gone. One was moved to another network namespace, and one the operator has
// removed, so that it was made again.
func TestEngineClose_interfaces(t *testing.T) {
	ns, elsewhere := netlab.New(t), netlab.New(t)
	ns.Run("ip", "link", "set", "lo", "up")
	ns.Run("ip", "link", "add", "veth0", "type", "veth", "peer", "name", "veth1")
	ns.Run("ip", "address", "add", "192.0.2.1/24", "dev", "veth0")
	ns.Run("ip", "link", "set", "veth0", "up")
	ns.Run("ip", "link", "set", "veth1", "up")
	before := descriptors(t)
	var e *Engine
	var log netlab.Buffer
	network := new(removalNetwork)
	ns.Do(func() {
		socket, err := underlay.OpenSocket(underlay.SocketOptions{})
		if err != nil {
			t.Fatal(err)
		}
		host, err := netstate.Open(netstate.Options{})
		if err != nil {
			t.Fatal(err)
		}
		network.hostNetwork = hostNetwork{host}
		if e, err = NewEngine(EngineOptions{Log: slog.New(slog.NewTextHandler(&log, nil)), Socket: socketIn{socket.(underlay.ReceiveSetter), ns}, Network: network,
			OpenDevice: func(o tun.Options) (d tun.Device, err error) {
				ns.Do(func() { d, err = tun.Open(o) })
				return d, err
			}}); err != nil {
			t.Fatal(err)
		}
	})
	var tunnels []*Tunnel
	for i := range 5 {
		cfg := Default()
		cfg.Name, cfg.RemoteAddress, cfg.TunQueues = fmt.Sprintf("t%d", i), fmt.Sprintf("192.0.2.%d", 10+i), 1
		cfg.Addresses = []netstate.InterfaceAddress{{Prefix: netip.MustParsePrefix(fmt.Sprintf("10.0.%d.1/30", i))}}
		ns.Do(func() {
			tunnel, err := e.Start(t.Context(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			tunnels = append(tunnels, tunnel)
		})
	}
	ns.Run("ip", "link", "set", "t3", "netns", elsewhere.Path())
	ns.Run("ip", "link", "del", "t4")
	netlab.Eventually(t, "t4 is made again", func() bool {
		_, err := ns.Try("ip", "link", "show", "t4")
		return err == nil && tunnels[4].Status().WaitingFor == ""
	})
	if err := e.Close(); err != nil {
		t.Error(err)
	}
	for _, tunnel := range tunnels {
		<-tunnel.Done()
		if err := tunnel.Err(); err != nil {
			t.Errorf("%s: %v", tunnel.Name(), err)
		}
		if tunnel.warned(warning.InterfaceGone) || tunnel.warned(warning.InterfaceNotMade) {
			t.Errorf("%s reports that its interface is gone: %+v", tunnel.Name(), tunnel.Status().Warnings)
		}
	}
	if err := network.removed; err != nil || strings.Contains(log.String(), "level=ERROR") {
		t.Errorf("closing should not be a failure: %v\n%s", err, log.String())
	}
	for _, in := range []*netlab.NS{ns, elsewhere} {
		if out := in.Run("ip", "-o", "link"); slices.ContainsFunc(tunnels, func(tunnel *Tunnel) bool { return strings.Contains(out, tunnel.Name()+":") }) {
			t.Errorf("interfaces are left:\n%s", out)
		}
	}
	if after := descriptors(t); after != before {
		t.Errorf("%d descriptors were open, %d are", before, after)
	}
}
