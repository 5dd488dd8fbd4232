package esp

import "sync/atomic"

// DefaultWindow is the default size of the anti-replay window in packets. RFC 4303
// section 3.4.3 recommends 64; senders with several threads reorder by more.
const DefaultWindow = 1024

// window is the anti-replay window (RFC 4303 section 3.4.3). It is lock-free and safe for
// concurrent use.
//
// It is a ring of blocks of 32 sequence numbers: block n is in slot n mod len(slots). A slot
// is one atomic word, with the block number in the upper half and one bit for each received
// sequence number in the lower. As a slot's block number only grows, each sequence number
// is accepted by exactly one compare-and-swap.
type window struct {
	size  uint64
	top   *atomic.Uint64 // highest authenticated sequence number, the right edge
	slots []atomic.Uint64
}

// newWindow returns a window whose state is the first windowWords(size) of words, or newly allocated if words is nil.
func newWindow(size int, words []atomic.Uint64) *window {
	if words == nil {
		words = make([]atomic.Uint64, windowWords(size))
	}
	return &window{size: uint64(size), top: &words[0], slots: words[1:windowWords(size)]}
}

func windowWords(size int) int { return 1 + size/32 + 2 }

// infer returns the 64-bit sequence number for its transmitted lower half (RFC 4303
// appendix A2.2). 0, which is never valid, means that there is none.
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

// check reports whether accept would take the sequence number. It rejects replays before
// the expensive authentication.
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

// accept marks the sequence number of an authentic packet as received. Of several calls with
// one number in the window exactly one returns true.
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
			return false // the slot already holds a later block
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
