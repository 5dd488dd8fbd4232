package tun

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
	"ipipd/internal/vnet"
)

// readFrame stands in for readv: it fills the queue's buffers as the kernel would.
func readFrame(q *queue, s *Scratch, b *packet.Buffer, h vnet.Header, p []byte) (got bool) {
	head, first, rest := q.readBuffers(s, b)
	h.Encode((*[vnet.HeaderLen]byte)(head))
	n := copy(first, p)
	n += copy(rest, p[n:])
	return q.finish(s, b, n)
}

// drain returns the remaining segments of a superpacket, read in batches of n.
func drain(t *testing.T, s *Scratch, n, size int) (segments [][]byte) {
	t.Helper()
	for s.Pending() {
		batch := packet.NewBatch(n, size)
		got := s.Segments(batch)
		for _, b := range batch[:got] {
			if b.Offload != (packet.Offload{Checksum: packet.ChecksumValid}) {
				t.Errorf("offload %+v", b.Offload)
			}
			segments = append(segments, bytes.Clone(b.Bytes()))
		}
	}
	return segments
}

func TestQueue_superpacket(t *testing.T) {
	p := spec{tcp: true, payload: patternBytes(20000, 0), partial: true}.build()
	want := slowSplit(p, 1460)
	for _, space := range []int{1500, 1600, packet.MaxSize} {
		for _, direct := range []int{1500, 9000, packet.MaxSize} {
			for _, n := range []int{1, 3, 100} {
				q, s := queue{direct: direct}, new(Scratch)
				h := vnet.Header{Flags: vnet.NeedsChecksum, GSOType: vnet.GSOTCPv4, HdrLen: 40, GSOSize: 1460, CsumStart: 20, CsumOffset: 16}
				if readFrame(&q, s, packet.New(space), h, p) {
					t.Fatal("a superpacket was not split")
				}
				if diff := cmp.Diff(want, drain(t, s, n, space)); diff != "" {
					t.Errorf("space %d, direct %d, batches of %d: %s", space, direct, n, diff)
				}
			}
		}
	}
}

func TestQueue_partialChecksum(t *testing.T) {
	for _, spec := range []spec{{tcp: true, payload: patternBytes(99, 0)}, {payload: patternBytes(99, 0)}} {
		want := spec.build()
		spec.partial = true
		q, s := queue{direct: 1500}, new(Scratch)
		b := packet.New(1500)
		h := vnet.Header{Flags: vnet.NeedsChecksum, CsumStart: 20, CsumOffset: ipv4.OffUDPChecksum}
		if spec.tcp {
			h.CsumOffset = ipv4.OffTCPChecksum
		}
		if !readFrame(&q, s, b, h, spec.build()) || !bytes.Equal(b.Bytes(), want) || b.Checksum != packet.ChecksumValid {
			t.Errorf("got %x, checksum %v, want %x", b.Bytes(), b.Checksum, want)
		}
	}
}

func TestQueue_ordinaryPacket(t *testing.T) {
	p := spec{payload: patternBytes(1000, 0)}.build()
	for flags, want := range map[uint8]packet.Checksum{0: packet.ChecksumUnknown, vnet.DataValid: packet.ChecksumValid} {
		q, s := queue{direct: 1500}, new(Scratch)
		b := packet.New(1500)
		if !readFrame(&q, s, b, vnet.Header{Flags: flags}, p) || !bytes.Equal(b.Bytes(), p) || b.Checksum != want {
			t.Errorf("flags %d: %x, checksum %v", flags, b.Bytes(), b.Checksum)
		}
	}
}

// After the MTU was raised, a packet beyond direct is whole, and direct grows to its size so
// that the next one is not copied.
func TestQueue_mtuRaised(t *testing.T) {
	p := spec{payload: patternBytes(8000, 0)}.build()
	q, s := queue{direct: 1500}, new(Scratch)
	b := packet.New(packet.MaxSize)
	if !readFrame(&q, s, b, vnet.Header{}, p) || !bytes.Equal(b.Bytes(), p) {
		t.Errorf("%d bytes, want %d", b.Len(), len(p))
	}
	if q.direct != len(p) {
		t.Errorf("direct is %d", q.direct)
	}
	small := packet.New(1500)
	if !readFrame(&q, s, small, vnet.Header{}, p) || !bytes.Equal(small.Bytes(), p[:1500]) {
		t.Errorf("into a small buffer: %d bytes", small.Len())
	}
}

// An IPv6 superpacket is passed on, truncated, for the data path to count it as not IPv4.
func TestQueue_ipv6Superpacket(t *testing.T) {
	p := patternBytes(20000, 0)
	p[0] = 0x60
	q, s := queue{direct: 1500}, new(Scratch)
	b := packet.New(1500)
	h := vnet.Header{Flags: vnet.NeedsChecksum, GSOType: 4, GSOSize: 1440, CsumStart: 40, CsumOffset: 16}
	if !readFrame(&q, s, b, h, p) || !bytes.Equal(b.Bytes(), p[:1500]) || b.Offload != (packet.Offload{}) {
		t.Errorf("%d bytes, %+v", b.Len(), b.Offload)
	}
}

func FuzzQueueRead(f *testing.F) {
	p := spec{tcp: true, payload: patternBytes(3000, 0)}.build()
	f.Add([]byte{1, 1, 40, 0, 0xb4, 5, 20, 0, 16, 0}, p, uint16(1500))
	f.Add([]byte{1, 0, 0, 0, 0, 0, 20, 0, 16, 0}, p[:1000], uint16(1500))
	f.Add([]byte{1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff}, p, uint16(65535))
	f.Add([]byte{3, 0x85, 0xff, 0xff, 1, 0, 0, 0, 0, 0}, p, uint16(0))
	f.Add([]byte{0, 4, 0, 0, 0, 0, 0, 0, 0, 0}, []byte{0x60}, uint16(100))
	f.Fuzz(func(t *testing.T, head, p []byte, space uint16) {
		if len(head) < vnet.HeaderLen || len(p) > packet.MaxSize {
			return
		}
		h := vnet.Decode((*[vnet.HeaderLen]byte)(head))
		if h.GSOSize < 16 && len(p) > 1000 {
			return // too slow
		}
		q, s := queue{direct: 1500}, new(Scratch)
		b := packet.New(int(space))
		if readFrame(&q, s, b, h, p) {
			if b.Len() > len(p) || s.Pending() {
				t.Errorf("%d bytes of %d", b.Len(), len(p))
			}
			return
		}
		for _, segment := range drain(t, s, 7, int(space)) {
			if len(segment) >= 4 && int(binary.BigEndian.Uint16(segment[2:])) == len(segment) && !slowValid(segment) {
				t.Errorf("bad checksum: %x", segment)
			}
		}
	})
}
