package tunnel

import (
	"bytes"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"time"

	"ipipd/internal/ipsec/ike"
	"ipipd/internal/netstate"
	"ipipd/internal/underlay"
	"ipipd/internal/warning"
)

// change is a change of one tunnel's Config. control prepares it, adding what can be removed again, and
// then undoes it, or commits and finishes it: see plan.apply.
type change struct {
	tunnel    *Tunnel
	old, next *Config    // next is nil if the tunnel ends for good
	secret    ike.Secret // of next
	// remote is next.RemoteAddress, the zero Addr if that is not resolved yet; if held, it is the present remote.
	remote netip.Addr
	held   bool      // see releaseRemote
	reset  bool      // remote takes the place of the present one
	pair   outerPair // the outer addresses with remote, 0 if they are not known
	// takeOver are routes of next that lead into another tunnel until the change is committed.
	takeOver []netstate.InterfaceRoute

	queried        bool // the follower has the query of next
	addedAddresses []netstate.InterfaceAddress
	addedRoutes    []netstate.InterfaceRoute
}

// Changes returns the properties in which two Configs differ, the content of secrets aside.
func Changes(a, b *Config) (changed []Property) {
	for _, p := range Properties() {
		if p.Get(a) != p.Get(b) {
			changed = append(changed, p)
		}
	}
	return changed
}

// remade returns the properties for which a tunnel cannot be changed in place from old to next: see
// Property.Remade.
func remade(old, next *Config) (by []Property) {
	secret := old.IPsec.Wanted() != next.IPsec.Wanted()
	for _, p := range Changes(old, next) {
		switch p.Remade {
		case "":
			continue
		case remadeSecret:
			if !secret {
				continue
			}
		case remadeMany:
			if old.many() == next.many() {
				continue
			}
		}
		by = append(by, p)
	}
	return by
}

// without returns the elements of a that are not in b: a itself if b is empty.
func without[T comparable](a, b []T) []T {
	if len(b) == 0 {
		return a
	}
	other := make(map[T]bool, len(b)) // of peers there may be thousands
	for _, x := range b {
		other[x] = true
	}
	return slices.DeleteFunc(slices.Clone(a), func(x T) bool { return other[x] })
}

func (ch *change) removedRoutes() []netstate.InterfaceRoute {
	if ch.next == nil {
		return ch.old.Routes
	}
	return without(ch.old.Routes, ch.next.Routes)
}

// rerouted reports whether outer packets may leave another way, whatever the remote is.
func (ch *change) rerouted() bool {
	a, b := ch.old, ch.next
	return a.LocalAddress != b.LocalAddress || a.UnderlayDevice != b.UnderlayDevice || a.FwMark != b.FwMark
}

// readdressed reports whether the tunnel needs another answer of the network.
func (ch *change) readdressed() bool { return ch.reset || ch.rerouted() }

// findRemote sets remote, held and reset of ch.
func (c *control) findRemote(ch *change) {
	remote, named := ch.next.remote()
	pending := c.held || ch.next.RemoteAddress != ch.old.RemoteAddress
	ch.held = pending && named && !c.suspended() && !ch.rerouted() && !c.ipsecPolicy.changes(ch.old, ch.next, ch.secret)
	ch.reset = pending && !ch.held
	if ch.remote = c.remote; ch.reset {
		ch.remote = remote
	}
}

// giveUpRemote gives up the held remote, which another tunnel gets: there is none until the name is resolved.
func (c *control) giveUpRemote(ch *change) {
	ch.held, ch.reset, ch.remote, ch.pair = false, true, netip.Addr{}, 0
	c.follower.Set(c.queryFor(ch.next, ch.remote))
}

