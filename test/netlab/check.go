package netlab

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"ipipd/internal/ipv4"
)

// Check tests an IPv4 packet; its error says how the packet differs. Checks compose:
//
//	netlab.Outer(netlab.TTL(255), netlab.DF(false), netlab.Inner(netlab.TTL(64)))
type Check func(p ipv4.Packet) error

// Match applies checks to the IPv4 packet at the start of b and returns all failures. The
// header checksum must be valid too.
func Match(b []byte, checks ...Check) error {
	p, err := ipv4.Parse(b)
	if err != nil {
		return fmt.Errorf("%d bytes that are not an IPv4 packet: %w", len(b), err)
	}
	var errs []error
	if !p.HeaderChecksumValid() {
		errs = append(errs, errors.New("header checksum is wrong"))
	}
	for _, check := range checks {
		if err := check(p); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Assert reports the checks that the packet at the start of b fails.
func Assert(t testing.TB, b []byte, checks ...Check) {
	t.Helper()
	if err := Match(b, checks...); err != nil {
		t.Errorf("%s: %v", Describe(b), err)
	}
}

// Outer matches an unfragmented outer packet: protocol 4, no options. Use All for fragments.
func Outer(checks ...Check) Check {
	return All(append([]Check{Protocol(ipv4.ProtocolIPIP), HeaderLen(20), Fragmented(false)}, checks...)...)
}

// Inner applies checks to the IPv4 packet in the payload.
func Inner(checks ...Check) Check {
	return func(p ipv4.Packet) error {
		if err := Match(p.Payload(), checks...); err != nil {
			return fmt.Errorf("inner: %w", err)
		}
		return nil
	}
}

// All passes if every one of checks does.
func All(checks ...Check) Check {
	return func(p ipv4.Packet) error {
		var errs []error
		for _, check := range checks {
			errs = append(errs, check(p))
		}
		return errors.Join(errs...)
	}
}

// Not passes if at least one of checks fails.
func Not(checks ...Check) Check {
	all := All(checks...)
	return func(p ipv4.Packet) error {
		if all(p) == nil {
			return errors.New("matches what it must not match")
		}
		return nil
	}
}

// equal compares a header field.
func equal[T comparable](name string, field func(ipv4.Packet) T, want T) Check {
	return func(p ipv4.Packet) error {
		if got := field(p); got != want {
			return fmt.Errorf("%s is %v, want %v", name, got, want)
		}
		return nil
	}
}

// TTL is the time to live.
func TTL(want uint8) Check { return equal("TTL", ipv4.Packet.TTL, want) }

// TOS is DSCP and ECN in one byte.
func TOS(want uint8) Check { return equal("TOS", ipv4.Packet.TOS, want) }

// DSCP is the upper six bits of the TOS byte, 0 to 63.
func DSCP(want uint8) Check { return equal("DSCP", ipv4.Packet.DSCP, want) }

// ECN is the lower two bits of the TOS byte.
func ECN(want ipv4.ECN) Check { return equal("ECN", ipv4.Packet.ECN, want) }

// DF is the don't-fragment flag.
func DF(want bool) Check { return equal("DF", ipv4.Packet.DF, want) }

// MF is the more-fragments flag.
func MF(want bool) Check { return equal("MF", ipv4.Packet.MF, want) }

// ID is the identification.
func ID(want uint16) Check { return equal("ID", ipv4.Packet.ID, want) }

// FragmentOffset is the fragment offset in bytes.
func FragmentOffset(want int) Check {
	return equal("fragment offset", ipv4.Packet.FragmentOffset, want)
}

// Fragmented is whether the packet is a fragment: the first, the last, or between.
func Fragmented(want bool) Check {
	return equal("being a fragment", func(p ipv4.Packet) bool { return p.MF() || p.FragmentOffset() != 0 }, want)
}

// Protocol is the number of the payload's protocol.
func Protocol(want uint8) Check { return equal("protocol", ipv4.Packet.Protocol, want) }

// HeaderLen is the header length in bytes: more than 20 with options.
func HeaderLen(want int) Check { return equal("header length", ipv4.Packet.HeaderLen, want) }

// TotalLen is the total length in bytes.
func TotalLen(want int) Check { return equal("total length", ipv4.Packet.TotalLen, want) }

// MaxTotalLen is an upper bound of the total length in bytes.
func MaxTotalLen(want int) Check {
	return func(p ipv4.Packet) error {
		if p.TotalLen() > want {
			return fmt.Errorf("total length is %d, want at most %d", p.TotalLen(), want)
		}
		return nil
	}
}

// Source is the source address, in dotted notation.
func Source(want string) Check { return address("source", ipv4.Packet.Source, want) }

// Destination is the destination address, in dotted notation.
func Destination(want string) Check { return address("destination", ipv4.Packet.Destination, want) }

func address(name string, field func(ipv4.Packet) [4]byte, want string) Check {
	addr := func(p ipv4.Packet) netip.Addr { return netip.AddrFrom4(field(p)) }
	return equal(name, addr, netip.MustParseAddr(want))
}

// Payload is the bytes after the header.
func Payload(want []byte) Check {
	return func(p ipv4.Packet) error {
		if got := p.Payload(); !slices.Equal(got, want) {
			return fmt.Errorf("payload is % x, want % x", got, want)
		}
		return nil
	}
}

// ICMP is an ICMP message of that type and code with a valid checksum.
func ICMP(wantType, wantCode uint8) Check {
	return func(p ipv4.Packet) error {
		b := p.Payload()
		switch {
		case p.Protocol() != ipv4.ProtocolICMP || len(b) < 8:
			return fmt.Errorf("protocol is %d with %d bytes of payload, want an ICMP message", p.Protocol(), len(b))
		case b[0] != wantType || b[1] != wantCode:
			return fmt.Errorf("ICMP type and code are %d/%d, want %d/%d", b[0], b[1], wantType, wantCode)
		case ipv4.Checksum(b, 0) != 0:
			return errors.New("ICMP checksum is wrong")
		}
		return nil
	}
}

// TransportChecksum checks that an unfragmented TCP or UDP packet has a valid checksum, not a
// partial one (of the pseudo-header only).
func TransportChecksum() Check {
	return func(p ipv4.Packet) error {
		b := p.Payload()
		udp := p.Protocol() == ipv4.ProtocolUDP
		if !udp && p.Protocol() != ipv4.ProtocolTCP {
			return fmt.Errorf("protocol is %d, want TCP or UDP", p.Protocol())
		}
		if udp && len(b) >= 8 && b[6] == 0 && b[7] == 0 {
			return nil // RFC 768: the sender made none
		}
		pseudo := ipv4.PseudoHeaderSum(p.Source(), p.Destination(), p.Protocol(), len(b))
		if ipv4.Checksum(b, pseudo) != 0 {
			return errors.New("transport checksum is wrong")
		}
		return nil
	}
}

// Describe returns one line about an IPv4 packet and the ones inside it, for failures.
func Describe(b []byte) string {
	p, err := ipv4.Parse(b)
	if err != nil {
		return fmt.Sprintf("{%d bytes: %v}", len(b), err)
	}
	s := fmt.Sprintf("{%v > %v proto %d len %d ttl %d tos %#02x id %d", netip.AddrFrom4(p.Source()), netip.AddrFrom4(p.Destination()),
		p.Protocol(), p.TotalLen(), p.TTL(), p.TOS(), p.ID())
	if p.DF() {
		s += " DF"
	}
	if p.MF() || p.FragmentOffset() != 0 {
		return s + fmt.Sprintf(" fragment at %d, MF %v}", p.FragmentOffset(), p.MF())
	}
	switch payload := p.Payload(); {
	case p.Protocol() == ipv4.ProtocolIPIP && len(payload) > 0:
		s += " " + Describe(payload)
	case p.Protocol() == ipv4.ProtocolICMP && len(payload) >= 2:
		s += fmt.Sprintf(" ICMP %d/%d", payload[0], payload[1])
	}
	return s + "}"
}
