package handover

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func newState(t testing.TB) *State {
	t.Helper()
	s, err := NewState()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if s.mem != nil {
			s.Close()
		}
	})
	return s
}

// adoptState takes over a State as the next process does.
func adoptState(t testing.TB, fd int) (*State, error) {
	t.Helper()
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		t.Fatal(err)
	}
	s, err := AdoptState(dup)
	if err != nil {
		unix.Close(dup)
		return nil, err
	}
	t.Cleanup(func() {
		if s.mem != nil {
			s.Close()
		}
	})
	return s, nil
}

// copyOf adopts a copy of the memory of s after change has edited it.
func copyOf(t testing.TB, s *State, change func(mem []byte)) (*State, error) {
	t.Helper()
	c := newState(t)
	copy(c.mem, s.mem[:recordsAt+int(s.word(headerHigh).Load())*statePageSize])
	change(c.mem)
	return adoptState(t, c.fd)
}

func TestState_records(t *testing.T) {
	s := newState(t)
	want := map[string][]byte{}
	rng := rand.New(rand.NewPCG(1, 1))
	for n := range 2000 {
		key := fmt.Sprint("key ", rng.IntN(20))
		if rng.IntN(4) == 0 {
			s.Delete(key)
			delete(want, key)
			continue
		}
		want[key] = bytes.Repeat([]byte{byte(n)}, rng.IntN(4*statePageSize))
		if err := s.Put(key, want[key]); err != nil {
			t.Fatal(err)
		}
	}
	next, err := adoptState(t, s.fd)
	if err != nil {
		t.Fatal(err)
	}
	for _, got := range []map[string][]byte{s.Records(), next.Records()} {
		if !maps.EqualFunc(got, want, bytes.Equal) {
			t.Fatalf("%d records, want %d, or others", len(got), len(want))
		}
	}
	if next.Damaged != 0 {
		t.Errorf("%d are damaged", next.Damaged)
	}
	// Deleted records are zeroed.
	for key := range want {
		next.Delete(key)
	}
	if high := int(next.word(headerHigh).Load()); len(bytes.Trim(next.mem[recordsAt:recordsAt+high*statePageSize], "\x00")) != 0 {
		t.Error("something of deleted records is left")
	}
	if err := s.Put("long", make([]byte, stateSize)); err == nil || !strings.Contains(err.Error(), "no room") {
		t.Errorf("too long: %v", err)
	}
}

// Wherever a process is killed in Put, the next one finds the record before, or the new one.
func TestState_torn(t *testing.T) {
	rng := rand.New(rand.NewPCG(2, 2))
	for range 50 {
		s := newState(t)
		one, two := bytes.Repeat([]byte{1}, rng.IntN(3*statePageSize)), bytes.Repeat([]byte{2}, rng.IntN(3*statePageSize))
		for range 1 + rng.IntN(3) { // so that pages are used again
			if err := s.Put("a", one); err != nil {
				t.Fatal(err)
			}
		}
		before := bytes.Clone(s.mem[:recordsAt+16*statePageSize])
		old := s.extents["a"]
		if err := s.Put("a", two); err != nil {
			t.Fatal(err)
		}
		next := s.extents["a"]
		at := func(e extent) (from, to int) {
			from = recordsAt + e.first*statePageSize
			return from, from + e.pages*statePageSize
		}
		oldFrom, oldTo := at(old)
		nextFrom, nextTo := at(next)
		whole := func(name string, want []byte, change func(mem []byte)) {
			c, err := copyOf(t, s, change)
			if err != nil {
				t.Fatal(err)
			}
			if got := c.Records(); len(got) != 1 || !bytes.Equal(got["a"], want) || c.Damaged != 0 {
				t.Fatalf("%s: %d records, %d damaged, or another one", name, len(got), c.Damaged)
			}
			c.Close()
			c.mem = nil
		}
		whole("new", two, func([]byte) {})
		whole("new, and the one before", two, func(mem []byte) { copy(mem[oldFrom:oldTo], before[oldFrom:oldTo]) })
		some := func(to, from []byte) {
			for i := range from {
				if rng.IntN(2) == 0 {
					to[i] = from[i]
				}
			}
		}
		whole("new, and a part of the one before", two, func(mem []byte) {
			some(mem[oldFrom+8:oldTo], before[oldFrom+8:oldTo])
		})
		whole("a part of the new one", one, func(mem []byte) {
			copy(mem[oldFrom:oldTo], before[oldFrom:oldTo])
			clear(mem[nextFrom : nextFrom+8])
			some(mem[nextFrom+8:nextTo], before[nextFrom+8:nextTo])
		})
		s.Close()
		s.mem = nil
	}
}

