// Package packet has the buffer that a packet travels the data path in: one
// piece of memory with room in front for the headers that encapsulation adds,
// and what the kernel said about the packet's checksum and segmentation.
//
// It is to ipipd what an sk_buff is to Linux, reduced to what a tunnel needs:
// Push and Pull move the start of the packet, Trim its end, and nothing is
// copied on the way from one door to the other.
package packet

// Headroom is how many bytes a Buffer keeps free in front of the packet that a
// door reads into it: an Ethernet header (14), the outer IPv4 header (20), and
// UDP, ESP and its longest IV (8+8+16) for a protected tunnel, rounded up to
// two cache lines.
const Headroom = 128

// Tailroom is how many bytes a Buffer keeps free behind the largest packet it
// was made for: ESP's padding, its trailer and its longest ICV.
const Tailroom = 64

// MaxSize is the largest packet: IPv4's total length is 16 bits.
const MaxSize = 65535

// Checksum says what is known of the transport checksum of a packet.
type Checksum uint8

const (
	// ChecksumUnknown: the field is there and nobody has verified it.
	ChecksumUnknown Checksum = iota
	// ChecksumPartial: the field holds the sum of the pseudo-header only, as
	// the kernel leaves it for hardware to finish (CHECKSUM_PARTIAL).
	ChecksumPartial
	// ChecksumValid: the field was verified, or computed by us.
	ChecksumValid
)

// Offload is what travels with a packet beside its bytes. The zero value is an
// ordinary packet of unknown checksum.
type Offload struct {
	// Checksum is about the TCP or UDP checksum of the IPv4 packet that the
	// Buffer holds, or, while that is an outer packet, of its inner packet.
	Checksum Checksum
	// SegmentSize is, for a superpacket, the bytes of TCP or UDP payload that
	// each segment it stands for carries; 0 for a packet that stands for itself.
	// A superpacket's Checksum is always ChecksumPartial.
	SegmentSize uint16
}

// Buffer is one packet of a batch. A door's Read fills it, the data path moves
// its ends, the other door's Write sends it. Whoever holds a Buffer owns its
// memory; a door keeps no reference to it after Read or Write has returned.
type Buffer struct {
	mem        []byte
	start, end int
	Offload
}

// New returns an empty Buffer that has room for a packet of size bytes behind
// Headroom and in front of Tailroom.
func New(size int) *Buffer {
	return &Buffer{mem: make([]byte, Headroom+size+Tailroom), start: Headroom, end: Headroom}
}

// NewBatch returns n empty Buffers with room for size bytes each, cut from one
// piece of memory.
func NewBatch(n, size int) []*Buffer {
	stride := Headroom + size + Tailroom
	mem := make([]byte, n*stride)
	buffers := make([]Buffer, n)
	batch := make([]*Buffer, n)
	for i := range batch {
		buffers[i] = Buffer{mem: mem[i*stride : (i+1)*stride : (i+1)*stride], start: Headroom, end: Headroom}
		batch[i] = &buffers[i]
	}
	return batch
}

// Bytes is the packet. It stays valid, and shares the Buffer's memory, until
// the Buffer is filled again.
func (b *Buffer) Bytes() []byte { return b.mem[b.start:b.end] }

// Len is the packet's length in bytes.
func (b *Buffer) Len() int { return b.end - b.start }

// Space empties the Buffer and returns the memory that a packet can be read
// into: all that is behind Headroom, Tailroom excepted. SetLen says afterwards
// how much of it was filled.
func (b *Buffer) Space() []byte {
	b.start, b.end = Headroom, Headroom
	b.Offload = Offload{}
	end := len(b.mem) - Tailroom
	return b.mem[Headroom:end:end]
}

// SetLen makes the packet the n bytes from its present start. It panics if the
// Buffer has no room for them.
func (b *Buffer) SetLen(n int) {
	_ = b.mem[b.start : b.start+n]
	b.end = b.start + n
}

// Set makes the packet a copy of p, as if it had just been read. It panics if the
// Buffer has no room for it.
func (b *Buffer) Set(p []byte) {
	b.SetLen(copy(b.Space()[:len(p)], p))
}

// Push grows the packet by n bytes at its front, and returns those, with
// whatever they held before. It panics if there is no headroom left.
func (b *Buffer) Push(n int) []byte {
	b.start -= n
	return b.mem[b.start : b.start+n : b.start+n]
}

// Headroom is how many bytes Push can give.
func (b *Buffer) Headroom() int { return b.start }

// Tailroom is by how many bytes SetLen can lengthen the packet.
func (b *Buffer) Tailroom() int { return len(b.mem) - b.end }

// Pull takes n bytes off the packet's front. It panics if it has fewer.
func (b *Buffer) Pull(n int) {
	if n > b.Len() {
		panic("packet: Pull beyond the end")
	}
	b.start += n
}

// Trim cuts the packet down to its first n bytes. It panics if it has fewer.
func (b *Buffer) Trim(n int) {
	if n > b.Len() {
		panic("packet: Trim beyond the end")
	}
	b.end = b.start + n
}
