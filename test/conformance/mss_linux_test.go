package conformance

import (
	"encoding/binary"
	"fmt"
	"testing"

	"ipipd/internal/ipv4"
	"ipipd/test/netlab"
)

// syn checks for a TCP segment with exactly these of SYN and ACK, that MSS, and a valid
// checksum.
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

// disableTxChecksum turns off checksum offload, so that captured packets have complete
// checksums: the fast path leaves partial ones as they are.
func disableTxChecksum(t *testing.T, ends ...*netlab.NS) {
	t.Helper()
	for _, ns := range ends {
		ns.Run("ethtool", "-K", "veth0", "tx", "off")
	}
}

const flagSYN, flagACK = 0x02, 0x10

// The MSS of received SYNs and SYN-ACKs is lowered to the tunnel's MTU less 40 (RFC 6691),
// unless that is turned off. b has an MTU of 1480 and so offers 1440; a has one of 1300.
func TestMSS_clampedOnReceive(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name  string
		flags []string
		want  uint16
	}{
		{"default", nil, 1260},
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

// The MSS of sent segments is not clamped, and one that is low enough is not raised.
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
