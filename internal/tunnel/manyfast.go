package tunnel

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"time"

	"ipipd/internal/drop"
	"ipipd/internal/fastpath"
	"ipipd/internal/fib"
	"ipipd/internal/ipv4"
	"ipipd/internal/netstate"
	"ipipd/internal/underlay"
	"ipipd/internal/warning"
)

// The fast path of a tunnel with many remotes. fastpath.Routes are a copy of its fib.Table in the kernel,
// which remotes.follow keeps up to date; control programs how to send to each gateway. What they cannot
// express goes through userspace, packet by packet: several next hops, a remote whose neighbour is not
// resolved, is unreachable or needs the IP stack, and a remote that is itself an inner destination.

// noGateway is the reason for userspace while there is no remote.
const noGateway = "no route out of the interface has a gateway yet"

// maxSenders limits the prefixes of accept-from with the fast path: each needs a Follower.
const maxSenders = 256

// copyRoutesLocked makes the changes in the kernel's copy of the table, and reports whether that has begun to fail.
func (m *remotes) copyRoutesLocked(next *fib.Table, changes []netstate.RouteChange, added, removed [][4]byte) (news bool) {
	if m.fast == nil {
		return false
	}
	prefixes := make([]netip.Prefix, len(changes))
	for i := range changes {
		prefixes[i] = changes[i].Prefix
	}
	for _, g := range added { // it is new in the copy, even if it has been gone for a moment only
		m.changed[g] = true
	}
	err, was := m.fast.Follow(next, prefixes, added, removed), m.fastErr
	m.fastErr = err
	return err != nil && was == nil
}

// closeCopyLocked ends the kernel's copy.
func (m *remotes) closeCopyLocked() {
	if m.fast != nil {
		m.fast.Close()
		m.fast, m.fastErr = nil, nil
	}
}

// fastHeard returns when the fast path received a remote's last packet; the zero time if never.
func (m *remotes) fastHeard(remote [4]byte) time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fast == nil {
		return time.Time{}
	}
	return m.fast.LastReceived(remote)
}

