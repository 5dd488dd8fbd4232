package tunnel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"ipipd/internal/drop"
	"ipipd/internal/packet"
	"ipipd/keepalive"
)

const (
	// resolveInterval is how often a DNS name is resolved. Go's resolver does not return the
	// record's TTL.
	resolveInterval = time.Minute
	// pollInterval is the longest time between rounds without a notification.
	pollInterval = 10 * time.Second
	// minRoundGap is the least time between rounds that wakes cause.
	minRoundGap = 50 * time.Millisecond
	// recentlyReceived is the time since its last packet during which a peer counts as alive.
	recentlyReceived = 3 * time.Second
)

// supervise is the tunnel's control loop: keepalive, carrier, route, DNS name and path MTU. It returns
// when ctx is done.
func (t *Tunnel) supervise(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	var lastRound time.Time // end of the last round
	resolutions := make(chan resolution, 1)
	resolving := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.wake:
			// Coalesce wakes, since third parties can cause them.
			select {
			case <-ctx.Done():
				return
			case <-time.After(minRoundGap - time.Since(lastRound)):
			}
			select {
			case <-t.wake:
			default:
			}
		case <-timer.C:
		case f := <-resolutions:
			resolving = false
			t.updateRemote(f, time.Now())
		}
		now := time.Now()
		if !resolving && t.resolveDue(now) {
			resolving = true
			t.loops.Go(func() {
				remote, err := t.engine.lookupName(ctx, t.cfg.RemoteAddress)
				resolutions <- resolution{remote, err}
			})
		}
		probe, changed := t.tick(now)
		t.updateCarrier()
		if changed {
			t.logState()
		}
		if probe {
			t.probe()
			t.warnUnanswered()
		}
		t.updateReachability(now)
		t.updateRoute(now)
		t.warnOversize()
		t.engine.updateReception()
		t.warnFragmentation()
		lastRound = time.Now()
		timer.Reset(t.nextTick(lastRound))
	}
}

// tick advances the keepalive to now.
func (t *Tunnel) tick(now time.Time) (probe, changed bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	before := t.monitor.State()
	if last := t.lastReceived(); !last.IsZero() {
		t.monitor.NoteReceived(last)
	}
	action := t.monitor.Tick(now)
	state := t.monitor.State()
	t.state.Store(uint32(state))
	return action.Probe, state != before
}

// nextTick is the time until the next round.
func (t *Tunnel) nextTick(now time.Time) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	wait := pollInterval
	if next := t.monitor.Next(); !next.IsZero() {
		wait = min(wait, next.Sub(now))
	}
	return max(wait, 0)
}

// running reports whether the tunnel is running: the keepalive is up or off, the local address is
// present, and there is an SA if the tunnel has a secret.
func (t *Tunnel) running() bool {
	return keepalive.State(t.state.Load()).Running() && !t.localAbsent() && (t.ipsecPolicy == nil || t.ipsecPolicy.established())
}

// updateCarrier sets the interface's carrier to running.
func (t *Tunnel) updateCarrier() {
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

// logState logs a change of the keepalive state.
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

// remedy is the advice to the operator when no packets of the peer are received.
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
	case t.probeAnswered.Load():
		return fmt.Sprintf("the peer used to answer probes: see whether %v is up and protocol 4 passes in both directions", peer)
	case t.cfg.KeepaliveProbe == keepalive.FormReflect:
		return "a Linux peer answers reflect probes only with net.ipv4.ip_forward=1 and accept_local=1, rp_filter=0 on its tunnel interface; " +
			"else use --keepalive-probe echo --keepalive-target with the peer's inner address, or --keepalive off"
	case t.cfg.KeepaliveProbe == keepalive.FormEcho:
		return fmt.Sprintf("see whether %v answers pings through the tunnel, and whether protocol 4 passes in both directions", t.cfg.KeepaliveTarget)
	}
	return "empty probes are not answered: the peer has to send its own; see whether protocol 4 passes in both directions"
}

// probe sends a keepalive probe, whether the tunnel is running or not.
func (t *Tunnel) probe() {
	route := t.route.Load()
	b := packet.New(icmpSize)
	switch t.cfg.KeepaliveProbe {
	case keepalive.FormReflect:
		b.Set(keepalive.ReflectProbe(route.path.Local, route.path.Remote))
	case keepalive.FormEcho:
		b.Set(t.echo.Request())
	}
	if d := route.outer.EncapsulateProbe(b, t.ids.next()); d != drop.None {
		t.drop(d, 1)
		return
	}
	t.sendLocal(t.tx, b, &route.path)
}

// resolve parses or resolves RemoteAddress. Only Start calls it.
func (t *Tunnel) resolve(ctx context.Context, now time.Time) error {
	if a, err := netip.ParseAddr(t.cfg.RemoteAddress); err == nil {
		t.remote = a
		return nil
	}
	a, err := t.engine.lookupName(ctx, t.cfg.RemoteAddress)
	if err != nil {
		return fmt.Errorf("%w: see that this host can resolve it, or give its IPv4 address", err)
	}
	t.remote, t.resolvedAt = a, now
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

func (t *Tunnel) resolveDue(now time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return !t.resolvedAt.IsZero() && now.Sub(t.resolvedAt) >= resolveInterval
}

// resolution is the result of resolving RemoteAddress. The supervisor does not block on the resolver.
type resolution struct {
	remote netip.Addr
	err    error
}

// updateRemote applies a resolution. On error the last address stays in use.
func (t *Tunnel) updateRemote(f resolution, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.resolvedAt = now
	if f.err != nil {
		t.log.Warn("the name is not resolved again; its last address stays in use", "err", f.err)
		return
	}
	t.remote = f.remote
}

// unansweredLimit is the number of unanswered probes after which warnUnanswered warns.
const unansweredLimit = 10

// warnUnanswered warns once if the peer sends data but answers no probe: the tunnel would stop
// running when the data does. Empty probes have no answer, and a peer's own probes are enough.
// Call it once per probe.
func (t *Tunnel) warnUnanswered() {
	if t.unansweredLogged || t.cfg.KeepaliveProbe == keepalive.FormEmpty || t.probeAnswered.Load() || t.peerProbes.Load() {
		return
	}
	if keepalive.State(t.state.Load()) != keepalive.Up {
		return
	}
	if t.unansweredProbes++; t.unansweredProbes <= min(unansweredLimit, t.cfg.Keepalive.Retries) { // the last one is still in flight
		return
	}
	t.unansweredLogged = true
	remedy := "use --keepalive-probe echo --keepalive-target with the peer's inner address, or --keepalive off"
	if t.cfg.KeepaliveProbe == keepalive.FormEcho {
		remedy = fmt.Sprintf("see whether %v answers pings through the tunnel, or use --keepalive off", t.cfg.KeepaliveTarget)
	}
	t.log.Warn("the peer does not answer probes: only the data that it sends keeps the tunnel running", "remedy", remedy)
}

// warnOversize warns once if the peer sends packets above this end's MTU. The MTU may have grown since
// the packet was received; then there is nothing to warn of.
func (t *Tunnel) warnOversize() {
	size, mtu := int(t.oversize.Load()), t.MTU()
	if size == 0 || t.oversizeLogged {
		return
	}
	if size <= mtu {
		t.oversize.Store(0)
		return
	}
	t.oversizeLogged = true
	t.log.Warn("the peer sends packets that are longer than the MTU of this end: protocols that compare them, OSPF for one, do not come up",
		"bytes", size, "actual-mtu", mtu, "remedy", "give both ends the same --mtu")
}
