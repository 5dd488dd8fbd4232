package encap

import "ipipd/internal/ipv4"

// RFC 6040. Encapsulation uses the normal mode (section 4.1), which copies the inner codepoint
// to the outer header, so that underlay routers can mark instead of drop. Decapsulation uses the
// table of section 4.2.
//
// Linux ipip differs at encapsulation: it sends an inner CE as outer ECT(0) (the
// full-functionality mode of RFC 3168). That interoperates: an inner CE stays CE, whatever the
// outer header has.

// ecnDrop marks the combinations that are dropped.
const ecnDrop ipv4.ECN = 0xff

// decapsulatedECN is RFC 6040, figure 4: [inner][outer] is the codepoint of the forwarded
// packet. The RFC's "currently unused" combinations are forwarded as the table says and not
// logged: its alarm is optional, and nothing is logged per packet.
var decapsulatedECN = [4][4]ipv4.ECN{
	ipv4.NotECT: {
		ipv4.NotECT: ipv4.NotECT, ipv4.ECT0: ipv4.NotECT, ipv4.ECT1: ipv4.NotECT, ipv4.CE: ecnDrop,
	},
	ipv4.ECT0: {
		ipv4.NotECT: ipv4.ECT0, ipv4.ECT0: ipv4.ECT0, ipv4.ECT1: ipv4.ECT1, ipv4.CE: ipv4.CE,
	},
	ipv4.ECT1: {
		ipv4.NotECT: ipv4.ECT1, ipv4.ECT0: ipv4.ECT1, ipv4.ECT1: ipv4.ECT1, ipv4.CE: ipv4.CE,
	},
	ipv4.CE: {
		ipv4.NotECT: ipv4.CE, ipv4.ECT0: ipv4.CE, ipv4.ECT1: ipv4.CE, ipv4.CE: ipv4.CE,
	},
}

// DecapsulatedECN returns the codepoint of a decapsulated packet; ok is false if it must be
// dropped. It is exported to test the eBPF implementation against it.
func DecapsulatedECN(inner, outer ipv4.ECN) (ecn ipv4.ECN, ok bool) {
	ecn = decapsulatedECN[inner&3][outer&3]
	return ecn, ecn != ecnDrop
}
