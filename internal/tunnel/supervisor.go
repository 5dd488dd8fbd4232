package tunnel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"ipipd/encap"
	"ipipd/internal/packet"
	"ipipd/keepalive"
)

const (
	// resolveEvery is how old the answer of a DNS name may grow. Go's resolver
	// does not tell the record's TTL.
	resolveEvery = time.Minute
	// lookEvery is how often the route is looked at without having been told
	// that it changed.
	lookEvery = 10 * time.Second
	// minRest is between two rounds of the supervisor, unless a timer asks for one.
	minRest = 50 * time.Millisecond
	// recentlyHeard is how long ago a peer was heard that is certainly there.
	recentlyHeard = 3 * time.Second
)

// supervise does what has to be done beside the packets: probes, the running
// flag, the route, the name, the path MTU.
func (t *Tunnel) supervise(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	var rested time.Time // when the last round had ended
	found := make(chan foundName, 1)
	asking := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.wake:
			// Many events are one round, and strangers can cause events.
			select {
			case <-ctx.Done():
				return
			case <-time.After(minRest - time.Since(rested)):
			}
			select {
			case <-t.wake:
			default:
			}
		case <-timer.C:
		case f := <-found:
			asking = false
			t.followName(f, time.Now())
		}
		now := time.Now()
		if !asking && t.nameIsOld(now) {
			asking = true
			t.loops.Go(func() {
				remote, err := t.host.lookupName(ctx, t.cfg.RemoteAddress)
				found <- foundName{remote, err}
			})
		}
		probe, changed := t.tick(now)
		t.followCarrier()
		if changed {
			t.logState()
		}
		if probe {
			t.probe()
			t.warnOfSilentProbes()
		}
		t.followReachability(now)
		t.followRoute(now)
		t.warnOfSize()
		t.host.chooseReceiving()
		t.warnOfFragments()
		rested = time.Now()
		timer.Reset(t.nextTick(rested))
	}
}

// tick runs the keepalive up to now.
func (t *Tunnel) tick(now time.Time) (probe, changed bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	before := t.monitor.State()
	if noteReceived := t.lastReceived(); !noteReceived.IsZero() {
		t.monitor.NoteReceived(noteReceived)
	}
	action := t.monitor.Tick(now)
	state := t.monitor.State()
	t.state.Store(uint32(state))
	return action.Probe, state != before
}

func (t *Tunnel) nextTick(now time.Time) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	wait := lookEvery
	if next := t.monitor.Next(); !next.IsZero() {
		wait = min(wait, next.Sub(now))
	}
	return max(wait, 0)
}

// running reports whether the tunnel is running: by the keepalive the remote is
// there, the local address is here, and, of a tunnel with a secret, there is an SA.
func (t *Tunnel) running() bool {
	return keepalive.State(t.state.Load()).Running() && !t.absent() && (t.ipsecPolicy == nil || t.ipsecPolicy.established())
}

// followCarrier sets the carrier to whether the tunnel is running.
func (t *Tunnel) followCarrier() {
	running := t.running()
	if running == t.carrier {
		return
	}
	if err := t.device.SetCarrier(running); err != nil {
		t.log.Error("cannot set the carrier", "err", err)
		return
	}
	t.carrier = running
}

// logState says what the keepalive has found out.
func (t *Tunnel) logState() {
	state := keepalive.State(t.state.Load())
	silence := t.cfg.Keepalive.HoldTime().String()
	switch state {
	case keepalive.Up:
		t.log.Info("the peer is heard: running")
	case keepalive.NeverHeard:
		t.log.Warn("not running: the peer was never heard", "waited", silence, "remedy", t.remedy())
	case keepalive.Lost:
		t.log.Warn("not running: the peer is not heard any more", "silent-for", silence, "remedy", t.remedy())
	}
}

// remedy is what an operator should look at when the peer is not heard.
func (t *Tunnel) remedy() string {
	t.mu.Lock()
	protoUnreachable := t.protoUnreachable
	t.mu.Unlock()
	peer := address(t.route.Load().path.Remote)
	if t.ipsecPolicy != nil {
		if s := t.ipsecPolicy.status(); !s.Established {
			return "there is no SA: " + s.Describe(time.Now())
		}
	}
	switch {
	case protoUnreachable:
		return fmt.Sprintf("%v answers ICMP protocol unreachable: nothing there takes protocol 4; set up its end of the tunnel", peer)
	case t.answered.Load():
		return fmt.Sprintf("the peer used to answer probes: see whether %v is up and protocol 4 passes in both directions", peer)
	case t.cfg.KeepaliveProbe == keepalive.FormReflect:
		return "a Linux peer answers reflect probes only with net.ipv4.ip_forward=1 and accept_local=1, rp_filter=0 on its tunnel interface; " +
			"else use --keepalive-probe echo --keepalive-target with the peer's inner address, or --keepalive off"
	case t.cfg.KeepaliveProbe == keepalive.FormEcho:
		return fmt.Sprintf("see whether %v answers pings through the tunnel, and whether protocol 4 passes in both directions", t.cfg.KeepaliveTarget)
	}
	return "empty probes are not answered: the peer has to send its own; see whether protocol 4 passes in both directions"
}

