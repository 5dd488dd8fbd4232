package encap

import "time"

// What an encapsulator remembers about the path to the remote end: the soft
// state of RFC 2003, section 5. There is no clock in here: time is an argument.

const (
	// MinPathMTU is the least that every IPv4 path carries, in bytes (RFC 1191,
	// section 3).
	MinPathMTU = 68
	// DefaultFloor is what no message lowers an estimate below, in bytes: messages
	// can be forged, and hardly a path is narrower. It is Linux's own default
	// (net.ipv4.route.min_pmtu).
	DefaultFloor = 552
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
//
// Only packets with DF=1 teach it: routers fragment the others, and there is
// nothing to learn from them.
type PathMTU struct {
	// Floor is what no message lowers the estimate below, in bytes; 0 is
	// DefaultFloor.
	Floor int

	mtu  int // 0: nothing learnt
	last time.Time
}

// TooBig takes in a datagram too big; linkMTU is what the path's first hop carries,
// in bytes. A next-hop MTU of 0 means that the router did not say: then the next
// plateau below the quoted length is it. DropOuterErrorNotBelieved is about one that
// no router sends: DF is not set in what it quotes, or that is not too big for the
// next-hop MTU; or one that is late, since it says more than is known already: no
// message raises the estimate.
func (p *PathMTU) TooBig(now time.Time, e *OuterError, linkMTU int) (changed bool, d Drop) {
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
		return false, DropOuterErrorNotBelieved
	}
	if changed = mtu < inUse; !changed && p.mtu == 0 {
		return false, DropNone // the first hop's, which is no news
	}
	p.mtu, p.last = mtu, now
	return changed, DropNone
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

// Reachability is whether ICMP errors from the outer path say that the remote
// end can be reached. While they say it cannot, the tunnel answers inner packets
// with HostUnreachable, and sends them all the same (RFC 2003, section 5): only
// so does it find out that the path is back. The zero value is reachable. It is
// not safe for use by several goroutines at once.
type Reachability struct {
	until time.Time
}

// Unreachable takes in an OuterError whose Unreachable is true.
func (r *Reachability) MarkUnreachable(now time.Time) (changed bool) {
	changed = r.Reachable(now)
	r.until = now.Add(unreachableLifetime)
	return changed
}

// MarkReachable takes in a packet from the remote end.
func (r *Reachability) MarkReachable() { r.until = time.Time{} }

// Reachable reports whether nothing says otherwise.
func (r *Reachability) Reachable(now time.Time) bool { return !now.Before(r.until) }
