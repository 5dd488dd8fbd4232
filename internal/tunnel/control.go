package tunnel

import (
	"fmt"
	"net/netip"
	"time"

	"ipipd/encap"
	"ipipd/internal/drop"
	"ipipd/internal/fastpath"
	"ipipd/internal/netstate"
	"ipipd/internal/packet"
	"ipipd/internal/underlay"
	"ipipd/internal/warning"
	"ipipd/keepalive"
)

const (
	// retryInterval is the time until what failed is tried again if no event comes.
	retryInterval = 10 * time.Second
	// minRoundGap is the least time between rounds that events cause.
	minRoundGap = 50 * time.Millisecond
	// timerGrain: the times of rounds are rounded up to a multiple of it, so that the rounds of many
	// tunnels coincide: each wake-up of an idle process costs some 0.3 ms of a processor.
	timerGrain = 50 * time.Millisecond
	// recentlyReceived is the time since its last packet during which a peer counts as alive.
	recentlyReceived = 3 * time.Second
	// eventQueue is the capacity of Tunnel.events.
	eventQueue = 16
)

// control is the control state of a tunnel: keepalive, carrier, route, DNS name, path MTU, the
// interface and the fast path's configuration. One goroutine owns it, first Apply's and then
// run's. Others send it an event or a wake, and read what it publishes in Tunnel.
type control struct {
	*Tunnel

	cfg      *Config          // in use; immutable
	adopted  bool             // the interface was taken over from the process before
	answer   *netstate.Answer // the follower's, as of this round
	underlay netstate.Route   // answer.Route; while that leads into the tunnel itself, with the MTU and source of before
	remote   netip.Addr       // RemoteAddress, resolved; the zero Addr until it is
	pair     outerPair        // the tunnel's key in Engine.table; 0 if it is not there
	noPath   error            // pathError of the last round
	started  bool             // the tunnel is not suspended
	anew     bool             // the next pathlessRoute takes nothing from the last route: see startAnew
	resolution
	retry bool // something failed in this round: the next one is due after retryInterval

	monitor        *keepalive.Monitor
	peerAnswers    peerAnswers
	lost           lostInterface
	carrier        bool // as last set
	tx             transmitter
	ids            idCounter
	echo           *keepalive.Echo                  // nil unless keepalive-probe is echo
	keys           []int32                          // of the TUN queues, in their order, at the workers
	takeOver       []netstate.InterfaceRoute        // routes that lead into another tunnel until this one begins
	routes         RouteFollower                    // mirrors the interface's routes in many; nil is none
	routesOf       int                              // the ifindex whose routes it mirrors
	remotes        map[[4]byte]*remote              // by address, the gateways of the interface's routes
	links          map[underlay.Link]*underlay.Link // next hops, shared by remotes: see remoteLink
	remotesLeftOut bool                             // a gateway is not in remotes, because of maxRemotes
	learnt         map[[4]byte]*remote              // by address, inner destinations that an ICMP error was about: see learn
	asked          remotesQuery                     // what the queries of remotes have in common, as last asked
	narrowest      [4]byte                          // the remote whose first hop has the least MTU: see remotesMTU

	ifindex      int // in this network namespace, as last read
	appliedMTU   int // last MTU that SetMTU accepted
	mtuDecreases mtuDecreases

	pathMTU          encap.PathMTU
	pathMTUFrom      [4]byte // router that reported the path MTU
	reach            encap.Reachability
	unreachableAt    time.Time
	protoUnreachable bool // the peer's host answers ICMP protocol unreachable (3/2)

	senders      []Follower // one for each prefix of accept-from
	sendersAsked senders
	sendersNow   []fastpath.Sender // what the fast path was last told, if sendersSet
	sendersSet   bool
	copyAt       time.Time // when the kernel's copy of the routes is to be tried again
	fastMany     fastMany

	programmed fastpath.Tunnel // what Tunnel.fast's link was last updated with
	attachedTo int             // the interface that has been given ipip_encap; 0 is none
	attachErr  error           // why the programs are not attached, until attachAt
	attachAt   time.Time       // when that is to be tried again

	restoreCounts    map[fmt.Stringer]restoreCount
	restoreDue       bool   // what the interface lacks is to be added in the next round
	wasDown          bool   // the interface was set down since its routes were last restored: it may lack them all
	interfaceChanges uint64 // of the answer at the last updateInterface, as interfaceDowns
	interfaceDowns   uint64

	realServer realServer
	warnedAt   map[warning.Code]time.Time // when each that is warning.Limited was last logged
}