// prepareChange adds the addresses and routes that are new, and finds the outer addresses.
func (c *control) prepareChange(ch *change) error {
	c.findRemote(ch)
	ch.queried = true
	a := c.follower.Set(c.queryFor(ch.next, ch.remote))
	known := c.intoItself(&a.Route) && !ch.readdressed() // the loop was there before the change
	if a.Loop != (netstate.InterfaceRoute{}) && !ch.held && !known {
		return RouteLoop(a, ch.remote, c.intoItself(&a.Route))
	}
	noPath := a.Err != nil || !ch.remote.IsValid()
	if c.many != nil {
		noPath = c.pathError(a, ch.remote) != nil
	}
	if err := c.addPrefixes(ch, noPath); err != nil && !errors.Is(err, syscall.ENODEV) { // deleted: remakeInterface adds them
		return err
	}
	if ch.pair = c.pair; !ch.readdressed() {
		return nil
	}
	next := route{path: underlay.Path{Local: a.Route.Source, Remote: bytesOf(ch.remote)}, many: c.many != nil}
	if ch.next.LocalAddress.IsValid() {
		next.path.Local = ch.next.LocalAddress.As4()
	}
	if ch.pair = next.pair(); a.Err == nil && a.Route.Local {
		return RemoteIsLocal(ch.remote)
	}
	if noPath && ch.remote.IsValid() && !isTransient(a.Err) {
		return a.Err
	}
	return nil
}

// addPrefixes adds the new addresses and routes, as far as the interface takes any now.
func (c *control) addPrefixes(ch *change, noPath bool) (err error) {
	network, iface := c.engine.network, c.iface.Load()
	if !c.interfacePresent() {
		return nil
	}
	ch.addedAddresses, err = network.AddAddresses(c.ifindex, without(ch.next.Addresses, ch.old.Addresses))
	if err != nil || !iface.Up {
		return err
	}
	routes := without(without(ch.next.Routes, ch.old.Routes), ch.takeOver)
	switch {
	case ch.held:
		routes = nil
	case noPath:
		routes = routesWithoutPath(routes, ch.remote)
	}
	ch.addedRoutes, err = network.AddRoutes(c.ifindex, routes)
	if errors.Is(err, syscall.ENETDOWN) {
		return nil
	}
	if existing := without(routes, ch.addedRoutes); err == nil && len(existing) > 0 {
		err = network.Configure([]netstate.Interface{{Index: c.ifindex, Routes: existing}}) // fails if one leads elsewhere
	}
	return err
}

// undoChange takes back what prepareChange has done.
func (c *control) undoChange(ch *change) error {
	err := errors.Join(c.engine.network.RemoveRoutes(c.ifindex, ch.addedRoutes), c.removeAddresses(ch.addedAddresses))
	if err != nil {
		c.log.Error("cannot take back what was added to the interface", "err", err)
	}
	if ch.queried {
		c.follower.Set(c.query())
	}
	c.wakeControl()
	return nil
}

// commitChange takes the next Config into use. What fails is logged, and tried again as if it had failed
// at any other time.
func (c *control) commitChange(ch *change) error {
	now, old, next := time.Now(), ch.old, ch.next
	routes := c.wantedRoutes(old.Routes)
	c.setConfig(next)
	if ch.reset || ch.held && old.RemoteAddress != next.RemoteAddress {
		c.resetRemote(ch.remote)
	}
	if c.held = ch.held; c.held {
		c.heldRoutes = routes
	}
	c.pair = ch.pair
	if old.keepalive() != next.keepalive() && !c.suspended() {
		c.monitor.Configure(next.keepalive(), now)
		c.peerAnswers.resetCounts()
		c.state.Store(uint32(c.monitor.State()))
	}
	if old.KeepaliveProbe != next.KeepaliveProbe || old.KeepaliveTarget != next.KeepaliveTarget {
		c.probeAnswered.Store(false)
		c.peerAnswers = peerAnswers{}
	}
	if old.MTU != next.MTU {
		c.mtuDecreases = mtuDecreases{}
		c.appliedMTU = c.MTU() // the operator may have set another since
	}
	if old.RPS != next.RPS && c.interfacePresent() { // the name may be another interface's here
		c.changeRPS(old.RPS)
	}
	c.engine.openShared(c.Tunnel, next)
	c.ipsecPolicy.configure(old, next, ch.secret)
	if ch.readdressed() {
		c.startAnew()
	}
	c.applyAnswer(now)
	c.takeOverRoutes(ch.takeOver)
	var names []string
	for _, p := range Changes(old, next) {
		names = append(names, p.Name)
	}
	c.log.Info("the tunnel is changed", "properties", names)
	return nil
}

