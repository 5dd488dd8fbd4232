package handover

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// State is memory that outlives the process, kill -9 included, and reaches no disk but by swapping: an
// anonymous file (memfd) that is mapped, which the process gives its Manager. It has records, each
// replaced as a whole, and Counters, words that are counted in place. Its methods are safe for concurrent
// use, but for Close. One process at a time may use it.
type State struct {
	// Damaged is how many records of the process before were damaged, and are lost.
	Damaged int

	fd  int
	mem []byte

	mu         sync.Mutex
	used       [statePages]bool
	extents    map[string]extent
	generation uint64
	counters   [stateCounters]bool // in use
	free       []freeCounter
	high       int // Counters from this index on were never in use
}

// The layout: a page with the header, then Counters, then pages of records:
//
//	header:   "ipipd-st", stateVersion (32 bits), counterWords, stateCounters, statePages, their SHA-256;
//	          at headerHigh, how many pages of records were ever in use (64 bits)
//	Counters: a tag (64 bits), then the words
//	record:   recordWhole or 0 (64 bits), generation (64 bits), lengths of key and data (32 bits each),
//	          SHA-256 of generation, lengths, key and data; key, data
//
// A record begins on a page boundary, and is written to free pages: it is valid once recordWhole is stored. Only then
// is the key's record before it cleared; if both are found, the later generation counts.
const (
	stateVersion  = 1
	statePageSize = 4096
	counterWords  = 40
	stateCounters = 4096
	statePages    = 1 << 14 // 64 MiB, of which only pages that were in use take memory
	headerLength  = 24
	headerHigh    = 64
	recordHeader  = 56
	recordWhole   = 0x65736c6f6877 // "whole"
	countersAt    = statePageSize
	recordsAt     = countersAt + stateCounters*counterWords*8
	stateSize     = recordsAt + statePages*statePageSize
	stateSeals    = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL
	// countersRest is how long released Counters are not taken again: a goroutine may still add to them.
	countersRest = 10 * time.Second
)

// extent is the pages that a record takes.
type extent struct{ first, pages int }

type freeCounter struct {
	index int
	since time.Time
}

