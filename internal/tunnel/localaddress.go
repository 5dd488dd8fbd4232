package tunnel

import (
	"errors"
	"fmt"
	"time"

	"ipipd/internal/drop"
	"ipipd/keepalive"
)

// A tunnel sends nothing (data, probes, answers, IKE) from an address that is not on this host.
// The address may be on another host, as with a VRRP backup, and the peer could not tell the
// two apart. It sends nothing either while its underlay-device does not exist. The supervisor
// finds out both, and stores the result in route.txDrop for the data path.

// errNoUnderlayDevice means that the interface named by underlay-device does not exist.
var errNoUnderlayDevice = errors.New("underlay-device")

// underlayDevice returns the ifindex of the interface that has the configured name now, or 0 if
// none is configured. An interface that is renamed is no longer used.
func (t *Tunnel) underlayDevice() (int, error) {
	name := t.cfg.UnderlayDevice
	if name == "" {
		return 0, nil
	}
	device, err := t.engine.network.DeviceIndex(name)
	if err != nil {
		return 0, fmt.Errorf("%w: %w", errNoUnderlayDevice, err)
	}
	if before := t.underlayIndex; before != 0 && before != device {
		t.log.Info("underlay-device is another interface now", "underlay-device", name, "index", device, "was", before)
	}
	t.underlayIndex = device
	return device, nil
}

// txDropFor returns the route.txDrop for a local address; err is the error of the route look-up.
// Unless it is drop.None, it closes the ipsecPolicy. The caller holds mu, or is Start.
func (t *Tunnel) txDropFor(local [4]byte, err error) drop.Reason {
	txDrop := drop.None
	if errors.Is(err, errNoUnderlayDevice) {
		txDrop = drop.NoPath
	}
	// On error the kernel decides for each packet.
	if has, err := t.engine.network.AddressIsLocal(address(local)); err == nil && !has {
		txDrop = drop.NoLocalAddress
	}
	if txDrop != drop.None && t.ipsecPolicy != nil {
		t.ipsecPolicy.close()
	}
	return txDrop
}

// localAbsent reports whether the local address is not on this host.
func (t *Tunnel) localAbsent() bool { return t.route.Load().txDrop == drop.NoLocalAddress }

// replaceRoute stores a route. If the local address has appeared or gone, it resets the keepalive.
// The caller is the supervisor, and holds mu.
func (t *Tunnel) replaceRoute(next *route, now time.Time) {
	before := t.localAbsent()
	t.route.Store(next)
	if t.localAbsent() == before {
		return
	}
	t.resetKeepalive(now)
	t.updateCarrier()
	if !before {
		return
	}
	t.log.Info("local-address is on this host: the tunnel is taken up", "local-address", address(next.path.Local))
	if t.monitor.Tick(now).Probe { // without waiting for the interval
		t.probe()
	}
}

// resetKeepalive restarts the keepalive at now. While the local address is absent it logs that
// and turns the keepalive off. The caller holds mu, or is Start.
func (t *Tunnel) resetKeepalive(now time.Time) {
	config := t.cfg.Keepalive
	if t.localAbsent() {
		config = keepalive.Config{}
		t.log.Warn("local-address is not on this host: nothing is sent until it is", "local-address", address(t.route.Load().path.Local))
	}
	t.monitor = keepalive.New(config, now)
	t.state.Store(uint32(t.monitor.State()))
}

// waitingFor is Status.WaitingFor.
func (t *Tunnel) waitingFor() string {
	if route := t.route.Load(); route.txDrop == drop.NoLocalAddress {
		return "local-address " + address(route.path.Local).String() + ", which is not on this host"
	}
	return ""
}