// syncRoutes makes the kernel's copy of the routes, or after an error makes it anew, while the fast path is allowed.
func (c *control) syncRoutes(now time.Time) {
	m := c.many
	if m == nil {
		return
	}
	wanted := c.fast.programs != nil && c.cfg.FastPathAllowed() && c.routesOf != 0
	if wanted && m.fast == nil {
		c.engine.reserve()
	}
	if wanted && !c.cfg.LocalAddress.IsValid() {
		c.engine.addresses.once.Do(func() { c.engine.followAddresses(c.fast.programs) })
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if !wanted {
		m.closeCopyLocked()
		c.endSenders()
		return
	}
	switch {
	case m.fast == nil:
		m.fast = c.fast.programs.NewRoutes(c.routesOf)
		c.endSenders() // followSenders gives them to the new copy
	case m.fastErr == nil && m.fast.Lacking() == nil:
		return
	case now.Before(c.copyAt):
		c.retry = true
		return
	}
	c.copyAt = now.Add(retryInterval)
	table := m.table.Load()
	if m.fastErr = m.fast.Sync(table); m.fast.Lacking() != nil {
		c.copyAt = now.Add(6 * retryInterval) // Sync writes all routes each time
	}
	for g := range table.Gateways() {
		m.changed[g] = true
	}
}

// updateFastRemote tells the kernel how to send to a gateway. r is the route to it, just made.
func (c *control) updateFastRemote(g [4]byte, r *route) {
	if c.many.fast == nil { // only control sets it
		return
	}
	a := r.remote.follower.Answer()
	to, why := c.fastRemote(g, r, a)
	r.remote.fastDevice, r.remote.fastBlocker, r.remote.policy = a.Route.Device, why, cmp.Or(a.Bypass, a.Ingress)
	if err := c.many.fast.SetRemote(g, to); err != nil {
		c.log.Debug("a remote is carried in userspace", "remote", address(g), "err", err)
		c.retry = c.retry || c.many.fast.Lacking() != nil // by syncRoutes
	}
}

// fastRemote returns how the fast path sends to a gateway and receives from it, or why it does neither.
func (c *control) fastRemote(g [4]byte, r *route, a *netstate.Answer) (to fastpath.Remote, why string) {
	u := &a.Route
	switch {
	case r.txDrop == drop.RemoteNotUsable:
		return to, "the remote is this host"
	case a.Err != nil:
		return to, a.Err.Error()
	case c.intoItself(u):
		return to, "the route to the remote leads into the tunnel itself"
	case !u.Ethernet:
		return to, "the next hop is not a plain Ethernet neighbour"
	case a.Bypass != "":
		return to, a.Bypass
	}
	next := u.Gateway
	if next == [4]byte{} {
		next = g
	}
	to = fastpath.Remote{Source: r.outer.Local, NextHop: next, UnderlayIfindex: u.Device, PathMTU: r.path.MTU}
	to.Tx = r.path.Link != nil && r.txDrop == drop.None && !r.unreachable
	to.Rx = a.Ingress == "" && !r.unreachable // else userspace is to receive its packets
	return to, ""
}

// fastUnderlay returns the device by which most remotes that the fast path can carry are reached: on it the fast path
// also receives from addresses that are no gateway. why is the reason if there is none. refuse: what the tunnel does not
// accept is for nobody else on this host, so that the programs may drop it.
func (c *control) fastUnderlay() (device int, refuse bool, why string) {
	devices, policies := map[int]int{}, map[int]bool{}
	var first [4]byte
	note := func(g [4]byte, at int, blocker, policy string) {
		if policy != "" {
			policies[at] = true
		}
		if blocker == "" {
			devices[at]++
		} else if why == "" || address(g).Less(address(first)) {
			why, first = blocker, g
		}
	}
	for g, r := range c.remotes {
		note(g, r.fastDevice, r.fastBlocker, r.policy)
	}
	for _, s := range c.senders {
		a := s.Answer()
		note([4]byte{}, a.Route.Device, senderBlocker(a), cmp.Or(a.Bypass, a.Ingress))
	}
	for at, n := range devices {
		if device == 0 || n > devices[device] || n == devices[device] && at < device {
			device = at
		}
	}
	if device != 0 {
		if !c.fast.active() { // else poll calls checkOthers
			c.fast.others.Store(c.engine.othersReceive())
		}
		return device, !policies[device] && !c.fast.others.Load(), ""
	}
	return 0, false, cmp.Or(why, noGateway)
}

// manyBlocker is bypassBlocker for many remotes. It also sets fastMany.
func (c *control) manyBlocker() string {
	m := c.many
	m.mu.Lock()
	full, copied := m.fastErr, m.fast != nil
	var lacking error
	if copied {
		lacking = m.fast.Lacking()
	}
	m.mu.Unlock()
	if errors.Is(full, fastpath.ErrClosed) {
		full = nil
	}
	var unknown error // addresses of this host
	if err := c.engine.addresses.full.Load(); err != nil && !c.cfg.LocalAddress.IsValid() {
		unknown = *err
	}
	c.warnErr(warning.FastPathFull, cmp.Or(full, lacking, unknown))
	switch {
	case c.cfg.FwMark != 0:
		return "fwmark is set"
	case full != nil:
		return full.Error()
	case len(c.cfg.AcceptFrom) > maxSenders:
		return fmt.Sprintf("accept-from has %d prefixes, more than the %d that the fast path takes", len(c.cfg.AcceptFrom), maxSenders)
	case !copied:
		return noGateway
	}
	if err := c.followSenders(); err != nil {
		return err.Error()
	}
	device, refuse, why := c.fastUnderlay()
	c.fastMany = fastMany{device, refuse && lacking == nil}
	return why
}

// othersReceive reports whether the kernel, or another process by a raw socket, may receive protocol 4, too.
func (e *Engine) othersReceive() bool {
	if KernelIPIP(os.DirFS("/")) != nil {
		return true
	}
	inodes, err := e.network.RawSockets(ipv4.ProtocolIPIP)
	return err != nil || !slices.ContainsFunc(inodes, underlay.Own) || slices.ContainsFunc(inodes, func(inode uint64) bool { return !underlay.Own(inode) })
}

// checkOthers wakes control if othersReceive has changed.
func (t *Tunnel) checkOthers(others func() bool) {
	if t.many == nil {
		return
	}
	if now := others(); t.fast.others.Swap(now) != now {
		t.wakeControl()
	}
}

// fastMany is what fastUnderlay has returned, for fastManyTunnel.
type fastMany struct {
	device int
	refuse bool
}

// followSenders gives the fast path accept-from and accept-to, and has a Follower for each prefix of accept-from:
// one that is not reached by a plain Ethernet device, or that the host has rules for, is left to userspace.
func (c *control) followSenders() error {
	asked := senders{remotesQuery{c.cfg.LocalAddress, c.cfg.FwMark, c.cfg.UnderlayDevice}, join(c.cfg.AcceptFrom), join(c.cfg.AcceptTo)}
	if asked != c.sendersAsked {
		c.endSenders()
		c.sendersAsked = asked
		for _, p := range c.cfg.AcceptFrom {
			c.senders = append(c.senders, c.engine.network.Follow(c.remoteQuery(firstHost(p)), c.wakeControl))
		}
	}
	next := make([]fastpath.Sender, len(c.senders))
	for i, s := range c.senders {
		a := s.Answer()
		if next[i].Prefix = c.cfg.AcceptFrom[i]; senderBlocker(a) == "" {
			next[i].Device = a.Route.Device
		}
	}
	if c.sendersSet && slices.Equal(next, c.sendersNow) {
		return nil
	}
	for i, s := range c.senders {
		if why := senderBlocker(s.Answer()); why != "" {
			c.log.Debug("a prefix of accept-from is carried in userspace", "prefix", next[i].Prefix, "why", why)
		}
	}
	err := c.many.fast.Accept(next, c.cfg.AcceptTo)
	c.sendersNow, c.sendersSet, c.retry = next, err == nil, c.retry || err != nil
	return err
}

// firstHost returns the first address of a prefix that a host may have: of 0.0.0.0/0 it is 1.0.0.0.
func firstHost(p netip.Prefix) [4]byte {
	if a := p.Masked().Addr().As4(); a[0] != 0 || p.Bits() >= 8 {
		return a
	}
	return [4]byte{1}
}

// senderBlocker returns why the fast path does not carry packets from a prefix of accept-from; "" if it does.
func senderBlocker(a *netstate.Answer) string {
	switch {
	case a.Err != nil:
		return a.Err.Error()
	case !a.Route.Ethernet:
		return "the next hop is not a plain Ethernet neighbour"
	}
	return cmp.Or(a.Bypass, a.Ingress)
}

// senders are the settings that the Followers of followSenders depend on.
type senders struct {
	remotesQuery
	from, to string
}

func (c *control) endSenders() {
	for _, s := range c.senders {
		s.Close()
	}
	c.senders, c.sendersAsked, c.sendersNow, c.sendersSet = nil, senders{}, nil, false
}

// fastManyTunnel is fastTunnel for many remotes.
func (c *control) fastManyTunnel(f fastpath.Tunnel) fastpath.Tunnel {
	f.Many, f.Remote, f.NextHop, f.PathMTU = true, fastpath.AnyRemote, [4]byte{}, 0
	f.UnderlayIfindex = c.fastMany.device
	f.TxEnabled, f.RxEnabled = !c.cfg.receiveOnly(), c.fastMany.device != 0
	f.AnyPeer, f.AcceptTo = c.cfg.AcceptAnyPeer, len(c.cfg.AcceptTo) > 0
	f.AcceptFrom, f.Refuse = len(c.cfg.AcceptFrom) > 0, c.fastMany.refuse
	return f
}

// reserve has the fast path leave to userspace the packets of tunnels that have precedence over one with many remotes:
// those with one remote, and over one without a local address also those with many remotes and a local address.
func (e *Engine) reserve() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.reservePairsLocked(e.table.Load(), e.others.Load())
}

// reservePairsLocked is reserve for tables.
func (e *Engine) reservePairsLocked(tables ...*table) {
	if e.fastPath != nil {
		e.fastPath.Reserve(pairsToReserve(tables...))
	}
}

// pairsToReserve returns the outer addresses in tables that have precedence over a tunnel with many remotes.
func pairsToReserve(tables ...*table) (pairs []fastpath.Pair) {
	locals := map[[4]byte]bool{}
	for _, t := range tables {
		for pair := range *t {
			if local, remote := pair.addresses(); remote == anyRemote {
				locals[local] = true
			}
		}
	}
	for _, t := range tables {
		for pair := range *t {
			local, remote := pair.addresses()
			if locals[[4]byte{}] && local != [4]byte{} || locals[local] && remote != anyRemote {
				pairs = append(pairs, fastpath.Pair{Local: local, Remote: remote})
			}
		}
	}
	return pairs
}

// addresses returns the outer addresses of a pair.
func (p outerPair) addresses() (local, remote [4]byte) {
	for i := range 4 {
		local[i], remote[i] = byte(p>>(56-8*i)), byte(p>>(24-8*i))
	}
	return local, remote
}
