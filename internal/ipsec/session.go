package ipsec

import (
	"fmt"
	"net/netip"
	"sync/atomic"
	"time"

	"ipipd/internal/ipsec/esp"
	"ipipd/internal/ipsec/ike"
	"ipipd/internal/packet"
)

// Session is the gate of one tunnel. Seal, Established and MaxInner may be
// called by any number of goroutines.
type Session struct {
	outbound   atomic.Pointer[esp.Outbound]
	drops      [esp.NumDrops]atomic.Uint64
	status     atomic.Pointer[Status]
	espFormat  atomic.Pointer[espFormat]
	negotiator *negotiator
}

// Seal encrypts the outer packet in b, of protocol 4, in place. Unless it returns
// esp.DropNone, b must not be sent.
func (p *Session) Seal(b *packet.Buffer) esp.Drop {
	for {
		o, d := p.outbound.Load(), esp.DropNoSA
		if o != nil {
			d = o.Seal(b)
		}
		if d == esp.DropExhausted && p.outbound.Load() != o {
			continue // closed after it was loaded; b is as it was
		}
		if d != esp.DropNone {
			p.drops[d].Add(1)
		}
		return d
	}
}

// Plain counts a packet from the remote that was not encrypted, and is its Drop.
func (p *Session) Plain() esp.Drop {
	p.drops[esp.DropPlain].Add(1)
	return esp.DropPlain
}

// Established reports whether the gate is open: whether there is an SA to send by.
func (p *Session) Established() bool { return p.outbound.Load() != nil }

// MaxInner is the largest inner packet over a path with that MTU. While there is no
// SA it is that of the last one, and before the first that of the proposal that
// leaves least.
func (p *Session) MaxInner(mtu int) int { return p.espFormat.Load().maxInner(mtu) }

// MaxInner is what Session.MaxInner is before the first SA.
func MaxInner(cfg Config, mtu int) int { return worstCaseFormat(cfg.Config).maxInner(mtu) }

// espFormat is what an ESP packet looks like.
type espFormat struct {
	suite esp.Suite
	udp   bool
}

func (f espFormat) maxInner(mtu int) int { return f.suite.MaxInner(mtu, f.udp) }

// worstCaseFormat is the form on offer that leaves the least room.
func worstCaseFormat(cfg ike.Config) espFormat {
	ps := cfg.Phase2
	if ps == nil {
		ps, _ = ike.ParsePhase2(ike.DefaultPhase2)
	}
	worst := espFormat{esp.Suite{Cipher: esp.AESCBC, KeyBits: 128, Integrity: esp.HMACSHA1}, cfg.ForceUDP}
	for _, p := range ps {
		f := espFormat{esp.Suite{Cipher: p.Cipher, KeyBits: p.KeyBits, Integrity: p.Hash}, cfg.ForceUDP}
		if f.suite.Validate() == nil && f.maxInner(1500) < worst.maxInner(1500) {
			worst = f
		}
	}
	return worst
}

// Drops gives each reason and how many packets it has cost.
func (p *Session) Drops(yield func(esp.Drop, uint64) bool) {
	for d := range p.drops {
		if n := p.drops[d].Load(); n > 0 && !yield(esp.Drop(d), n) {
			return
		}
	}
}

// Status is what an operator is shown of a Session. It holds no secret.
type Status struct {
	// Established: packets are sent and received, encrypted.
	Established bool
	Suite       esp.Suite
	// Group of the last Diffie-Hellman exchange; 0 for none.
	Group ike.Group
	// Version of IKE, 1 or 2.
	Version int
	// UDP: ESP is wrapped in UDP, because of a NAT.
	UDP bool
	// InboundSPI and OutboundSPI in host byte order.
	InboundSPI, OutboundSPI uint32
	Since, RekeyAt          time.Time
	// Weak names algorithms that should be used only where the peer has no better.
	Weak string
	// Problem is what keeps the gate closed; "" is nothing that is known.
	Problem string
}

// Status is the present state.
func (p *Session) Status() Status {
	if s := p.status.Load(); s != nil {
		return *s
	}
	return Status{}
}

// Describe is the status in one line: established aes-256-cbc/sha1 modp2048, rekey in 11m.
func (s Status) Describe(now time.Time) string {
	if !s.Established {
		if s.Problem != "" {
			return "not established: " + s.Problem
		}
		return "negotiating"
	}
	text := fmt.Sprintf("established %s %s", s.Suite, s.Group)
	if s.UDP {
		text += " in UDP"
	}
	if left := s.RekeyAt.Sub(now); left > 0 {
		text += ", rekey in " + brief(left)
	} else {
		text += ", rekeying"
	}
	if s.Problem != "" {
		text += "; " + s.Problem
	}
	return text
}

func brief(d time.Duration) string {
	switch {
	case d >= time.Hour:
		return fmt.Sprintf("%dh%dm", int(d.Hours()), int(d.Minutes())%60)
	case d >= time.Minute:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	}
	return fmt.Sprintf("%ds", int(d.Seconds()))
}

// inboundSA is an SA that packets are opened with, and whose it is.
type inboundSA struct {
	*esp.Inbound
	owner *negotiator
	udp   bool
	port  atomic.Uint32 // the peer's UDP port of the last authentic packet
}

// saKey finds an inbound SA. The peer's address is part of it, so that no peer
// can be heard by another's SA.
type saKey struct {
	remote [4]byte
	local  [4]byte
	spi    uint32
}

// saTable is never changed, only replaced.
type saTable map[saKey]*inboundSA

// open opens the ESP packet in b, whole and of protocol 50, by the SA it belongs
// to. from is the UDP port it came from, 0 for none.
func (m *Manager) open(b *packet.Buffer, from uint16) bool {
	p := b.Bytes()
	spi, ok := esp.SPI(b)
	if !ok {
		m.drops[esp.DropMalformed].Add(1)
		return false
	}
	key := saKey{remote: [4]byte(p[12:16]), local: [4]byte(p[16:20]), spi: spi}
	sa := (*m.table.Load())[key]
	if sa == nil || sa.udp != (from != 0) {
		m.drops[esp.DropNoSA].Add(1)
		return false
	}
	switch d := sa.Open(b); {
	case d == esp.DropExhausted && (*m.table.Load())[key] != sa: // closed after it was found
		m.drops[esp.DropNoSA].Add(1)
		return false
	case d != esp.DropNone:
		sa.owner.session.drops[d].Add(1)
		return false
	}
	if from != 0 {
		sa.port.Store(uint32(from))
	}
	return true
}

func as4(a netip.Addr) [4]byte { return a.Unmap().As4() }