// probe sends one keepalive probe. It goes out whether the tunnel runs or not.
func (t *Tunnel) probe() {
	route := t.route.Load()
	b := packet.New(icmpSize)
	switch t.cfg.KeepaliveProbe {
	case keepalive.FormReflect:
		b.Set(keepalive.ReflectProbe(route.path.Local, route.path.Remote))
	case keepalive.FormEcho:
		b.Set(t.echo.Request())
	}
	if d := route.outer.EncapsulateProbe(b, t.ids.next()); d != encap.DropNone {
		t.drop(d)
		return
	}
	t.write(t.tx, b, &route.path)
}

// resolve looks RemoteAddress up. The caller holds mu, or is alone.
func (t *Tunnel) resolve(ctx context.Context, now time.Time) error {
	if a, err := netip.ParseAddr(t.cfg.RemoteAddress); err == nil {
		t.remote = a
		return nil
	}
	a, err := t.host.lookupName(ctx, t.cfg.RemoteAddress)
	if err != nil {
		return fmt.Errorf("%w: see that this host can resolve it, or give its IPv4 address", err)
	}
	t.remote, t.resolved = a, now
	return nil
}

func lookupName(ctx context.Context, name string) (netip.Addr, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	addresses, err := net.DefaultResolver.LookupNetIP(ctx, "ip4", name)
	if err != nil || len(addresses) == 0 {
		if err == nil {
			err = errors.New("it has no IPv4 address")
		}
		return netip.Addr{}, fmt.Errorf("cannot resolve remote-address %q: %w", name, err)
	}
	return addresses[0].Unmap(), nil
}

func (t *Tunnel) nameIsOld(now time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return !t.resolved.IsZero() && now.Sub(t.resolved) >= resolveEvery
}

// foundName is the answer to a look-up of RemoteAddress, which takes as long as a
// name server does: the supervisor does not wait for it.
type foundName struct {
	remote netip.Addr
	err    error
}

// followName takes the answer of a name server. The old one stays while there is no
// new one.
func (t *Tunnel) followName(f foundName, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.resolved = now
	if f.err != nil {
		t.log.Warn("the name is not resolved again; its last address stays in use", "err", f.err)
		return
	}
	t.remote = f.remote
}

// silentProbes is how many probes in a row, of a peer that is heard, say that it
// answers none.
const silentProbes = 10

// warnOfSilentProbes says it once when the peer is heard and answers no probe: then it
// is the data alone that keeps the tunnel running, until there is none. Empty probes
// are not answered by design, and a peer that sends probes of its own is heard by
// those. Called with each probe.
func (t *Tunnel) warnOfSilentProbes() {
	if t.toldOfData || t.cfg.KeepaliveProbe == keepalive.FormEmpty || t.answered.Load() || t.probes.Load() {
		return
	}
	if keepalive.State(t.state.Load()) != keepalive.Up {
		return
	}
	if t.unanswered++; t.unanswered <= min(silentProbes, t.cfg.Keepalive.Retries) { // this one has still to be answered
		return
	}
	t.toldOfData = true
	remedy := "use --keepalive-probe echo --keepalive-target with the peer's inner address, or --keepalive off"
	if t.cfg.KeepaliveProbe == keepalive.FormEcho {
		remedy = fmt.Sprintf("see whether %v answers pings through the tunnel, or use --keepalive off", t.cfg.KeepaliveTarget)
	}
	t.log.Warn("the peer does not answer probes: only the data that it sends keeps the tunnel running", "remedy", remedy)
}

// warnOfSize says it once when the peer sends packets that are longer than this end's
// MTU is now; it may have been less when they came.
func (t *Tunnel) warnOfSize() {
	size, mtu := int(t.oversize.Load()), t.MTU()
	if size == 0 || t.toldOfSize {
		return
	}
	if size <= mtu {
		t.oversize.Store(0)
		return
	}
	t.toldOfSize = true
	t.log.Warn("the peer sends packets that are longer than the MTU of this end: protocols that compare them, OSPF for one, do not come up",
		"bytes", size, "actual-mtu", mtu, "remedy", "give both ends the same --mtu")
}
