package ike

import "time"

// What messages of strangers are let through a second: of each kind as many as
// cost, all together, a few percent of a processor.
const (
	// offersPerSecond are answers that cost neither a private key nor a promise:
	// message 2 of main mode, and IKEv2's cookies.
	offersPerSecond = 1000
	// exchangesPerSecond are Diffie-Hellman exchanges, those for whom nothing has
	// been heard of before and those for whom a cookie shows that it hears us: so
	// none of the former takes the latter's.
	exchangesPerSecond = 20
)

// budget is a token bucket that holds a second's tokens. The zero value is full.
// What comes in excess is dropped evenly and not from the start of each second on:
// retransmissions, which come after whole seconds, would else all be dropped or none.
type budget struct {
	full time.Time // when it is, if nothing more is taken
}

// take takes a token, if there is one.
func (b *budget) take(now time.Time, perSecond int) bool {
	if b.full.Before(now) {
		b.full = now
	}
	next := b.full.Add(time.Second / time.Duration(perSecond))
	if next.Sub(now) > time.Second {
		return false
	}
	b.full = next
	return true
}