// startAnew has the next answer used as at a start: nothing learnt of the underlay and the path is kept.
func (c *control) startAnew() {
	c.started, c.anew, c.underlay = false, true, netstate.Route{MTU: defaultUnderlayMTU}
	c.forgetPath()
}

// applyAnswer brings the tunnel in line with the network's present answer at once.
func (c *control) applyAnswer(now time.Time) {
	c.answer = c.follower.Answer()
	c.updateRoute(now)
	c.updateCarrier()
	c.syncFastPath()
	c.warnOfState(now)
}

func (c *control) changeRPS(old string) {
	var err error
	if old != "" {
		err = c.engine.network.ClearRPS(c.ifname.get(), old)
	}
	if c.warnErr(warning.RPSNotSet, err); err == nil && c.cfg.RPS != "" {
		c.setRPS()
	}
}

// takeOverRoutes replaces routes that lead into other tunnels' interfaces.
func (c *control) takeOverRoutes(routes []netstate.InterfaceRoute) {
	iface := c.iface.Load()
	routes = c.wantedRoutes(routes)
	if len(routes) == 0 || !iface.Up || iface.Moved {
		return
	}
	if err := c.engine.network.ReplaceRoutes(c.ifindex, routes); err != nil {
		c.log.Error("cannot take routes over from another tunnel", "err", err)
		c.restoreDue = true
	}
}

// finishChange removes the addresses and routes of the old Config that are not wanted any more.
func (c *control) finishChange(ch *change) error {
	c.removeUnwanted(ch.old)
	c.wakeControl()
	return nil
}

// removeUnwanted removes the addresses and routes of an old Config that are not wanted now.
func (c *control) removeUnwanted(old *Config) {
	if !c.interfacePresent() {
		return
	}
	unwanted := without(old.Routes, c.wantedRoutes(c.cfg.Routes))
	err := errors.Join(c.engine.network.RemoveRoutes(c.ifindex, unwanted), c.removeAddresses(without(old.Addresses, c.cfg.Addresses)))
	if err != nil {
		c.log.Error("cannot remove what the interface is not to have any more", "err", err)
	}
}

// removeAddresses removes addresses of the interface, and puts the routes back that the kernel removes with
// the last one.
func (c *control) removeAddresses(addresses []netstate.InterfaceAddress) error {
	network := c.engine.network
	err := network.RemoveAddresses(c.ifindex, addresses)
	if len(addresses) > 0 && err == nil && c.iface.Load().Up {
		_, err = network.AddRoutes(c.ifindex, c.wantedRoutes(c.cfg.Routes))
	}
	return err
}

// configure takes another Config and its secret into use. With another key or proposal the session ends,
// and the ends negotiate anew. p is nil without a secret.
func (p *ipsecPolicy) configure(old, next *Config, secret ike.Secret) {
	if !p.changes(old, next, secret) {
		return
	}
	p.close()
	p.config.Config, p.config.Mark = next.IPsec.config(secret), next.FwMark
	if p.remotes != nil {
		clear(p.remotes.identities)
	}
}

// changes reports whether configure ends the session.
func (p *ipsecPolicy) changes(old, next *Config, secret ike.Secret) bool {
	keys := func(p Property) bool {
		return strings.HasPrefix(p.Name, "ipsec-") && !p.Secret && p.Name != "ipsec-secret-file"
	}
	return p != nil && (!p.hasSecret(secret) || old.FwMark != next.FwMark || slices.ContainsFunc(Changes(old, next), keys))
}

// secret returns the secret in use; nil if p is nil.
func (p *ipsecPolicy) secret() ike.Secret {
	if p == nil {
		return nil
	}
	return p.config.Secret
}

// hasSecret reports whether secret is the one in use.
func (p *ipsecPolicy) hasSecret(secret ike.Secret) bool { return bytes.Equal(p.secret(), secret) }
