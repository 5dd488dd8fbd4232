package tunnel

import (
	"errors"
	"time"

	"ipipd/internal/drop"
	"ipipd/internal/netstate"
	"ipipd/keepalive"
)

// A tunnel sends nothing (data, probes, answers, IKE) from an address that is not on this host.
// The address may be on another host, as with a VRRP backup, and the peer could not tell the
// two apart. It sends nothing either while its underlay-device does not exist. control
// stores the result in route.txDrop for the data path.

// txDropFor returns the route.txDrop for an answer. It closes the ipsecPolicy if not even IKE may
// be sent.
func (c *control) txDropFor(a *netstate.Answer) drop.Reason {
	var noDevice *netstate.NoDeviceError
	var noRoute *netstate.NoRouteError
	txDrop, silent := drop.None, true
	switch {
	case !a.HasLocal:
		txDrop = drop.NoLocalAddress
	case errors.As(a.Err, &noDevice):
		txDrop = drop.NoPath
	case errors.As(a.Err, &noRoute): // routes come back soon: the SAs stay
		txDrop, silent = drop.NoPath, false
	}
	if txDrop != drop.None && silent && c.ipsecPolicy != nil {
		c.ipsecPolicy.close()
	}
	return txDrop
}

// localAbsent reports whether the local address is not on this host.
func (t *Tunnel) localAbsent() bool { return t.route.Load().txDrop == drop.NoLocalAddress }

// replaceRoute stores a route. If the local address has appeared or gone, it resets the keepalive.
func (c *control) replaceRoute(next *route, now time.Time) {
	if next.equal(c.route.Load()) {
		return
	}
	before := c.localAbsent()
	c.route.Store(next)
	if c.localAbsent() == before {
		return
	}
	c.resetKeepalive(now)
	c.updateCarrier()
	if !before {
		return
	}
	c.log.Info("local-address is on this host: the tunnel is taken up", "local-address", address(next.path.Local))
	if c.monitor.Tick(now).Probe { // without waiting for the interval
		c.probe()
	}
}

// resetKeepalive restarts the keepalive at now. While the local address is absent it logs that
// and turns the keepalive off.
func (c *control) resetKeepalive(now time.Time) {
	config := c.cfg.Keepalive
	if c.localAbsent() {
		config = keepalive.Config{}
		c.log.Warn("local-address is not on this host: nothing is sent until it is", "local-address", address(c.route.Load().path.Local))
	}
	c.monitor = keepalive.New(config, now)
	c.state.Store(uint32(c.monitor.State()))
}

// waitingFor is Status.WaitingFor.
func (t *Tunnel) waitingFor() string {
	if route := t.route.Load(); route.txDrop == drop.NoLocalAddress {
		return "local-address " + address(route.path.Local).String() + ", which is not on this host"
	}
	return ""
}
