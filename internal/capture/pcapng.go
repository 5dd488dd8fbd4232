package capture

import (
	"encoding/binary"
	"strings"
	"unicode/utf8"
)

// Block types and options of pcapng that are written here, in little-endian. Each is a multiple of four
// bytes long.
const (
	blockSection    = 0x0a0d0d0a // SHB
	blockInterface  = 1          // IDB
	blockNames      = 4          // NRB
	blockStatistics = 5          // ISB
	blockPacket     = 6          // EPB

	byteOrderMagic = 0x1a2b3c4d
	// linkTypeIPv4 is LINKTYPE_IPV4: the IP header is first, and readers look at its version. Of several interfaces
	// of LINKTYPE_RAW libpcap refuses the second, for it compares that with DLT_RAW, another number.
	linkTypeIPv4 = 228

	optEnd         = 0
	optComment     = 1
	shbUserappl    = 4
	ifName         = 2
	ifDescription  = 3
	ifTsresol      = 9
	epbFlags       = 2
	epbDropcount   = 4
	epbPacketid    = 5
	isbStarttime   = 2
	isbEndtime     = 3
	isbIfrecv      = 4
	isbIfdrop      = 5
	isbUsrdeliv    = 8
	nameRecordIPv4 = 1
	flagInbound    = 1
	flagOutbound   = 2
	resolutionNs   = 9    // 10^-9 s
	maxOption      = 8192 // bytes of a text
)

// blocks are blocks of a file, to be written.
type blocks []byte

func (b *blocks) u16(v uint16) { *b = binary.LittleEndian.AppendUint16(*b, v) }
func (b *blocks) u32(v uint32) { *b = binary.LittleEndian.AppendUint32(*b, v) }
func (b *blocks) u64(v uint64) { *b = binary.LittleEndian.AppendUint64(*b, v) }

// time adds a timestamp: its upper half comes first.
func (b *blocks) time(ns int64) {
	b.u32(uint32(uint64(ns) >> 32))
	b.u32(uint32(ns))
}

// bytes adds v, padded to 32 bits.
func (b *blocks) bytes(v []byte) {
	*b = append(*b, v...)
	for n := len(v); n%4 != 0; n++ {
		*b = append(*b, 0)
	}
}

// begin begins a block, and returns the offset that end takes.
func (b *blocks) begin(kind uint32) (at int) {
	at = len(*b)
	b.u32(kind)
	b.u32(0) // the length, by end
	return at
}

func (b *blocks) end(at int) {
	n := uint32(len(*b) - at + 4)
	binary.LittleEndian.PutUint32((*b)[at+4:], n)
	b.u32(n)
}

// text adds an option, unless s is empty. It makes valid UTF-8 of s, which an operator may have written.
func (b *blocks) text(code uint16, s string) {
	if s = strings.ToValidUTF8(s, "\ufffd"); len(s) > maxOption {
		end := maxOption
		for !utf8.RuneStart(s[end]) {
			end--
		}
		s = s[:end] + "…"
	}
	if s != "" {
		b.u16(code)
		b.u16(uint16(len(s)))
		b.bytes([]byte(s))
	}
}

func (b *blocks) option32(code uint16, v uint32) {
	b.u16(code)
	b.u16(4)
	b.u32(v)
}

func (b *blocks) option64(code uint16, v uint64) {
	b.u16(code)
	b.u16(8)
	b.u64(v)
}

func (b *blocks) optionTime(code uint16, ns int64) {
	b.u16(code)
	b.u16(8)
	b.time(ns)
}

func (b *blocks) endOptions() { b.u32(optEnd) }

// section adds a Section Header Block.
func (b *blocks) section(program, comment string) {
	at := b.begin(blockSection)
	b.u32(byteOrderMagic)
	b.u16(1) // version 1.0
	b.u16(0)
	b.u64(^uint64(0)) // its length is not known
	b.text(shbUserappl, program)
	b.text(optComment, comment)
	b.endOptions()
	b.end(at)
}

// iface adds an Interface Description Block.
func (b *blocks) iface(name, description string, snaplen int) {
	at := b.begin(blockInterface)
	b.u16(linkTypeIPv4)
	b.u16(0)
	b.u32(uint32(snaplen))
	b.text(ifName, name)
	b.text(ifDescription, description)
	b.u16(ifTsresol)
	b.u16(1)
	b.bytes([]byte{resolutionNs})
	b.endOptions()
	b.end(at)
}

// Name is a name for an address, which Wireshark shows in place of it.
type Name struct {
	Address [4]byte
	Name    string
}

// names adds a Name Resolution Block.
func (b *blocks) names(names []Name) {
	if len(names) == 0 {
		return
	}
	at := b.begin(blockNames)
	for _, n := range names {
		name := strings.ToValidUTF8(n.Name, "\ufffd")
		record := append(append(n.Address[:], name[:min(len(name), 255)]...), 0)
		b.u16(nameRecordIPv4)
		b.u16(uint16(len(record)))
		b.bytes(record)
	}
	b.u32(0) // end of the records
	b.endOptions()
	b.end(at)
}

// packet adds an Enhanced Packet Block on an interface of the file. lost is how many packets of the interface
// were not captured since the last one.
func (b *blocks) packet(iface uint32, r *record, comment string, lost uint64) {
	at := b.begin(blockPacket)
	b.u32(iface)
	b.time(r.at)
	b.u32(uint32(len(r.bytes)))
	b.u32(r.length)
	b.bytes(r.bytes)
	b.text(optComment, comment)
	direction := uint32(flagInbound)
	if r.where.outbound() {
		direction = flagOutbound
	}
	b.option32(epbFlags, direction)
	if lost > 0 {
		b.option64(epbDropcount, lost)
	}
	if r.id != 0 {
		b.option64(epbPacketid, uint64(r.id))
	}
	b.endOptions()
	b.end(at)
}

// statistics adds an Interface Statistics Block.
func (b *blocks) statistics(iface uint32, comment string, start, end int64, written, missed uint64) {
	at := b.begin(blockStatistics)
	b.u32(iface)
	b.time(end)
	b.text(optComment, comment)
	b.optionTime(isbStarttime, start)
	b.optionTime(isbEndtime, end)
	b.option64(isbIfrecv, written+missed)
	b.option64(isbIfdrop, missed)
	b.option64(isbUsrdeliv, written)
	b.endOptions()
	b.end(at)
}
