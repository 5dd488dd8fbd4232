package tunnel

import (
	"errors"
	"fmt"
	"time"

	"ipipd/encap"
	"ipipd/keepalive"
)

// A tunnel sends nothing from an address that this host does not have, as the kernel
// does not: neither data nor probes, answers or IKE. The address may be on another
// host, as that of a VRRP backup is, whose tunnel is ready before it comes; to the
// peer both would be the same end. Nor does anything leave where the operator named an
// underlay-device that is not there. Both are found out when something changes, and
// kept in the route, which the data path reads.

// errNoDevice is about an underlay-device that is not there.
var errNoDevice = errors.New("underlay-device")

// underlayDevice is the index of the interface that now has the name which the operator
// gave, 0 if none was given: the name is followed, not the interface.
func (t *Tunnel) underlayDevice() (int, error) {
	name := t.cfg.UnderlayDevice
	if name == "" {
		return 0, nil
	}
	device, err := t.host.network.DeviceIndex(name)
	if err != nil {
		return 0, fmt.Errorf("%w: %w", errNoDevice, err)
	}
	if before := t.named; before != 0 && before != device {
		t.log.Info("underlay-device is another interface now", "underlay-device", name, "index", device, "was", before)
	}
	t.named = device
	return device, nil
}

// refusal is why nothing must be sent from that address; DropNone if it may. err is
// what the look-up of the route failed with. The caller holds mu, or is alone.
func (t *Tunnel) refusal(local [4]byte, err error) encap.Drop {
	refuse := encap.DropNone
	if errors.Is(err, errNoDevice) {
		refuse = encap.DropNoPath
	}
	// Where the kernel does not say, it is left to decide about each packet.
	if has, err := t.host.network.AddressIsLocal(address(local)); err == nil && !has {
		refuse = encap.DropNoLocalAddress
	}
	if refuse != encap.DropNone && t.ipsecPolicy != nil {
		t.ipsecPolicy.close()
	}
	return refuse
}

// absent reports whether the local address is not on this host.
func (t *Tunnel) absent() bool { return t.route.Load().refuse == encap.DropNoLocalAddress }

// replaceRoute puts another route to use. The keepalive begins anew with an address
// that has come. The caller is the supervisor, and holds mu.
func (t *Tunnel) replaceRoute(next *route, now time.Time) {
	before := t.absent()
	t.route.Store(next)
	if t.absent() == before {
		return
	}
	t.followLocal(now)
	t.followCarrier()
	if !before {
		return
	}
	t.log.Info("local-address is on this host: the tunnel is taken up", "local-address", address(next.path.Local))
	if t.monitor.Tick(now).Probe { // the peer is to know at once
		t.probe()
	}
}

// followLocal begins the keepalive at now, or, while the local address is absent, says
// so and lets it rest: nobody is to answer then. The caller holds mu, or is alone.
func (t *Tunnel) followLocal(now time.Time) {
	config := t.cfg.Keepalive
	if t.absent() {
		config = keepalive.Config{}
		t.log.Warn("local-address is not on this host: nothing is sent until it is", "local-address", address(t.route.Load().path.Local))
	}
	t.monitor = keepalive.New(config, now)
	t.state.Store(uint32(t.monitor.State()))
}

// waitingFor is what print shows that the tunnel waits for; "" if for nothing here.
func (t *Tunnel) waitingFor() string {
	if route := t.route.Load(); route.refuse == encap.DropNoLocalAddress {
		return "local-address " + address(route.path.Local).String() + ", which is not on this host"
	}
	return ""
}
