// Package packet has the buffer of a packet on the data path: one piece of memory with headroom
// for the headers that encapsulation adds, and the packet's offload metadata.
//
// It is a minimal sk_buff: Push and Pull move the start of the packet, Trim its end, and the
// packet is not copied between the TUN side and the underlay side.
package packet

// Headroom is how many bytes a Buffer reserves before a packet read into it: an Ethernet header
// (14), the outer IPv4 header (20), and UDP, ESP and its longest IV (8+8+16) for an encrypted
// tunnel, rounded up to two cache lines.
const Headroom = 128

// Tailroom is how many bytes a Buffer reserves after its largest packet: ESP's padding, trailer
// and longest ICV.
const Tailroom = 64

// MaxSize is the length of the largest packet, in bytes: IPv4's total length has 16 bits.
const MaxSize = 65535

// Checksum is the state of a packet's transport checksum, as skb->ip_summed.
type Checksum uint8

const (
	// ChecksumUnknown: complete, but not verified (CHECKSUM_NONE).
	ChecksumUnknown Checksum = iota
	// ChecksumPartial: the field holds only the pseudo-header sum, for the NIC to complete
	// (CHECKSUM_PARTIAL).
	ChecksumPartial
	// ChecksumValid: verified, or computed by us (CHECKSUM_UNNECESSARY).
	ChecksumValid
)

// Offload is a packet's offload metadata. The zero value is an ordinary packet with an
// unverified checksum.
type Offload struct {
	// Checksum is about the TCP or UDP checksum of the IPv4 packet in the Buffer, or, if that is
	// an outer packet, of its inner packet.
	Checksum Checksum
	// SegmentSize is the TCP or UDP payload of each segment of a superpacket (gso_size), in
	// bytes; 0 if the packet is not a superpacket. A superpacket's Checksum is ChecksumPartial.
	SegmentSize uint16
}

// Buffer is one packet of a batch. The holder of a Buffer owns its memory: Read and Write, on
// either side, keep no reference to it after they return.
type Buffer struct {
	mem        []byte
	start, end int
	Offload
	// CaptureID is the same for the inner and the outer packet in captures; 0 if it is not captured.
	CaptureID uint32
}

// New returns an empty Buffer for packets of up to size bytes, plus Headroom and Tailroom.
func New(size int) *Buffer {
	return &Buffer{mem: make([]byte, Headroom+size+Tailroom), start: Headroom, end: Headroom}
}

// NewBatch returns n empty Buffers for packets of up to size bytes, in one allocation of memory.
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

// Bytes returns the packet. It shares the Buffer's memory, and is valid until the Buffer is
// filled again.
func (b *Buffer) Bytes() []byte { return b.mem[b.start:b.end] }

// Len returns the packet's length in bytes.
func (b *Buffer) Len() int { return b.end - b.start }

// Space empties the Buffer and returns the memory to read a packet into: all between Headroom
// and Tailroom. SetLen must follow with the number of bytes read.
func (b *Buffer) Space() []byte {
	b.start, b.end = Headroom, Headroom
	b.Offload, b.CaptureID = Offload{}, 0
	end := len(b.mem) - Tailroom
	return b.mem[Headroom:end:end]
}

// SetLen sets the packet's length to n bytes from its present start. It panics beyond the
// Buffer's end.
func (b *Buffer) SetLen(n int) {
	_ = b.mem[b.start : b.start+n]
	b.end = b.start + n
}

// Set fills the Buffer with a copy of p. It panics if p is larger than the size that the Buffer
// was made for.
func (b *Buffer) Set(p []byte) {
	b.SetLen(copy(b.Space()[:len(p)], p))
}

// Push extends the packet by n bytes at the front and returns them, uninitialised. It panics
// without enough headroom.
func (b *Buffer) Push(n int) []byte {
	b.start -= n
	return b.mem[b.start : b.start+n : b.start+n]
}

// Headroom returns how many bytes Push can add.
func (b *Buffer) Headroom() int { return b.start }

// Tailroom returns by how many bytes SetLen can extend the packet.
func (b *Buffer) Tailroom() int { return len(b.mem) - b.end }

// Pull removes n bytes at the front of the packet. It panics if the packet is shorter.
func (b *Buffer) Pull(n int) {
	if n > b.Len() {
		panic("packet: Pull beyond the end")
	}
	b.start += n
}

// Trim shortens the packet to its first n bytes. It panics if the packet is shorter.
func (b *Buffer) Trim(n int) {
	if n > b.Len() {
		panic("packet: Trim beyond the end")
	}
	b.end = b.start + n
}
