package capture

import (
	"sync/atomic"
	"time"

	"ipipd/internal/drop"
)

const (
	ringBytes = 4 << 20
	ringSlots = 1 << 14

	// MaxRings is how many captures a process can have at once.
	MaxRings = 4

	// strangersPerSecond is how many packets of no tunnel are captured in a second, and strangersSnaplen how
	// many bytes of each: anybody can send them, and they must not fill a disk.
	strangersPerSecond = 100
	strangersSnaplen   = 256
)

// Ring is a bounded queue of copies of packets, of one capture. Any number of goroutines put packets in, and
// one takes them out (Stream). None of them waits: a packet that has no room is counted.
type Ring struct {
	options Options
	mem     []byte // ringBytes, a power of two
	slots   []slot // ringSlots, likewise

	// head counts what was ever reserved, tail what was given back: slots in the upper half, bytes in the lower,
	// both modulo 2^32.
	head, tail atomic.Uint64
	missed     [interfaces]atomic.Uint64 // packets not captured

	// full is set by a packet that finds no room, and unset once half of the ring is free: packets are then
	// missing in one piece, and each costs the data path no more than a load of it.
	full atomic.Bool

	strangers struct { // packets of no tunnel
		second atomic.Int64 // Unix time of the second that count is for
		count  atomic.Int32
	}
}

// slot is a packet in the ring. The goroutine that reserves it owns it until it sets done, and then Stream does.
type slot struct {
	done   atomic.Uint32 // number+1 once it may be taken out
	number uint32
	end    uint32 // the lower half of head after its bytes
	record
	discard bool // Stream is not to write it
}

// record is a captured packet, or a count of dropped ones.
type record struct {
	at     int64 // ns since 1970
	where  Point
	why    drop.Reason
	id     uint32
	lost   uint32 // if not 0, so many packets were dropped of which nothing else is known
	length uint32 // of the whole packet, in bytes
	missed uint64 // Ring.missed of its interface at that time
	bytes  []byte // the packet's beginning, at most Snaplen bytes
}

// NewRing returns the ring of a capture.
func NewRing(o Options) *Ring {
	if o.Snaplen <= 0 || o.Snaplen > MaxSnaplen {
		o.Snaplen = MaxSnaplen
	}
	return &Ring{options: o, mem: make([]byte, ringBytes), slots: make([]slot, ringSlots)}
}

// reservePacket returns a slot for a packet of n bytes; nil if there is no room, or strangersPerSecond is reached.
func (r *Ring) reservePacket(where Point, n int, at time.Time) *slot {
	n = min(n, r.options.Snaplen)
	if where == NoTunnel {
		if second := at.Unix(); r.strangers.second.Swap(second) != second {
			r.strangers.count.Store(0)
		}
		if r.strangers.count.Add(1) > strangersPerSecond {
			return nil
		}
		n = min(n, strangersSnaplen)
	}
	return r.reserve(n)
}

// reserve returns a slot with n bytes; nil if there is no room.
func (r *Ring) reserve(n int) *slot {
	if r.full.Load() {
		return nil
	}
	for {
		tail := r.tail.Load() // loaded before head, so that it is never ahead of it
		head := r.head.Load()
		number, at := uint32(head>>32), uint32(head)
		used := at - uint32(tail)
		if left := ringBytes - at%ringBytes; uint32(n) > left {
			at += left // a packet is in one piece
		}
		end := at + uint32(n)
		if number-uint32(tail>>32) >= ringSlots || used+(end-uint32(head)) > ringBytes {
			r.full.Store(true)
			return nil
		}
		if r.head.CompareAndSwap(head, uint64(number+1)<<32|uint64(end)) {
			s := &r.slots[number%ringSlots]
			s.number, s.end, s.discard = number, end, false
			s.record = record{bytes: r.mem[at%ringBytes:][:n]}
			return s
		}
	}
}

// next returns the oldest slot if it is done, else nil; release gives its room back.
func (r *Ring) next() *slot {
	number := uint32(r.tail.Load() >> 32)
	if s := &r.slots[number%ringSlots]; s.done.Load() == number+1 {
		return s
	}
	return nil
}

func (r *Ring) release(s *slot) {
	tail := uint64(s.number+1)<<32 | uint64(s.end)
	r.tail.Store(tail)
	if !r.full.Load() {
		return
	}
	head := r.head.Load()
	if uint32(head>>32)-uint32(tail>>32) <= ringSlots/2 && uint32(head)-uint32(tail) <= ringBytes/2 {
		r.full.Store(false)
	}
}

// Rings are the rings of all captures that a packet goes to. The slice is immutable.
type Rings []*Ring