// A damaged record is counted and not returned, and can be written again.
func TestState_damaged(t *testing.T) {
	s := newState(t)
	for _, key := range []string{"a", "b", "c"} {
		if err := s.Put(key, bytes.Repeat([]byte(key), 5000)); err != nil {
			t.Fatal(err)
		}
	}
	e := s.extents["b"]
	for _, offset := range []int{8, 16, 20, 24, recordHeader, recordHeader + 1, recordHeader + 4000} {
		c, err := copyOf(t, s, func(mem []byte) { mem[recordsAt+e.first*statePageSize+offset] ^= 0x80 })
		if err != nil {
			t.Fatal(err)
		}
		if got := c.Records(); len(got) != 2 || got["b"] != nil || c.Damaged != 1 {
			t.Errorf("offset %d: %d records, %d damaged", offset, len(got), c.Damaged)
		}
		if err := c.Put("b", []byte("new")); err != nil || string(c.Records()["b"]) != "new" {
			t.Errorf("offset %d: not written again: %v", offset, err)
		}
	}
}

func TestAdoptState_refused(t *testing.T) {
	s := newState(t)
	for offset := range headerHigh - 8 {
		if _, err := copyOf(t, s, func(mem []byte) { mem[offset]++ }); err == nil || err.Error() != "it has another layout than version 1" {
			t.Errorf("byte %d: %v", offset, err)
		}
	}
	if _, err := copyOf(t, s, func(mem []byte) { mem[headerHigh+4] = 1 }); err == nil {
		t.Error("more pages than there are")
	}
	unsealed, err := unix.MemfdCreate("x", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(unsealed)
	_ = unix.Ftruncate(unsealed, stateSize)
	if _, err := adoptState(t, unsealed); err == nil {
		t.Error("a file that can get shorter")
	}
	_ = unix.Ftruncate(unsealed, statePageSize)
	_, _ = unix.FcntlInt(uintptr(unsealed), unix.F_ADD_SEALS, stateSeals)
	if _, err := adoptState(t, unsealed); err == nil {
		t.Error("a file that is too short")
	}
	var pipe [2]int
	if err := unix.Pipe(pipe[:]); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	if _, err := adoptState(t, pipe[0]); err == nil {
		t.Error("a pipe")
	}
	if err := unix.Ftruncate(s.fd, 0); err == nil {
		t.Error("the file of a State gets shorter")
	}
	var stat unix.Stat_t
	if err := unix.Fstat(s.fd, &stat); err != nil || stat.Mode&0o777 != 0 {
		t.Errorf("mode %o: %v", stat.Mode, err)
	}
}

// AdoptCounters returns the words as they were, once, for their tag only. Released ones are not taken again at once.
func TestState_counters(t *testing.T) {
	s := newState(t)
	one, words, ok := s.TakeCounters(7)
	two, other, _ := s.TakeCounters(8)
	if !ok || one == two || len(words) != counterWords-1 {
		t.Fatal(one, two, len(words))
	}
	words[0].Add(5)
	words[len(words)-1].Add(6)
	other[0].Add(9)
	next, err := adoptState(t, s.fd)
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := next.AdoptCounters(one, 8); ok {
		t.Error("by another tag")
	}
	for _, index := range []int{-1, stateCounters, two + 1} {
		if _, ok := next.AdoptCounters(index, 8); ok {
			t.Error("of index", index)
		}
	}
	words, ok = next.AdoptCounters(one, 7)
	if !ok || words[0].Load() != 5 || words[len(words)-1].Load() != 6 {
		t.Fatal("not as they were")
	}
	if _, ok := next.AdoptCounters(one, 7); ok {
		t.Error("twice")
	}
	next.ReleaseCounters(one)
	taken := map[int]bool{}
	for {
		index, words, ok := next.TakeCounters(9)
		if !ok {
			break
		}
		if taken[index] || words[0].Load() != 0 {
			t.Fatalf("%d: taken %v, %d", index, taken[index], words[0].Load())
		}
		taken[index] = true
	}
	if len(taken) != stateCounters-1 || taken[one] {
		t.Errorf("%d are taken", len(taken))
	}
}

// No memory makes AdoptState panic, and each record that it finds can be written again and deleted.
func FuzzAdoptState(f *testing.F) {
	f.Add([]byte("key"), []byte{1, 2, 3}, uint16(0), byte(0))
	f.Add([]byte{}, bytes.Repeat([]byte{7}, 9000), uint16(16), byte(0xff))
	f.Fuzz(func(t *testing.T, key, data []byte, at uint16, flip byte) {
		s := newState(t)
		for _, k := range []string{string(key), "b"} {
			if s.Put(k, data) != nil {
				return
			}
		}
		c, err := copyOf(t, s, func(mem []byte) {
			mem[recordsAt+int(at)] ^= flip
			copy(mem[recordsAt+3*statePageSize:], data)
			if high := s.word(headerHigh).Load(); high < 10 {
				mem[headerHigh] = 10
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		for k := range c.Records() {
			if err := c.Put(k, key); err != nil {
				t.Fatal(err)
			}
			c.Delete(k)
		}
		c.Close()
		c.mem = nil
		s.Close()
		s.mem = nil
	})
}
