package esp

import "sync/atomic"

// DefaultWindow is the anti-replay window in packets. RFC 4303 section 3.4.3
// asks for 64 at least; several threads that send on one SA, and queues of the
// network, need more.
const DefaultWindow = 1024

// window is the anti-replay window (RFC 4303 section 3.4.3), for any number of
// goroutines, without a lock.
//
// Sequence numbers are kept in blocks of 32, block n in slot n mod len(slots). A
// slot is one word, so that it changes atomically: the block's number in the upper
// half, one bit for each sequence number that has arrived in the lower. A
// slot's block number only grows. A sequence number is therefore accepted by
// exactly one compare-and-swap, whoever else is about to do the same.
type window struct {
	size  uint64
	top   atomic.Uint64 // highest sequence number that was authenticated
	slots []atomic.Uint64
}

func newWindow(size int) *window {
	return &window{size: uint64(size), slots: make([]atomic.Uint64, size/32+2)}
}

// infer gives a sequence number of 32 bits its upper half: the one that puts it
// into or right above the window (RFC 4303 appendix A2.2). 0 is none.
func (w *window) infer(low uint32) uint64 {
	top := w.top.Load()
	topLow, high := uint32(top), top>>32
	bottom := topLow - uint32(w.size) + 1
	if uint64(topLow) >= w.size-1 { // the window lies within one subspace
		if low < bottom {
			high++
		}
	} else if low >= bottom { // it spans two, and low is in the earlier one
		if high == 0 {
			return 0
		}
		high--
	}
	return high<<32 | uint64(low)
}

func (w *window) slot(sequence uint64) (slot *atomic.Uint64, block uint32, bit uint64) {
	n := sequence >> 5
	return &w.slots[n%uint64(len(w.slots))], uint32(n), 1 << (sequence & 31)
}

// check reports whether a packet with that sequence number could be accepted. It
// comes before the expensive and decisive part, authentication.
func (w *window) check(sequence uint64) bool {
	if sequence == 0 || sequence+w.size <= w.top.Load() {
		return false
	}
	slot, block, bit := w.slot(sequence)
	word := slot.Load()
	switch diff := int32(block - uint32(word>>32)); {
	case diff < 0:
		return false
	case diff == 0:
		return word&bit == 0
	}
	return true
}

// accept is check for an authentic packet, and marks it as arrived. Of several
// calls with one sequence number exactly one returns true.
func (w *window) accept(sequence uint64) bool {
	for {
		top := w.top.Load()
		if sequence == 0 || sequence+w.size <= top {
			return false
		}
		if sequence <= top || w.top.CompareAndSwap(top, sequence) {
			break
		}
	}
	slot, block, bit := w.slot(sequence)
	for {
		word := slot.Load()
		next := uint64(block)<<32 | bit
		switch diff := int32(block - uint32(word>>32)); {
		case diff < 0:
			return false // a later block has its place
		case diff == 0:
			if word&bit != 0 {
				return false
			}
			next |= word
		}
		if slot.CompareAndSwap(word, next) {
			return true
		}
	}
}
