package tunnel

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"ipipd/internal/drop"
	"ipipd/internal/netstate"
	"ipipd/internal/warning"
	"ipipd/keepalive"
)

// What a tunnel needs of the host's network may come later and go: its underlay-device, its local address,
// the address of its remote's name, a route. control stores why nothing can be sent (data, probes,
// answers, IKE) in route.txDrop, for the data path, and in words in route.waiting.
//
// A local address that is not on this host may be on another, as with a VRRP backup, and the peer could not
// tell the two apart: without it a tunnel is suspended. Until there has been a path it is, too. When a
// path goes later the keepalive decides: routes come back soon.

// unresolvedError means that the remote's name has no address yet.
type unresolvedError struct {
	name string
	err  error // of the last look-up; nil if there was none yet
}

func (e *unresolvedError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("remote-address %q is being resolved", e.name)
	}
	return NotResolved(e.name, e.err).Error()
}

// pathError returns why, by an answer, there is no path to remote; nil if there is one.
func (c *control) pathError(a *netstate.Answer, remote netip.Addr) error {
	if c.many != nil {
		if errors.As(a.Err, new(*netstate.NoDeviceError)) {
			return a.Err
		}
		return nil // the kernel routes each packet
	}
	switch {
	case !remote.IsValid():
		return &unresolvedError{c.cfg.RemoteAddress, c.lookupErr}
	case a.Err != nil:
		return a.Err
	case c.started: // a loop, or a remote that has become local, shows in the packets
		return nil
	}
	return c.remoteError(a, remote)
}

// remoteError returns why a remote with a route cannot be used, as it is this host or the route a loop; nil if it can.
func (c *control) remoteError(a *netstate.Answer, remote netip.Addr) error {
	if a.Route.Local {
		return RemoteIsLocal(remote)
	}
	if f := RouteLoop(a, remote, c.intoItself(&a.Route)); f != nil {
		return f
	}
	return nil
}

// isTransient reports whether a pathError is about something that the network lacks now, for which a tunnel waits,
// and not about a wrong configuration.
func isTransient(err error) bool {
	return !errors.Is(err, netstate.ErrNotUnicast) &&
		(errors.As(err, new(*unresolvedError)) || errors.As(err, new(*netstate.NoDeviceError)) || errors.As(err, new(*netstate.NoRouteError)))
}

// waitingText formats a pathError for Status.WaitingFor.
func waitingText(err error) string {
	var unresolved *unresolvedError
	var noDevice *netstate.NoDeviceError
	var noRoute *netstate.NoRouteError
	switch {
	case errors.As(err, &unresolved):
		var dns *net.DNSError
		switch text := "DNS name " + unresolved.name; {
		case unresolved.err == nil:
			return text
		case errors.As(unresolved.err, &dns):
			return text + ": " + dns.Err
		default:
			return text + ": " + unresolved.err.Error()
		}
	case errors.As(err, &noDevice):
		return "underlay-device " + noDevice.Name
	case errors.As(err, &noRoute):
		return "route to " + noRoute.Destination.String()
	}
	return err.Error()
}

// setWaiting sets suspended, txDrop and waiting of next, a route that is not stored yet, and closes the ipsecPolicy
// if not even IKE may be sent. noPath is the pathError.
func (c *control) setWaiting(next *route, noPath error) {
	a := c.answer
	noDevice := errors.As(noPath, new(*netstate.NoDeviceError))
	next.suspended = c.pair == 0 || !a.HasLocal || noPath != nil && !c.started
	c.started = !next.suspended
	next.txDrop, next.waiting = drop.None, ""
	switch {
	case next.receiveOnly:
		next.txDrop = drop.NoLocalAddress
	case !a.HasLocal:
		next.txDrop = drop.NoLocalAddress
	case next.suspended || noDevice || errors.As(noPath, new(*netstate.NoRouteError)):
		next.txDrop = drop.NoPath
	} // else the kernel decides for each packet
	if next.txDrop != drop.None {
		next.path.Link = nil
	}
	switch {
	case !a.HasLocal && !noDevice:
		next.waiting = fmt.Sprintf("local-address %v, which is not on this host", address(next.path.Local))
	case noPath != nil:
		next.waiting = waitingText(noPath)
	}
	if (next.suspended || noDevice) && c.ipsecPolicy != nil {
		c.ipsecPolicy.close()
	}
}

// suspended reports whether the tunnel is taken for down: without carrier, and without keepalive.
func (t *Tunnel) suspended() bool {
	route := t.route.Load()
	return route == nil || route.suspended
}

// replaceRoute stores a route. If the tunnel is no longer suspended, or now is, it resets the keepalive.
func (c *control) replaceRoute(next *route, now time.Time) {
	old := c.route.Load()
	if next.equal(old) {
		return
	}
	c.route.Store(next)
	c.forget(&c.looped, warning.RouteLoop)
	if next.suspended == old.suspended {
		return
	}
	c.resetKeepalive(now)
	c.updateCarrier()
	if next.suspended {
		return
	}
	c.log.Info("the tunnel is taken up", "local-address", addressText(next.path.Local), "remote-address", addressText(next.path.Remote))
	c.restoreDue = true // routes
	c.wakeControl()
	if c.monitor.Tick(now) { // without waiting for the interval
		c.probe()
	}
}

// resetKeepalive restarts the keepalive at now. It is off while the tunnel is suspended.
func (c *control) resetKeepalive(now time.Time) {
	config := c.cfg.keepalive()
	if c.suspended() {
		config = keepalive.Config{}
	}
	c.monitor = keepalive.New(config, now)
	c.peerAnswers.resetCounts()
	c.state.Store(uint32(c.monitor.State()))
}

// setNoPath stores a pathError, nil for none, and warns of it.
func (c *control) setNoPath(err error) {
	if err == nil && c.noPath != nil && !c.suspended() { // else replaceRoute logs it
		c.log.Info("there is a way to the remote again")
	}
	c.noPath = err
	c.warnPath(err)
}

// wantedRoutes returns the ones of routes that may lead into the tunnel now.
func (c *control) wantedRoutes(routes []netstate.InterfaceRoute) []netstate.InterfaceRoute {
	switch {
	case c.held:
		return without(routes, without(routes, c.heldRoutes))
	case c.noPath == nil || !c.suspended():
		return routes
	}
	return routesWithoutPath(routes, c.remote)
}

// routesWithoutPath returns the ones of routes that a tunnel without a path may have. One that covers the remote, or
// the name server of its name, would keep the tunnel from ever getting a path.
func routesWithoutPath(routes []netstate.InterfaceRoute, remote netip.Addr) []netstate.InterfaceRoute {
	return slices.DeleteFunc(slices.Clone(routes), func(r netstate.InterfaceRoute) bool {
		return !remote.IsValid() || r.Prefix.Contains(remote)
	})
}

// waitingFor is Status.WaitingFor.
func (t *Tunnel) waitingFor() string {
	if missing := t.missing.Load(); missing != nil {
		return *missing
	}
	return t.route.Load().waiting
}
