package ike

import (
	"crypto/sha256"
	"crypto/subtle"
	"time"
)

// cookieLifetime is how long a secret generates cookies. It verifies them for as long again,
// which is several times what an initiator needs to return one.
const cookieLifetime = time.Minute

// cookieSecrets generates and verifies the COOKIEs of IKE_SA_INIT (RFC 7296 section 2.6), which
// show return routability without keeping state per initiator. The zero value is ready to use.
type cookieSecrets struct {
	current, previous [32]byte
	rotateAt          time.Time // when current becomes previous
}

// rotate replaces the secret when it is due.
func (c *cookieSecrets) rotate(p *Peer) {
	if p.now.Before(c.rotateAt) {
		return
	}
	c.previous = c.current
	if c.rotateAt.IsZero() || !p.now.Before(c.rotateAt.Add(cookieLifetime)) {
		p.random(c.previous[:]) // the last one is too old as well
	}
	p.random(c.current[:])
	c.rotateAt = p.now.Add(cookieLifetime)
}

// generate returns the cookie for an initiator with that nonce and SPI.
func (c *cookieSecrets) generate(p *Peer, ni []byte, spi ikeSPI) []byte {
	c.rotate(p)
	return computeCookie(c.current, p, ni, spi)
}

// verify reports whether ps has a valid cookie.
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

// computeCookie hashes the secret with the initiator's nonce, address and SPI.
func computeCookie(secret [32]byte, p *Peer, ni []byte, spi ikeSPI) []byte {
	ip := p.cfg.Remote.As4() // Receive takes messages of this address only
	b := append(append(append(secret[:], ni...), ip[:]...), spi[:]...)
	sum := sha256.Sum256(b)
	return sum[:]
}