// NewState makes a State without a record.
func NewState() (*State, error) {
	fd, err := unix.MemfdCreate("ipipd-state", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_NOEXEC_SEAL)
	if err == unix.EINVAL { // before Linux 6.3
		fd, err = unix.MemfdCreate("ipipd-state", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	// Mode 0: by /proc/PID/fd another process of the user could open it.
	if err = os.NewSyscallError("fchmod", unix.Fchmod(fd, 0)); err == nil {
		err = os.NewSyscallError("ftruncate", unix.Ftruncate(fd, stateSize))
	}
	if err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, stateSeals)
		err = os.NewSyscallError("fcntl F_ADD_SEALS", err)
	}
	var s *State
	if err == nil {
		s, err = mapState(fd)
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	copy(s.mem, stateHeader())
	return s, nil
}

// AdoptState takes over fd, the State of a process before. If fd is no State of this layout it fails, and
// fd stays the caller's.
func AdoptState(fd int) (*State, error) {
	var stat unix.Stat_t
	seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	switch {
	case unix.Fstat(fd, &stat) != nil || err != nil || seals&stateSeals != stateSeals:
		return nil, errors.New("it is no memfd of a size that stays")
	case stat.Size != stateSize:
		return nil, errLayout
	}
	s, err := mapState(fd)
	if err != nil {
		return nil, err
	}
	if err := s.scan(); err != nil {
		_ = unix.Munmap(s.mem)
		return nil, err
	}
	return s, nil
}

var errLayout = fmt.Errorf("it has another layout than version %d", stateVersion)

func mapState(fd int) (*State, error) {
	mem, err := unix.Mmap(fd, 0, stateSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, os.NewSyscallError("mmap", err)
	}
	if err := unix.Madvise(mem, unix.MADV_DONTDUMP); err != nil {
		_ = unix.Munmap(mem)
		return nil, os.NewSyscallError("madvise MADV_DONTDUMP", err)
	}
	return &State{fd: fd, mem: mem, extents: map[string]extent{}}, nil
}

func stateHeader() []byte {
	b := append(make([]byte, 0, headerHigh), "ipipd-st"...)
	for _, v := range []uint32{stateVersion, counterWords, stateCounters, statePages} {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	sum := sha256.Sum256(b[:headerLength])
	return append(b, sum[:]...)
}

// FD returns the memfd, which stays the State's.
func (s *State) FD() int { return s.fd }

// Close unmaps and closes the memory. Words of Counters must not be used any more.
func (s *State) Close() error {
	err := errors.Join(unix.Munmap(s.mem), unix.Close(s.fd))
	s.mem = nil
	return err
}

func (s *State) word(offset int) *atomic.Uint64 {
	return (*atomic.Uint64)(unsafe.Pointer(&s.mem[offset]))
}

func (s *State) record(page int) []byte { return s.mem[recordsAt+page*statePageSize:] }

// scan finds the records, and clears pages that hold no valid one.
func (s *State) scan() error {
	if string(s.mem[:headerHigh-8]) != string(stateHeader()) {
		return errLayout
	}
	high := s.word(headerHigh).Load()
	if high > statePages {
		return errors.New("it is damaged")
	}
	for page := 0; page < int(high); {
		key, e, generation, err := s.parse(page)
		if err != nil {
			s.Damaged++
		}
		if e.pages == 0 {
			clear(s.record(page)[:statePageSize])
			page++
			continue
		}
		page += e.pages
		old, twice := s.extents[key]
		if twice && s.generationOf(old) > generation {
			s.clear(e)
			continue
		}
		if twice {
			s.release(old)
		}
		s.take(e)
		s.extents[key] = e
		s.generation = max(s.generation, generation)
	}
	s.high = stateCounters // all may have been in use
	for i := range stateCounters {
		s.free = append(s.free, freeCounter{index: i})
	}
	return nil
}

// parse reads the record that begins at a page. e.pages is 0 if there is none, and err is set if it is damaged.
func (s *State) parse(page int) (key string, e extent, generation uint64, err error) {
	b := s.record(page)
	if whole := binary.NativeEndian.Uint64(b); whole != recordWhole {
		return "", e, 0, nil
	}
	generation = binary.LittleEndian.Uint64(b[8:])
	keyLen, dataLen := binary.LittleEndian.Uint32(b[16:]), binary.LittleEndian.Uint32(b[20:])
	size := recordHeader + uint64(keyLen) + uint64(dataLen)
	if size > uint64(len(b)) {
		return "", e, 0, errors.New("it is longer than there is room")
	}
	if recordSum(b[:size]) != [32]byte(b[24:recordHeader]) {
		return "", e, 0, errors.New("its checksum is wrong")
	}
	return string(b[recordHeader : recordHeader+keyLen]), extent{page, pagesOf(int(size))}, generation, nil
}

// recordSum returns the checksum of a record.
func recordSum(b []byte) [32]byte {
	h := sha256.New()
	h.Write(b[8:24])
	h.Write(b[recordHeader:])
	return [32]byte(h.Sum(nil))
}

func pagesOf(size int) int { return (size + statePageSize - 1) / statePageSize }

func (s *State) generationOf(e extent) uint64 {
	return binary.LittleEndian.Uint64(s.record(e.first)[8:])
}

// Records returns copies of the records, by key.
func (s *State) Records() map[string][]byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	records := map[string][]byte{}
	for key, e := range s.extents {
		b := s.record(e.first)
		start := recordHeader + len(key)
		records[key] = append([]byte(nil), b[start:start+int(binary.LittleEndian.Uint32(b[20:]))]...)
	}
	return records
}

// Put makes a copy of data the record of key, in one step: a process that is killed meanwhile leaves the record before
// it, or this one. After an error the record before it stays.
func (s *State) Put(key string, data []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	size := recordHeader + len(key) + len(data)
	e, ok := s.find(pagesOf(size))
	if !ok {
		return fmt.Errorf("no room for %d bytes that are to outlive the process", len(data))
	}
	s.take(e)
	s.generation++
	b := s.record(e.first)[:size]
	binary.LittleEndian.PutUint64(b[8:], s.generation)
	binary.LittleEndian.PutUint32(b[16:], uint32(len(key)))
	binary.LittleEndian.PutUint32(b[20:], uint32(len(data)))
	copy(b[copy(b[recordHeader:], key)+recordHeader:], data)
	sum := recordSum(b)
	copy(b[24:], sum[:])
	s.word(recordsAt + e.first*statePageSize).Store(recordWhole)
	if old, ok := s.extents[key]; ok {
		s.release(old)
	}
	s.extents[key] = e
	return nil
}

// Delete removes the record of key, if there is one, and zeroes its memory.
func (s *State) Delete(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e, ok := s.extents[key]; ok {
		s.release(e)
		delete(s.extents, key)
	}
}

// find returns the first free pages in a row; false if there are not as many.
func (s *State) find(pages int) (extent, bool) {
	run := 0
	for i := range s.used {
		if run++; s.used[i] {
			run = 0
		}
		if run == pages {
			return extent{i + 1 - pages, pages}, true
		}
	}
	return extent{}, false
}

func (s *State) take(e extent) {
	for i := range e.pages {
		s.used[e.first+i] = true
	}
	if high := s.word(headerHigh); int(high.Load()) < e.first+e.pages {
		high.Store(uint64(e.first + e.pages))
	}
}

func (s *State) release(e extent) {
	s.clear(e)
	for i := range e.pages {
		s.used[e.first+i] = false
	}
}

// clear zeroes a record: first recordWhole, which makes it invalid, then the rest, which may be secret.
func (s *State) clear(e extent) {
	s.word(recordsAt + e.first*statePageSize).Store(0)
	clear(s.record(e.first)[:e.pages*statePageSize])
}

// words returns the words of Counters, without the tag.
func (s *State) words(index int) []atomic.Uint64 {
	return unsafe.Slice(s.word(countersAt+index*counterWords*8+8), counterWords-1)
}

func (s *State) tag(index int) *atomic.Uint64 { return s.word(countersAt + index*counterWords*8) }

// TakeCounters returns zeroed words, which the next process can adopt by index and tag, which is not 0. They stay the
// caller's until ReleaseCounters. ok is false if none are left.
func (s *State) TakeCounters(tag uint64) (index int, words []atomic.Uint64, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.high < stateCounters:
		index = s.high
		s.high++
	case len(s.free) > 0 && (s.free[0].since.IsZero() || time.Since(s.free[0].since) >= countersRest):
		index = s.free[0].index
		s.free = s.free[1:]
	default:
		return 0, nil, false
	}
	s.counters[index] = true
	words = s.words(index)
	s.tag(index).Store(0)
	for i := range words {
		words[i].Store(0)
	}
	s.tag(index).Store(tag)
	return index, words, true
}

// AdoptCounters returns words that the process before had taken, with their values. ok is false unless they have the
// tag, and are not in use already.
func (s *State) AdoptCounters(index int, tag uint64) (words []atomic.Uint64, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if index < 0 || index >= stateCounters || tag == 0 || s.counters[index] || s.tag(index).Load() != tag {
		return nil, false
	}
	s.counters[index] = true
	s.free = slices.DeleteFunc(s.free, func(f freeCounter) bool { return f.index == index })
	return s.words(index), true
}

// ReleaseCounters frees Counters. Additions that are under way may still end, within countersRest; none may begin.
func (s *State) ReleaseCounters(index int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counters[index] = false
	s.tag(index).Store(0)
	s.free = append(s.free, freeCounter{index, time.Now()})
}
