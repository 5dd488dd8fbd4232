package encap

import (
	"time"

	"ipipd/internal/drop"
)

// The soft state of RFC 2003, section 5: what an encapsulator remembers about the path to the
// remote end. It has no clock: time is an argument.

const (
	// MinPathMTU is the minimum MTU of IPv4, in bytes (RFC 1191, section 3).
	MinPathMTU = 68
	// DefaultFloor is the default of PathMTU.Floor, in bytes: messages can be forged, and few
	// real paths have a lower MTU. Linux has the same default (net.ipv4.route.min_pmtu).
	DefaultFloor = 552
	// pathMTULifetime is how long after the last too big an estimate is kept (RFC 1191, section
	// 6.3).
	pathMTULifetime = 10 * time.Minute
	// unreachableLifetime bounds the effect of one message, perhaps forged. While the path stays
	// broken, the packets that are still sent cause more of them.
	unreachableLifetime = 30 * time.Second
)

// plateaus are common path MTUs, in bytes (RFC 1191, section 7.1).
var plateaus = [...]int{65535, 32000, 17914, 8166, 4352, 2002, 1492, 1006, 508, 296, MinPathMTU}

// PathMTU is the path MTU of outer packets, in bytes, learnt from ICMP errors (RFC 2003, section
// 5.1). The zero value is an unknown path MTU. It is not safe for concurrent use.
//
// Only errors about packets with DF=1 change it: routers fragment the others.
type PathMTU struct {
	// Floor is the lowest estimate, in bytes; 0 means DefaultFloor.
	Floor int

	mtu  int // 0: unknown
	last time.Time
}

// TooBig processes a datagram too big; linkMTU is the MTU of the first hop, in bytes. If the
// next-hop MTU is 0, the next plateau below the quoted length is used. drop.OuterErrorNotBelieved
// means that no router would send it (the quoted packet has DF=0, or fits the next-hop MTU), or
// that it is late: no message raises the estimate.
func (p *PathMTU) TooBig(now time.Time, e *OuterError, linkMTU int) (changed bool, d drop.Reason) {
	mtu := e.NextHopMTU
	if mtu == 0 {
		mtu = plateauBelow(e.TotalLen)
	}
	if p.Floor != 0 {
		mtu = max(mtu, p.Floor)
	} else {
		mtu = max(mtu, DefaultFloor)
	}
	inUse := p.Effective(linkMTU)
	if !e.DF || e.TotalLen <= mtu || mtu > inUse {
		return false, drop.OuterErrorNotBelieved
	}
	if changed = mtu < inUse; !changed && p.mtu == 0 {
		return false, drop.None // the first hop's MTU, already in use
	}
	p.mtu, p.last = mtu, now
	return changed, drop.None
}

// Get returns the estimate in bytes; 0 if unknown.
func (p *PathMTU) Get() int { return p.mtu }

// Effective returns the MTU to use, in bytes, if that of the first hop is linkMTU.
func (p *PathMTU) Effective(linkMTU int) int {
	if p.mtu == 0 {
		return linkMTU
	}
	return min(p.mtu, linkMTU)
}

// Expires returns when Tick discards the estimate if no message confirms it; zero if there is none.
func (p *PathMTU) Expires() time.Time {
	if p.mtu == 0 {
		return time.Time{}
	}
	return p.last.Add(pathMTULifetime)
}

// Tick discards the estimate ten minutes after the last message that confirmed it, so that a
// larger path MTU is found. Call it at Expires; calling it more often does no harm.
func (p *PathMTU) Tick(now time.Time) (changed bool) {
	if p.mtu == 0 || now.Sub(p.last) < pathMTULifetime {
		return false
	}
	*p = PathMTU{Floor: p.Floor}
	return true
}

func plateauBelow(n int) int {
	for _, plateau := range plateaus {
		if plateau < n {
			return plateau
		}
	}
	return MinPathMTU
}

// Reachability is whether the remote end is reachable according to ICMP errors from the outer
// path. While it is not, the tunnel answers inner packets with HostUnreachable but still sends
// them (RFC 2003, section 5), which detects that the path is back. The zero value is reachable.
// It is not safe for concurrent use.
type Reachability struct {
	until time.Time
}

// MarkUnreachable records an OuterError whose Unreachable is true.
func (r *Reachability) MarkUnreachable(now time.Time) { r.until = now.Add(unreachableLifetime) }

// MarkReachable records a packet from the remote end.
func (r *Reachability) MarkReachable() { r.until = time.Time{} }

// Reachable reports whether no error is recorded, or the last one has expired.
func (r *Reachability) Reachable(now time.Time) bool { return !now.Before(r.until) }

// Expires returns when Reachable becomes true again if nothing else is recorded; zero if nothing is
// recorded.
func (r *Reachability) Expires() time.Time { return r.until }
