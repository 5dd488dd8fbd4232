package ike

import "time"

// Limits on unauthenticated messages, chosen so that together they cost a few percent of a CPU.
const (
	// cheapRepliesPerSecond limits replies that need neither a private key nor memory for long:
	// message 2 of main mode, and COOKIE notifications.
	cheapRepliesPerSecond = 1000
	// dhPerSecond limits Diffie-Hellman exchanges. Initiators that have shown return routability
	// have a limit of their own, so that spoofed sources cannot use it up.
	dhPerSecond = 20
	// sharedDHPerSecond limits the exchanges of such initiators, of all Peers with the same Limits.
	sharedDHPerSecond = 100
)

// rateLimiter is a token bucket with a burst of one second. The zero value is full. Excess is
// dropped evenly rather than from the start of each second on: retransmissions come in whole
// seconds, and would otherwise be dropped all or not at all.
type rateLimiter struct {
	fullAt time.Time // when the bucket is full again, if nothing more is taken
}

// allow takes a token, if there is one.
func (b *rateLimiter) allow(now time.Time, perSecond int) bool {
	if b.fullAt.Before(now) {
		b.fullAt = now
	}
	next := b.fullAt.Add(time.Second / time.Duration(perSecond))
	if next.Sub(now) > time.Second {
		return false
	}
	b.fullAt = next
	return true
}
