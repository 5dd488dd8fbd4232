package ike

import (
	"crypto/sha256"
	"crypto/subtle"
	"time"
)

// cookieLifetime is how long cookies are made with a secret. They are taken for as long
// again, and that is several times what a peer takes to come back with one.
const cookieLifetime = time.Minute

// cookieSecrets are those of IKE_SA_INIT (RFC 7296 section 2.6): by returning one, the
// initiator shows that it hears us. Nothing is kept for a cookie but the secret that
// it was made with. The zero value is ready.
type cookieSecrets struct {
	current, previous [32]byte
	rotateAt          time.Time // secret is replaced then
}

// rotate replaces the secret if it is time to.
func (c *cookieSecrets) rotate(p *Peer) {
	if p.now.Before(c.rotateAt) {
		return
	}
	c.previous = c.current
	if c.rotateAt.IsZero() || !p.now.Before(c.rotateAt.Add(cookieLifetime)) {
		p.random(c.previous[:]) // that one is too old as well
	}
	p.random(c.current[:])
	c.rotateAt = p.now.Add(cookieLifetime)
}

// generate is the cookie for an initiator with that nonce and SPI.
func (c *cookieSecrets) generate(p *Peer, ni []byte, spi ikeSPI) []byte {
	c.rotate(p)
	return computeCookie(c.current, p, ni, spi)
}

// verify reports whether the payloads have a cookie that was made for them.
func (c *cookieSecrets) verify(p *Peer, ps []payload, ni []byte, spi ikeSPI) (valid bool) {
	eachNotify(ps, func(kind uint16, _, data []byte) {
		if kind != n2Cookie || valid {
			return
		}
		c.rotate(p)
		valid = subtle.ConstantTimeCompare(data, computeCookie(c.current, p, ni, spi)) == 1 ||
			subtle.ConstantTimeCompare(data, computeCookie(c.previous, p, ni, spi)) == 1
	})
	return valid
}

// computeCookie hashes what makes an initiator: it need not be kept.
func computeCookie(secret [32]byte, p *Peer, ni []byte, spi ikeSPI) []byte {
	ip := p.cfg.Remote.As4() // every message comes from there
	b := append(append(append(secret[:], ni...), ip[:]...), spi[:]...)
	sum := sha256.Sum256(b)
	return sum[:]
}
