package ike

import (
	"sync"
	"time"
)

// Limits bound the cost of unauthenticated messages. Peers with the same Limits share one bound, so that forging
// the addresses of a tunnel's many remotes can cause no more cost than forging one. The zero value is ready. It
// is safe for concurrent use.
type Limits struct {
	mu           sync.Mutex
	cheapReplies rateLimiter // before return routability is shown
	unverifiedDH rateLimiter // Diffie-Hellman exchanges before return routability is shown
	verifiedDH   rateLimiter // Diffie-Hellman exchanges after it, of all Peers
	unverifiedV1 unverifiedV1
}

func (l *Limits) allowCheapReply(now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.cheapReplies.allow(now, cheapRepliesPerSecond)
}

func (l *Limits) allowUnverifiedDH(now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.unverifiedDH.allow(now, dhPerSecond)
}

func (l *Limits) allowVerifiedDH(now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.verifiedDH.allow(now, sharedDHPerSecond)
}

// allowVerifiedDH reports whether an initiator that has shown return routability gets a Diffie-Hellman exchange. Each
// peer has a limit of its own, so that none uses up the limit of all.
func (p *Peer) allowVerifiedDH() bool {
	return p.verifiedDH.allow(p.now, dhPerSecond) && p.cfg.Limits.allowVerifiedDH(p.now)
}

// IsFirstMessage reports whether a message, without the non-ESP marker, begins a negotiation: the first one of
// IKE_SA_INIT or of main mode.
func IsFirstMessage(b []byte) bool {
	h, err := parseHeader(b)
	return err == nil && h.isFirst()
}

func (h header) isFirst() bool {
	if h.initiator == (ikeSPI{}) || h.responder != (ikeSPI{}) || h.id != 0 {
		return false
	}
	switch h.version >> 4 {
	case version1 >> 4:
		return h.exchange == exchangeMain && h.flags&flagEncrypted == 0
	case version2 >> 4:
		return h.exchange == exchangeInit && h.flags&(flagInitiator|flagResponse) == flagInitiator
	}
	return false
}
