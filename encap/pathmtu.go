package encap

import "time"

// What an encapsulator remembers about the path to the remote end: the soft
// state of RFC 2003, section 5. There is no clock in here: time is an argument.

const (
	// MinPathMTU is the least that every IPv4 path carries, in bytes: no
	// message lowers an estimate below it (RFC 1191, section 3).
	MinPathMTU = 68
	// pathMTULifetime: an estimate is raised no sooner than ten minutes after
	// the last too big (RFC 1191, section 6.3).
	pathMTULifetime = 10 * time.Minute
	// unreachableLifetime bounds what one message, perhaps forged, can do. As
	// long as the path stays broken, the packets sent all the same bring more.
	unreachableLifetime = 30 * time.Second
)

// plateaus are the MTUs that paths commonly have: RFC 1191, section 7.1.
var plateaus = [...]int{65535, 32000, 17914, 8166, 4352, 2002, 1492, 1006, 508, 296, MinPathMTU}

// PathMTU is the path MTU that ICMP errors from the outer path have taught, of
// outer packets, in bytes (RFC 2003, section 5.1). The zero value knows none.
// It is not safe for use by several goroutines at once.
type PathMTU struct {
	mtu  int // 0: nothing learnt
	last time.Time
}

// TooBig takes in a datagram too big about an outer packet of quotedTotalLen
// bytes. nextHopMTU 0 means that the router did not say: then the next plateau
// below quotedTotalLen is it. The estimate is never raised by a message: one
// that says more than is known already is late, or forged, and ignored.
func (p *PathMTU) TooBig(now time.Time, nextHopMTU, quotedTotalLen int) (changed bool) {
	if nextHopMTU == 0 {
		nextHopMTU = plateauBelow(quotedTotalLen)
	}
	nextHopMTU = max(nextHopMTU, MinPathMTU)
	if p.mtu != 0 && nextHopMTU > p.mtu {
		return false
	}
	changed = nextHopMTU != p.mtu
	p.mtu, p.last = nextHopMTU, now
	return changed
}

// Get is the estimate; 0 if nothing was learnt.
func (p *PathMTU) Get() int { return p.mtu }

// Effective is the MTU to use on a path whose first hop carries linkMTU bytes.
func (p *PathMTU) Effective(linkMTU int) int {
	if p.mtu == 0 {
		return linkMTU
	}
	return min(p.mtu, linkMTU)
}

// Tick forgets an estimate ten minutes after the last message that confirmed it,
// so that a path that became better is found out. Once a minute is often enough.
func (p *PathMTU) Tick(now time.Time) (changed bool) {
	if p.mtu == 0 || now.Sub(p.last) < pathMTULifetime {
		return false
	}
	*p = PathMTU{}
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

// Reachability is whether ICMP errors from the outer path say that the remote
// end can be reached. While they say it cannot, the tunnel answers inner packets
// with HostUnreachable, and sends them all the same (RFC 2003, section 5): only
// so does it find out that the path is back. The zero value is reachable. It is
// not safe for use by several goroutines at once.
type Reachability struct {
	until time.Time
}

// Unreachable takes in an OuterError whose Unreachable is true.
func (r *Reachability) Unreachable(now time.Time) (changed bool) {
	changed = r.Reachable(now)
	r.until = now.Add(unreachableLifetime)
	return changed
}

// Heard takes in a packet from the remote end.
func (r *Reachability) Heard() { r.until = time.Time{} }

// Reachable reports whether nothing says otherwise.
func (r *Reachability) Reachable(now time.Time) bool { return !now.Before(r.until) }
