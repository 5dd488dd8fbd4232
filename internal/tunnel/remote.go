package tunnel

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"

	"ipipd/encap"
	"ipipd/internal/resolve"
	"ipipd/keepalive"
)

// A remote that is a DNS name is looked up again when the TTL of its records has passed, and while
// the peer is not heard.

const (
	// minTTL and maxTTL bound the TTL. While the peer is not heard it is minTTL.
	minTTL, maxTTL = 30 * time.Second, time.Hour
	// minRetry is the time until a look-up that has failed is tried again. It doubles each time,
	// to minTTL.
	minRetry = time.Second
	// maxJitter is the largest share by which these times are lengthened, so that those of many
	// tunnels spread.
	maxJitter = 0.1
)

// resolution is what control knows of a remote's DNS name.
type resolution struct {
	resolvedAt time.Time // of the last look-up; zero is none yet
	resolving  bool      // a look-up is under way
	lookups    int       // begun so far, and names set: an answer to an earlier one is out of date
	lookupErr  error     // of the last look-up
	failures   int       // look-ups in a row
	ttl        time.Duration
	jitter     float64      // share, up to maxJitter
	addresses  []netip.Addr // the last answer's: ascending, and immutable
}

// lookupDue is when the remote's name is to be looked up; zero is never.
func (c *control) lookupDue() time.Time {
	if _, named := c.cfg.remote(); !named || c.resolving {
		return time.Time{}
	}
	holds := min(max(c.ttl, minTTL), maxTTL)
	if !keepalive.State(c.state.Load()).Running() {
		holds = minTTL
	}
	if c.failures > 0 {
		holds = min(minRetry<<min(c.failures-1, 10), minTTL)
	}
	return c.resolvedAt.Add(holds + time.Duration(c.jitter*float64(holds)))
}

// lookUp looks the remote's name up in the background.
func (c *control) lookUp() {
	c.resolving = true
	c.lookups++
	name, lookup := c.cfg.RemoteAddress, c.lookups
	c.loops.Go(func() {
		a, err := c.engine.lookupName(c.ctx, name)
		select {
		case c.events <- func(c *control) { c.noteAnswer(lookup, a, err, time.Now()) }:
		case <-c.ctx.Done():
		}
	})
}

// noteAnswer takes the result of a look-up, unless Apply has set another name since. On error the last
// answer stays.
func (c *control) noteAnswer(lookup int, a resolve.Answer, err error, now time.Time) {
	if lookup != c.lookups {
		return
	}
	c.resolving = false
	c.resolvedAt, c.lookupErr, c.jitter = now, err, maxJitter*rand.Float64()
	if err != nil {
		if c.failures++; c.failures == 1 && c.remote.IsValid() {
			c.log.Warn("the name is not resolved again; its last address stays in use", "err", err)
		}
		return
	}
	if c.failures > 0 {
		c.log.Info("the name is resolved again", "remote-address", c.cfg.RemoteAddress)
	}
	c.failures, c.ttl, c.addresses = 0, a.TTL, a.Addresses
	if remote := choose(c.addresses, c.remote); remote != c.remote {
		c.setRemote(remote)
		c.follower.Set(c.query())
	}
}

// choose returns the remote among addresses: the present one if it can stay.
func choose(addresses []netip.Addr, present netip.Addr) netip.Addr {
	if slices.Contains(addresses, present) {
		return present
	}
	return addresses[0]
}

// setAnswer takes what the RemoteAddress of a new Config resolves to: itself if it is an address.
func (c *control) setAnswer(a resolve.Answer, now time.Time) {
	c.resolution = resolution{resolvedAt: now, lookups: c.lookups + 1, ttl: a.TTL, jitter: maxJitter * rand.Float64(), addresses: a.Addresses}
	c.setRemote(choose(a.Addresses, c.remote))
}

// setRemote sets the remote, and forgets what was learnt about the path to another one.
func (c *control) setRemote(remote netip.Addr) {
	if remote == c.remote {
		return
	}
	c.remote = remote
	c.pathMTU = encap.PathMTU{Floor: c.pathMTU.Floor}
	c.reach, c.protoUnreachable = encap.Reachability{}, false
	c.unreachable.Store(false)
	c.probeAnswered.Store(false)
	c.peerProbes.Store(false)
	c.unansweredProbes, c.unansweredLogged = 0, false
}

// resolveAll resolves the remotes.
func (e *Engine) resolveAll(ctx context.Context, configs []*Config) ([]resolve.Answer, error) {
	var wait sync.WaitGroup
	answers, errs := make([]resolve.Answer, len(configs)), make([]error, len(configs))
	for i, cfg := range configs {
		remote, named := cfg.remote()
		if !named {
			answers[i].Addresses = []netip.Addr{remote}
			continue
		}
		wait.Go(func() { answers[i], errs[i] = e.lookupName(ctx, cfg.RemoteAddress) })
	}
	wait.Wait()
	for i, err := range errs {
		if err != nil {
			return nil, &TunnelError{configs[i].Name, fmt.Errorf("cannot resolve remote-address %q: %w: see that this host can resolve it, or give its IPv4 address",
				configs[i].RemoteAddress, err)}
		}
	}
	return answers, nil
}
