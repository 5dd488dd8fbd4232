package ike

import "time"

// What messages of strangers are let through a second: of each kind as many as
// cost, all together, a few percent of a processor.
const (
	// cheapRepliesPerSecond are answers that cost neither a private key nor a promise:
	// message 2 of main mode, and IKEv2's cookies.
	cheapRepliesPerSecond = 1000
	// dhPerSecond are Diffie-Hellman exchanges, those for whom nothing has
	// been heard of before and those for whom a cookie shows that it hears us: so
	// none of the former takes the latter's.
	dhPerSecond = 20
)

// rateLimiter is a token bucket that holds a second's tokens. The zero value is full.
// What comes in excess is dropped evenly and not from the start of each second on:
// retransmissions, which come after whole seconds, would else all be dropped or none.
type rateLimiter struct {
	fullAt time.Time // when it is, if nothing more is taken
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
