package ipsec

import (
	"fmt"
	"net/netip"
	"sync/atomic"
	"time"

	"ipipd/internal/drop"
	"ipipd/internal/ipsec/esp"
	"ipipd/internal/ipsec/ike"
	"ipipd/internal/packet"
)

// Session holds the outbound SA of one tunnel. Its methods may be called concurrently.
type Session struct {
	outbound   atomic.Pointer[esp.Outbound]
	dropped    func(why drop.Reason, n int) // Config.Dropped, for received packets
	tap        Tap                          // nil is none
	status     atomic.Pointer[Status]
	espFormat  atomic.Pointer[espFormat]
	negotiator *negotiator
	closed     atomic.Bool
	demanded   atomic.Bool // Demand was called since the negotiator last checked
}

// Seal encrypts the outer IPv4 packet of protocol 4 in b in place. Unless it returns
// drop.None the packet must not be sent.
func (s *Session) Seal(b *packet.Buffer) drop.Reason {
	for {
		o, d := s.outbound.Load(), drop.ESPNoSA
		if o != nil {
			d = o.Seal(b)
		}
		if d == drop.ESPExhausted && s.outbound.Load() != o {
			continue // the SA was closed after Load; b is unchanged
		}
		return d
	}
}

// Established reports whether there is an outbound SA.
func (s *Session) Established() bool { return s.outbound.Load() != nil }

// MaxInner returns the size in bytes of the largest inner packet over a path of this MTU.
// Without an SA the format of the last one counts, and before the first the proposal
// with the most overhead.
func (s *Session) MaxInner(mtu int) int { return s.espFormat.Load().maxInner(mtu) }

// MaxInner returns what Session.MaxInner returns before the first SA.
func MaxInner(cfg Config, mtu int) int { return worstCaseFormat(cfg.Config).maxInner(mtu) }

// espFormat determines the overhead of an ESP packet.
type espFormat struct {
	suite esp.Suite
	udp   bool // UDP encapsulation
}

func (f espFormat) maxInner(mtu int) int { return f.suite.MaxInner(mtu, f.udp) }

// worstCaseFormat returns the format with the most overhead among the proposals.
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

// Status is the state of a Session as shown to an operator. It contains no secret.
type Status struct {
	// Established: there is an outbound SA. Unless it is set, only Problem is valid.
	Established bool
	Suite       esp.Suite
	// Group of the last Diffie-Hellman exchange; 0 is none (no PFS).
	Group ike.Group
	// Version of IKE, 1 or 2.
	Version int
	// UDP: ESP is encapsulated in UDP (RFC 3948), because of a NAT.
	UDP bool
	// InboundSPI and OutboundSPI are in host byte order.
	InboundSPI, OutboundSPI uint32
	Since, RekeyAt          time.Time
	// Weak names the deprecated algorithms of the SA; "" if there are none.
	Weak string
	// Problem is why there is no SA, or why it does not work; "" if unknown.
	Problem string
	// NoESP: ESP is sent, but none has been received by the SA.
	NoESP bool
}

// Status returns the current state.
func (s *Session) Status() Status {
	if status := s.status.Load(); status != nil {
		return *status
	}
	return Status{}
}

// Describe formats the status in one line: established aes-256-cbc/sha1 modp2048, rekey in 11m.
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
		text += ", rekey in " + formatDuration(left)
	} else {
		text += ", rekeying"
	}
	if s.Problem != "" {
		text += "; " + s.Problem
	}
	return text
}

func formatDuration(d time.Duration) string {
	switch {
	case d >= time.Hour:
		return fmt.Sprintf("%dh%dm", int(d.Hours()), int(d.Minutes())%60)
	case d >= time.Minute:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	}
	return fmt.Sprintf("%ds", int(d.Seconds()))
}

// inboundSA is an inbound SA and the tunnel that it belongs to.
type inboundSA struct {
	*esp.Inbound
	owner *negotiator
	udp   bool          // accepts only UDP-encapsulated ESP (RFC 3948); if false, only ESP without UDP
	port  atomic.Uint32 // the peer's UDP port in the last authenticated packet

	// Owned by the negotiator: the outbound SA of the same child SA, nil unless it is used or may be again, and
	// its Counters, which outlive it.
	outbound *esp.Outbound
	counters []atomic.Uint64
}

// saKey identifies an inbound SA. It includes the peer's address, so that no peer can
// send by the SA of another.
type saKey struct {
	remote [4]byte
	local  [4]byte
	spi    uint32
}

// saTable is copied on write: open reads it without a lock.
type saTable map[saKey]*inboundSA

// open authenticates and decrypts the IPv4 packet of protocol 50 in b, in place. from is
// the source port if ESP was encapsulated in UDP, and else 0. It reports whether b is to
// be delivered; others are reported to Options.Dropped or Config.Dropped. kept is the buffer
// for the copy that a capture gets of the encrypted packet.
func (m *Manager) open(b *packet.Buffer, from uint16, kept *[]byte) bool {
	p := b.Bytes()
	spi, d := esp.SPI(b)
	if d != drop.None {
		m.dropped(d, p)
		return false
	}
	key := saKey{remote: [4]byte(p[12:16]), local: [4]byte(p[16:20]), spi: spi}
	sa := (*m.table.Load())[key]
	if sa == nil || sa.udp != (from != 0) {
		if sa == nil && len(*m.listeners.Load()) > 0 {
			m.wants(tunnelKey{netip.AddrFrom4(key.local), netip.AddrFrom4(key.remote)}, true)
		}
		m.dropped(drop.ESPNoSA, p)
		return false
	}
	session := sa.owner.session
	captured := session.tap != nil && session.tap.Wants()
	if captured {
		*kept = append((*kept)[:0], p...)
	}
	d = sa.Open(b)
	if d == drop.ESPExhausted && (*m.table.Load())[key] != sa { // removed after the lookup
		m.dropped(drop.ESPNoSA, p)
		return false
	}
	if captured {
		b.CaptureID = session.tap.Received(*kept, d)
	}
	if d != drop.None {
		session.dropped(d, 1)
		return false
	}
	if from != 0 {
		sa.port.Store(uint32(from))
	}
	return true
}

func as4(a netip.Addr) [4]byte { return a.Unmap().As4() }
