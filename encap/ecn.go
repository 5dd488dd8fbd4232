package encap

import "ipipd/internal/ipv4"

// RFC 6040 in full: at encapsulation the normal mode, which copies the inner
// codepoint to the outer header (section 4.1), so that routers on the underlay
// can mark instead of drop; at decapsulation the table of section 4.2.
//
// Linux ipip differs at encapsulation: it sends an inner CE as outer ECT(0)
// (the full-functionality mode of RFC 3168). Either may stand at the other end:
// the table below gives CE for an inner CE whatever the outer header says.

// ecnDrop stands in the table for "drop the packet".
const ecnDrop ipv4.ECN = 0xff

// decapsulatedECN is RFC 6040, figure 4: [inner][outer] → the codepoint that
// the packet goes on with. The combinations that the RFC calls currently unused
// (inner Not-ECT under outer ECT(1), inner ECT(1) under ECT(0), and CE under
// ECT(1), among others) go on as the table says, unlogged: the RFC leaves an
// alarm optional, and nothing is logged packet by packet.
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

// DecapsulatedECN is the codepoint that a packet leaves the tunnel with; ok is
// false if it must be dropped instead. It is exported so that a carrier of the
// same rule elsewhere can be tested against it case by case.
func DecapsulatedECN(inner, outer ipv4.ECN) (ecn ipv4.ECN, ok bool) {
	ecn = decapsulatedECN[inner&3][outer&3]
	return ecn, ecn != ecnDrop
}
