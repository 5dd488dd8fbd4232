package encap

import (
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
)

// Fragmentation of RFC 791, sections 2.3 and 3.2, for where the kernel does not
// cut: a raw socket with IP_HDRINCL refuses what is longer than the MTU of the
// device, whatever DF says, and so does a packet socket.

// FragmentCount is how many fragments p makes on a path of mtu bytes: 1 if it
// fits, 0 if it cannot be cut.
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

// Fragment cuts p into fragments of at most mtu bytes, and fills into[:n] with
// them in order; a p that fits is copied as it is. Only the first fragment has
// all options of p, the others those that are marked to be copied. A p that is a
// fragment itself keeps its place: offsets count on from its own, and only what
// ends where the last fragment ends has MF=0.
//
// None of into may hold p's memory; each must have room for mtu bytes. With DF=1
// the answer is DropTooBig; DropFragmentFailed if into is too short (see
// FragmentCount), its buffers too small, or mtu leaves no 8 bytes of payload. A
// Drop means n is 0.
func Fragment(into []*packet.Buffer, p ipv4.Packet, mtu int) (n int, d Drop) {
	if p.TotalLen() > mtu && p.DF() {
		return 0, DropTooBig
	}
	count := FragmentCount(p, mtu)
	if count == 0 || count > len(into) {
		return 0, DropFragmentFailed
	}
	if count == 1 {
		space := into[0].Space()
		if len(space) < p.TotalLen() {
			return 0, DropFragmentFailed
		}
		into[0].SetLen(copy(space, p.Bytes()))
		return 1, DropNone
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
			return 0, DropFragmentFailed
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
	return n, DropNone
}

// fragmentPayload is how many payload bytes a fragment with more behind it can
// carry: offsets count units of 8 bytes.
func fragmentPayload(mtu, headerLen int) int { return max(mtu-headerLen, 0) &^ 7 }

// copiedOptions writes those of options into to whose copied flag is set, as
// every fragment must have them (RFC 791, section 3.1), pads them with
// end-of-list to a multiple of 4, and returns their length. What cannot be read
// as an option ends the list.
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
