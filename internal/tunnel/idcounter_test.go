package tunnel

import "testing"

// IDs are consecutive, never 0, and never shared by two queues.
func TestSplitIDs(t *testing.T) {
	for _, queues := range []int{1, 2, 3, 4, MaxThreads} {
		owner := make(map[uint16]int)
		for queue, ids := range splitIDs(queues) {
			share := 0xffff / queues
			steps := 0
			last := ids.next()
			for i := range 2 * share {
				if other, ok := owner[last]; last == 0 || ok && (other != queue || i < share) {
					t.Fatalf("%d queues: queue %d gives out %d after %d others; queue %d had it", queues, queue, last, i, other)
				}
				owner[last] = queue
				next := ids.next()
				if next != last+1 {
					steps++
				}
				last = next
			}
			if steps > 2 {
				t.Errorf("%d queues: queue %d jumps %d times in two rounds", queues, queue, steps)
			}
		}
	}
}

// The upper half of the IDs is the fast path's.
func TestIDCounters(t *testing.T) {
	for _, queues := range []int{1, 2, MaxThreads} {
		for _, ids := range idCounters(queues) {
			if ids.end >= 0x8000 {
				t.Errorf("%d queues: the highest ID is %#x", queues, ids.end)
			}
		}
	}
}