// DropsOnly reports whether all of them take dropped packets only.
func (rs Rings) DropsOnly() bool {
	for _, r := range rs {
		if !r.options.Drops {
			return false
		}
	}
	return true
}

// Full reports whether all of them are full, so that a packet need not be copied.
func (rs Rings) Full() bool {
	for _, r := range rs {
		if !r.full.Load() {
			return false
		}
	}
	return true
}

// Room reports whether one of them has room for an inner and an outer packet, however long. It is for packets that
// can wait elsewhere until there is, as the fast path's in the kernel's ring buffer.
func (rs Rings) Room() bool {
	for _, r := range rs {
		tail, head := r.tail.Load(), r.head.Load()
		slots, bytes := ringSlots-(uint32(head>>32)-uint32(tail>>32)), ringBytes-(uint32(head)-uint32(tail))
		if slots >= 2 && bytes >= uint32(4*r.options.Snaplen) && !r.full.Load() { // a packet in one piece may leave as much unused
			return true
		}
	}
	return false
}

// Missed counts n packets that are not captured; if why is drop.None, not in rings of Options.Drops.
func (rs Rings) Missed(where Point, why drop.Reason, n int) {
	for _, r := range rs {
		if (why != drop.None || !r.options.Drops) && r.options.wants(where) {
			r.missed[where.iface()].Add(uint64(n))
		}
	}
}

// Wanted returns how many bytes of a packet they keep at most, and whether all of them take dropped packets only.
func (rs Rings) Wanted() (snaplen int, drops bool) {
	for _, r := range rs {
		snaplen = max(snaplen, r.options.Snaplen)
	}
	return snaplen, rs.DropsOnly()
}

// Held is a copied packet of which it is not known yet whether it will be dropped.
type Held struct {
	rings Rings
	slots [MaxRings]*slot
	where Point
}

// Hold copies a packet, before it is changed. Settle or Discard has to follow soon: Stream takes out no later packet
// before that.
func (rs Rings) Hold(where Point, p []byte, id uint32, at time.Time) (h Held) {
	return rs.hold(where, p, len(p), id, at)
}

// hold is Hold of a packet of length bytes, of which p is the beginning.
func (rs Rings) hold(where Point, p []byte, length int, id uint32, at time.Time) (h Held) {
	h.rings, h.where = rs, where
	for i, r := range rs {
		if !r.options.wants(where) {
			continue
		}
		s := r.reservePacket(where, len(p), at)
		if s == nil {
			continue
		}
		copy(s.bytes, p)
		s.at, s.where, s.id, s.length = at.UnixNano(), where, id, uint32(length)
		s.missed = r.missed[where.iface()].Load()
		h.slots[i] = s
	}
	return h
}

// Settle captures the packet with the reason why it is dropped; drop.None: it is not.
func (h *Held) Settle(why drop.Reason) {
	for i, r := range h.rings {
		s := h.slots[i]
		wanted := why != drop.None || !r.options.Drops
		switch {
		case s != nil:
			s.why, s.discard = why, !wanted
			s.done.Store(s.number + 1)
		case wanted && r.options.wants(h.where):
			r.missed[h.where.iface()].Add(1)
		}
	}
}

// Discard drops the copy: the packet is neither captured nor counted as missed.
func (h *Held) Discard() {
	for _, s := range h.slots {
		if s != nil {
			s.discard = true
			s.done.Store(s.number + 1)
		}
	}
}

// Packet captures a packet with the reason why it is dropped; drop.None: it is not. It copies p.
func (rs Rings) Packet(where Point, p []byte, id uint32, why drop.Reason, at time.Time) {
	rs.Snapped(where, p, len(p), id, why, at)
}

// Snapped is Packet of a packet of length bytes, of which p is the beginning.
func (rs Rings) Snapped(where Point, p []byte, length int, id uint32, why drop.Reason, at time.Time) {
	for i, r := range rs {
		if why != drop.None || !r.options.Drops {
			h := rs[i:i+1].hold(where, p, length, id, at)
			h.Settle(why)
		}
	}
}

// Lost captures a record that n packets were dropped, of which nothing but the reason is known.
func (rs Rings) Lost(why drop.Reason, n int, at time.Time) {
	for _, r := range rs {
		where := pointOf(why)
		if s := r.reserve(0); s != nil {
			s.at, s.where, s.why, s.lost = at.UnixNano(), where, why, uint32(n)
			s.missed = r.missed[where.iface()].Load()
			s.done.Store(s.number + 1)
		} else {
			r.missed[where.iface()].Add(uint64(n))
		}
	}
}
