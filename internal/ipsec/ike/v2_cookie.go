package ike

import (
	"crypto/sha256"
	"crypto/subtle"
	"time"
)

// cookieTime is how long cookies are made with a secret. They are taken for as long
// again, and that is several times what a peer takes to come back with one.
const cookieTime = time.Minute

// cookies are those of IKE_SA_INIT (RFC 7296 section 2.6): by returning one, the
// initiator shows that it hears us. Nothing is kept for a cookie but the secret that
// it was made with. The zero value is ready.
type cookies struct {
	secret, before [32]byte
	until          time.Time // secret is replaced then
}

// rotate replaces the secret if it is time to.
func (c *cookies) rotate(p *Peer) {
	if p.now.Before(c.until) {
		return
	}
	c.before = c.secret
	if c.until.IsZero() || !p.now.Before(c.until.Add(cookieTime)) {
		p.random(c.before[:]) // that one is too old as well
	}
	p.random(c.secret[:])
	c.until = p.now.Add(cookieTime)
}

// make is the cookie for an initiator with that nonce and SPI.
func (c *cookies) make(p *Peer, ni []byte, spi cookie) []byte {
	c.rotate(p)
	return cookieOf(c.secret, p, ni, spi)
}

// good reports whether the payloads have a cookie that was made for them.
func (c *cookies) good(p *Peer, ps []payload, ni []byte, spi cookie) (good bool) {
	notifications(ps, func(kind uint16, _, data []byte) {
		if kind != n2Cookie || good {
			return
		}
		c.rotate(p)
		good = subtle.ConstantTimeCompare(data, cookieOf(c.secret, p, ni, spi)) == 1 ||
			subtle.ConstantTimeCompare(data, cookieOf(c.before, p, ni, spi)) == 1
	})
	return good
}

// cookieOf hashes what makes an initiator: it need not be kept.
func cookieOf(secret [32]byte, p *Peer, ni []byte, spi cookie) []byte {
	ip := p.cfg.Remote.As4() // every message comes from there
	b := append(append(append(secret[:], ni...), ip[:]...), spi[:]...)
	sum := sha256.Sum256(b)
	return sum[:]
}