// event is a message to the control goroutine, which calls it.
type event func(c *control)

// post sends an event. It never blocks: false means that the queue is full.
func (t *Tunnel) post(e event) bool {
	select {
	case t.events <- e:
		return true
	default:
		return false
	}
}

// wakeControl starts a round. It never blocks; wakes coalesce.
func (t *Tunnel) wakeControl() {
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// run is the control goroutine. It returns when Tunnel.ctx is done, and has then released what
// control owns.
func (c *control) run() {
	defer c.end()
	timer := time.NewTimer(0)
	defer timer.Stop()
	var last, due time.Time // the last round, the next one by the clock; zero is none
	for {
		select {
		case <-c.ctx.Done():
			return
		case e := <-c.events:
			e(c)
		case <-c.wake:
		case <-timer.C:
		}
		if c.ctx.Err() != nil {
			return
		}
		now := time.Now()
		// Limit the rounds, since third parties can cause events.
		if gap := last.Add(minRoundGap); now.Before(gap) && (due.IsZero() || now.Before(due)) {
			if due.IsZero() || gap.Before(due) {
				due = gap
			}
			timer.Reset(due.Sub(now))
			continue
		}
		c.round(now)
		last = time.Now()
		if due = c.next(last); due.IsZero() {
			timer.Stop()
		} else {
			due = align(due)
			timer.Reset(due.Sub(last))
		}
	}
}

var processStart = time.Now()

// align rounds t up to a multiple of timerGrain since the start of the process.
func align(t time.Time) time.Time {
	since := t.Sub(processStart) + timerGrain - 1
	return processStart.Add(since - since%timerGrain)
}

// end releases what control owns.
func (c *control) end() {
	if c.follower != nil {
		c.follower.Close()
	}
	c.endFastPath()
	c.endRoutes()
	if c.ipsecPolicy != nil {
		c.ipsecPolicy.close()
	}
}

// round brings the tunnel in line with the present time and answer.
func (c *control) round(now time.Time) {
	c.retry = false
	if due := c.lookupDue(); !due.IsZero() && !now.Before(due) {
		c.lookUp()
	}
	probe, stateChanged := c.tick(now)
	c.updateCarrier()
	if stateChanged && c.monitor.State() == keepalive.Up {
		c.log.Info("the peer is heard: running")
	}
	if probe {
		c.noteAnswers()
		c.probe()
	}
	c.updateReachability(now)
	c.chooseRemote(now)
	c.answer = c.follower.Answer()
	c.noteNetwork()
	c.updateInterface(now)
	c.followRoutes()
	c.syncRoutes(now)
	changed := c.askRemotes()
	c.updateRoute(now)
	c.protectRemotes(now)
	c.updateRemotes(changed, now)
	c.syncFastPath()
	c.warnOfState(now)
	c.engine.updateReception(c.Tunnel)
	if c.probeDue && c.monitor.State() != keepalive.Off {
		c.probe()
	}
	c.probeDue = false
	if c.confirmDue.Swap(false) {
		c.confirmRemotes()
	}
}

// tick advances the keepalive to now. probe: one is due; changed: its state is another.
func (c *control) tick(now time.Time) (probe, changed bool) {
	before := c.monitor.State()
	if last := c.lastReceived(); !last.IsZero() {
		c.monitor.NoteReceived(last)
	}
	probe = c.monitor.Tick(now)
	state := c.monitor.State()
	c.state.Store(uint32(state))
	return probe, state != before
}

// next returns when the next round is due if no event comes; the zero time if never.
func (c *control) next(now time.Time) (next time.Time) {
	at := func(t time.Time) {
		if !t.IsZero() && (next.IsZero() || t.Before(next)) {
			next = t
		}
	}
	at(c.monitor.Next())
	at(c.pathMTU.Expires())
	at(c.reach.Expires())
	at(c.lookupDue())
	for _, s := range []*sighting{&c.looped, &c.oversize, &c.fragmentLoss} {
		at(s.until)
	}
	at(c.remotesNext())
	at(c.realServer.due)
	at(c.ipsecNext())
	if c.lost.gone {
		at(c.lost.at)
	}
	if c.previous != nil {
		at(c.previousUntil)
	}
	if c.retry || c.iface.Load().Moved { // netlink tells of no change in another network namespace
		at(now.Add(retryInterval))
	}
	return next
}

// running reports whether the tunnel is running: the keepalive is up or off, there has been a path, the
// local address is present, and there is an SA if the tunnel has a secret.
func (t *Tunnel) running() bool {
	return keepalive.State(t.state.Load()).Running() && !t.suspended() && (t.ipsecPolicy == nil || t.ipsecPolicy.established())
}

// updateCarrier sets the interface's carrier to running.
func (c *control) updateCarrier() {
	running := c.running()
	if running == c.carrier || c.lost.gone {
		c.clear(warning.CarrierNotSet)
		return
	}
	err := c.device.SetCarrier(running)
	if c.warnErr(warning.CarrierNotSet, err); err != nil {
		c.retry = true
		return
	}
	c.carrier = running
	c.changes.Add(1)
	c.readInterface()
}

// remedy is the advice to the operator when no packets of the peer are received.
func (c *control) remedy() string {
	peer := address(c.route.Load().path.Remote)
	if c.ipsecPolicy != nil {
		if s := c.ipsecPolicy.status(); !s.Established {
			return "there is no SA: " + s.Describe(time.Now())
		}
	}
	switch {
	case c.protoUnreachable:
		return fmt.Sprintf("%v answers ICMP protocol unreachable: nothing there takes protocol 4; set up its end of the tunnel", peer)
	case c.probeAnswered.Load():
		return fmt.Sprintf("the peer used to answer probes: see whether %v is up and protocol 4 passes in both directions", peer)
	case c.cfg.KeepaliveProbe == keepalive.FormReflect:
		return "a Linux peer answers reflect probes only with net.ipv4.ip_forward=1 and accept_local=1, rp_filter=0 on its tunnel interface; " +
			fmt.Sprintf("else %s, or keepalive=off", c.cfg.EchoRemedy(c.ifname.get()))
	case c.cfg.KeepaliveProbe == keepalive.FormEcho:
		return fmt.Sprintf("see whether %v answers pings through the tunnel, and whether protocol 4 passes in both directions", c.cfg.KeepaliveTarget)
	}
	return "empty probes are not answered: the peer has to send its own; see whether protocol 4 passes in both directions"
}

// probe sends a keepalive probe, whether the tunnel is running or not, and one to a candidate.
func (c *control) probe() {
	route := c.route.Load()
	c.noteProbe(c.cfg.KeepaliveProbe, time.Now())
	c.noteProbeDue()
	c.sendProbe(route.outer, &route.path)
	if candidate := c.candidate.Load(); candidate != nil && c.ipsecPolicy == nil {
		c.sendProbe(route.outer, &candidate.path)
	}
	// Last, since it may wait for the RTNL. Unanswered probes may mean that the next hop has another
	// MAC address by now; poll, which confirms next hops while there is traffic, does not count probes.
	if time.Since(c.lastReceived()) >= c.cfg.keepalive().Interval*3/2 {
		c.confirmNextHop()
	}
}

// sendProbe sends a probe along a path.
func (c *control) sendProbe(outer encap.Outer, path *underlay.Path) {
	outer.Local, outer.Remote = path.Local, path.Remote
	b := packet.New(icmpSize)
	switch c.cfg.KeepaliveProbe {
	case keepalive.FormReflect:
		b.Set(keepalive.ReflectProbe(path.Local, path.Remote))
	case keepalive.FormEcho:
		b.Set(c.echo.Request())
	}
	if d := outer.EncapsulateProbe(b, c.ids.next()); d != drop.None {
		c.drop(d)
		return
	}
	c.sendLocal(c.tx, b, path)
}

// confirmNextHop has the kernel confirm the neighbour that frames are sent to: it does not see them use it.
func (t *Tunnel) confirmNextHop() {
	if t.route.Load().path.Link == nil {
		return
	}
	if err := t.follower.Refresh(); err != nil {
		t.log.Debug("the next hop is not resolved", "err", err)
	}
}
