package conformance

import (
	"encoding/binary"
	"fmt"
	"testing"

	"ipipd/internal/ipv4"
	"ipipd/test/netlab"
)

// syn is a TCP packet with these flags among SYN and ACK, with this MSS, and with
// a checksum that is right.
func syn(flags byte, mss uint16) netlab.Check {
	return netlab.All(netlab.Protocol(ipv4.ProtocolTCP), netlab.TransportChecksum(), func(p ipv4.Packet) error {
		tcp := p.Payload()
		if len(tcp) < 24 || tcp[13]&(flagSYN|flagACK) != flags {
			return fmt.Errorf("not a segment with the flags %#x", flags)
		}
		if tcp[20] != 2 || tcp[21] != 4 { // Linux puts the MSS first
			return fmt.Errorf("its first option is % x, want an MSS", tcp[20:22])
		}
		if got := binary.BigEndian.Uint16(tcp[22:]); got != mss {
			return fmt.Errorf("MSS is %d, want %d", got, mss)
		}
		return nil
	})
}

// disableTxChecksum makes the wire one of hardware that finishes no checksums, so
// that what is read off it has them: a stack leaves them open as long as it can,
// and the fast path does not touch them.
func disableTxChecksum(t *testing.T, ends ...*netlab.NS) {
	t.Helper()
	for _, ns := range ends {
		ns.Run("ethtool", "-K", "veth0", "tx", "off")
	}
}

const flagSYN, flagACK = 0x02, 0x10

// The MSS of a SYN and of a SYN-ACK that is received is lowered to the MTU of the
// tunnel less 40 (RFC 6691), behind the decapsulation, unless that is turned off.
// b has an MTU of 1480 and so offers 1440; a has one of 1300.
func TestMSS_clampedOnReceive(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name  string
		flags []string
		want  uint16
	}{
		{"as it comes", nil, 1260},
		{"yes", []string{"--clamp-tcp-mss", "yes"}, 1260},
		{"no", []string{"--clamp-tcp-mss", "no"}, 1440},
	} {
		t.Run(test.name, func(t *testing.T) {
			eachVariant(t, func(t *testing.T, c variant) {
				a, b := hosts(t)
				disableTxChecksum(t, a, b)
				wire := netlab.Capture(t, a, "veth0", func(f netlab.Frame) bool { return !f.Outgoing })
				c.upA(t, a, append([]string{"--mtu", "1300"}, test.flags...)...)
				c.upB(t, b)
				inside := netlab.CaptureReceived(t, a, "t0")

				transfer(t, b, a, innerA, 1<<10)
				wire.Await(netlab.Outer(netlab.Inner(syn(flagSYN, 1440))))
				inside.Await(syn(flagSYN, test.want))

				transfer(t, a, b, innerB, 1<<10)
				wire.Await(netlab.Outer(netlab.Inner(syn(flagSYN|flagACK, 1440))))
				inside.Await(syn(flagSYN|flagACK, test.want))
			})
		})
	}
}

// What is sent is left to the other end's clamp, and an MSS that is low enough to
// both.
func TestMSS_unchanged(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, b := hosts(t)
		disableTxChecksum(t, a, b)
		wire := netlab.Capture(t, a, "veth0", func(f netlab.Frame) bool { return f.Outgoing })
		c.upA(t, a)
		c.upB(t, b, "--mtu", "1300")
		into := netlab.CaptureReceived(t, a, "t0")
		transfer(t, a, b, innerB, 1<<10)
		wire.Await(netlab.Outer(netlab.Inner(syn(flagSYN, 1440))))
		into.Await(syn(flagSYN|flagACK, 1260))
	})
}
