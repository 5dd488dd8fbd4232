package esp

import (
	"sync"
	"sync/atomic"
	"testing"
)

// check and accept agree with a map of the accepted sequence numbers.
func TestWindowAccept_model(t *testing.T) {
	for _, size := range []int{32, 64, 100, 1024} {
		w := newWindow(size, nil)
		seen, top := map[uint64]bool{}, uint64(0)
		state := uint64(size)
		for range 200_000 {
			state = state*6364136223846793005 + 1442695040888963407
			r := state >> 33
			var seq uint64
			switch r % 16 {
			case 0:
				seq = top + r>>4%uint64(3*size)
			case 1:
				seq = r >> 4 % (top + 2)
			default:
				seq = top + 2 - min(top+2, r>>4%uint64(size+5))
			}
			want := seq != 0 && !seen[seq] && seq+uint64(size) > top
			if got := w.check(seq); got != want {
				t.Fatalf("size %d: check(%d) with top %d = %v", size, seq, top, got)
			}
			if got := w.accept(seq); got != want {
				t.Fatalf("size %d: accept(%d) with top %d = %v", size, seq, top, got)
			}
			if want {
				seen[seq], top = true, max(top, seq)
			}
		}
	}
}

// Among concurrent callers each sequence number is accepted once.
func TestWindowAccept_concurrent(t *testing.T) {
	w := newWindow(1024, nil)
	const n = 20_000
	var accepted [n + 1]atomic.Int32
	var next atomic.Uint64
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				base := next.Add(1)
				if base > 2*n {
					return
				}
				seq := (base + 1) / 2 // each number is tried twice
				if w.check(seq) && w.accept(seq) {
					accepted[seq].Add(1)
				}
			}
		})
	}
	wg.Wait()
	for seq := range accepted {
		if a := accepted[seq].Load(); a > 1 || seq > 0 && a == 0 && seq > n-1000 {
			t.Fatalf("%d accepted %d times", seq, a)
		}
	}
}

// RFC 4303 appendix A2.2.
func TestWindowInfer(t *testing.T) {
	w := newWindow(1024, nil)
	for _, c := range []struct {
		top  uint64
		low  uint32
		want uint64
	}{
		{0, 1, 1}, {0, 0xffffffff, 0}, {1, 0xfffffc02, 0},
		{5000, 3977, 3977}, {5000, 3976, 1<<32 + 3976}, {5000, 6000, 6000}, {5000, 0xffffffff, 0xffffffff},
		{1<<32 + 100, 0xffffff00, 0xffffff00}, {1<<32 + 100, 101, 1<<32 + 101}, {1<<32 - 1, 0, 1 << 32},
		{3<<32 + 5000, 4999, 3<<32 + 4999}, {3<<32 + 5000, 1, 4<<32 + 1},
	} {
		w.top.Store(c.top)
		if got := w.infer(c.low); got != c.want {
			t.Errorf("top %#x, low %#x: %#x, want %#x", c.top, c.low, got, c.want)
		}
	}
}
