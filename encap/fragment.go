package encap

import (
	"ipipd/internal/drop"
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
)

// Fragmentation (RFC 791, sections 2.3 and 3.2), for packets that the kernel does not fragment:
// a raw socket with IP_HDRINCL and a packet socket refuse packets longer than the device's MTU,
// whatever their DF.

// FragmentCount returns the number of fragments of p for an MTU of mtu bytes: 1 if p fits, 0 if
// it cannot be fragmented.
func FragmentCount(p ipv4.Packet, mtu int) int {
	if p.TotalLen() <= mtu {
		return 1
	}
	payload := len(p.Payload())
	first := fragmentPayload(mtu, p.HeaderLen())
	if p.DF() || first == 0 {
		return 0
	}
	var options [40]byte
	later := fragmentPayload(mtu, ipv4.HeaderLen+copiedOptions(&options, p.Options()))
	if payload <= first {
		return 1
	}
	return 1 + (payload-first+later-1)/later
}

// Fragment fragments p for an MTU of mtu bytes and fills into[:n] in order; a p that fits is
// copied. The first fragment has all options of p, the others those with the copied flag. If p
// is a fragment itself, offsets continue from its own, and only the fragment that ends where the
// original packet ends has MF=0.
//
// No buffer of into may share memory with p; each must have room for mtu bytes. If p does not
// fit and has DF=1, Fragment returns drop.TooBig; if into has too few (FragmentCount) or too
// small buffers, or mtu leaves less than 8 bytes of payload, drop.FragmentFailed. On a drop.Reason n is
// 0.
func Fragment(into []*packet.Buffer, p ipv4.Packet, mtu int) (n int, d drop.Reason) {
	if p.TotalLen() > mtu && p.DF() {
		return 0, drop.TooBig
	}
	count := FragmentCount(p, mtu)
	if count == 0 || count > len(into) {
		return 0, drop.FragmentFailed
	}
	if count == 1 {
		space := into[0].Space()
		if len(space) < p.TotalLen() {
			return 0, drop.FragmentFailed
		}
		into[0].SetLen(copy(space, p.Bytes()))
		return 1, drop.None
	}
	var copied [40]byte
	options := p.Options()
	header := p.Header()
	offset := header.FragmentOffset
	for rest := p.Payload(); len(rest) > 0; n++ {
		headerLen := ipv4.HeaderLen + len(options)
		size := min(len(rest), fragmentPayload(mtu, headerLen))
		space := into[n].Space()
		if len(space) < headerLen+size {
			return 0, drop.FragmentFailed
		}
		header.TotalLen = headerLen + size
		header.FragmentOffset = offset
		header.MF = size < len(rest) || p.MF()
		header.PutOptions(space, options)
		copy(space[headerLen:], rest[:size])
		into[n].SetLen(header.TotalLen)

		rest = rest[size:]
		offset += size
		if n == 0 {
			options = copied[:copiedOptions(&copied, options)]
		}
	}
	return n, drop.None
}

// fragmentPayload returns the payload length of a fragment that is not the last, in bytes:
// offsets are in units of 8 bytes.
func fragmentPayload(mtu, headerLen int) int { return max(mtu-headerLen, 0) &^ 7 }

// copiedOptions copies the options with the copied flag to to (RFC 791, section 3.1), pads them
// with end-of-list to a multiple of 4 bytes, and returns their length. A malformed option ends
// the list.
func copiedOptions(to *[40]byte, options []byte) (n int) {
	const (
		endOfList   = 0
		noOperation = 1
		copiedFlag  = 0x80
	)
	for len(options) > 0 && options[0] != endOfList {
		if options[0] == noOperation {
			options = options[1:]
			continue
		}
		if len(options) < 2 || options[1] < 2 || int(options[1]) > len(options) {
			break
		}
		size := int(options[1])
		if options[0]&copiedFlag != 0 {
			n += copy(to[n:], options[:size])
		}
		options = options[size:]
	}
	for n%4 != 0 {
		to[n] = endOfList
		n++
	}
	return n
}
