package fastpath

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"ipipd/internal/fib"
)

// As in bpf/many.h: the widths of the fields of a route's 64-bit word, and the values of its last field that are no
// number of a remote.
const (
	toBits     = 14
	tableBits  = 12
	lengthBits = 6

	maxRemotes = 16376
	toSeveral  = maxRemotes
	toDirect   = maxRemotes + 1
	toNowhere  = maxRemotes + 2
	toMixed    = maxRemotes + 3

	maxTables    = 1 << tableBits
	bucketsLog   = 15
	bucketRoutes = 8
	// maxRoutes keeps the table at most half full: that both buckets of a route are full is then very unlikely.
	maxRoutes = 1 << bucketsLog * bucketRoutes / 2
)

// fibMap is the mapped memory of the maps tx_fib and tx_lengths. The eBPF programs read it at the same time, so that
// each change is one atomic store. f.mu guards it.
type fibMap struct {
	routes  []uint64 // in buckets of bucketRoutes; 0 is a free place
	lengths []uint64 // of each table: bit n is set if it has prefixes of n bits
	hash    fib.Hash
}

// mapFIB maps the memory of both maps.
func mapFIB(routes, lengths *ebpf.Map, hash fib.Hash) (f fibMap, err error) {
	f.hash = hash
	if f.routes, err = mapWords(routes); err != nil {
		return f, err
	}
	if f.lengths, err = mapWords(lengths); err != nil {
		f.close()
	}
	return f, err
}

// mapWords maps the memory of an array map.
func mapWords(m *ebpf.Map) ([]uint64, error) {
	size := int(m.ValueSize() * m.MaxEntries())
	b, err := unix.Mmap(m.FD(), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map the memory of an eBPF map: %w", err)
	}
	return unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(b))), size/8), nil
}

func (f *fibMap) close() {
	for _, words := range [][]uint64{f.routes, f.lengths} {
		if words != nil {
			_ = unix.Munmap(unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(words))), 8*len(words)))
		}
	}
	f.routes, f.lengths = nil, nil
}

// routeKey returns a route's word without its last field: prefix, its length, and table.
func routeKey(table uint32, p netip.Prefix) uint64 {
	p = p.Masked()
	a := p.Addr().As4()
	return (uint64(binary.BigEndian.Uint32(a[:]))<<lengthBits|uint64(p.Bits()))<<tableBits | uint64(table)
}

// buckets returns the two buckets that may hold the route of a key, in the order in which they are looked up.
func (f *fibMap) buckets(key uint64) (both [2][]uint64) {
	hash := f.hash.Of(key)
	for i := range both {
		at := hash >> (64 - bucketsLog) * bucketRoutes
		both[i] = f.routes[at:][:bucketRoutes]
		hash <<= bucketsLog
	}
	return both
}

// find returns the place of the route of a key; nil if there is none.
func (f *fibMap) find(key uint64) *uint64 {
	for _, bucket := range f.buckets(key) {
		for i := range bucket {
			if bucket[i]>>toBits == key {
				return &bucket[i]
			}
		}
	}
	return nil
}

// set writes the route of a prefix: to is the number of a remote, or toSeveral and so on. It reports false if both
// buckets are full.
func (f *fibMap) set(table uint32, p netip.Prefix, to uint32) bool {
	key := routeKey(table, p)
	at := f.find(key)
	if at == nil {
		at = f.place(key)
	}
	if at == nil {
		return false
	}
	atomic.StoreUint64(at, key<<toBits|uint64(to))
	return true
}

// place returns a free place for a new route; nil if both buckets are full. It is in the first bucket, which is looked
// up first, unless that is more than half full and the second one has fewer routes.
func (f *fibMap) place(key uint64) *uint64 {
	var free [2]*uint64
	var taken [2]int
	for i, bucket := range f.buckets(key) {
		for j := range bucket {
			if bucket[j] != 0 {
				taken[i]++
			} else if free[i] == nil {
				free[i] = &bucket[j]
			}
		}
	}
	if free[0] == nil || taken[0] > bucketRoutes/2 && taken[1] < taken[0] {
		return free[1]
	}
	return free[0]
}

func (f *fibMap) remove(table uint32, p netip.Prefix) {
	if at := f.find(routeKey(table, p)); at != nil {
		atomic.StoreUint64(at, 0)
	}
}

// setLengths makes look-ups in a table try only the lengths that it has prefixes of: prefixes has their number by length.
func (f *fibMap) setLengths(table uint32, prefixes *[33]int) {
	var word uint64
	for length, n := range prefixes {
		if n > 0 {
			word |= 1 << length
		}
	}
	atomic.StoreUint64(&f.lengths[table], word)
}

// remoteNumbers allocates the indexes of the map remotes. f.mu guards them.
type remoteNumbers struct {
	next  uint32 // the lowest one never taken so far
	freed []freedNumber
}

type freedNumber struct {
	number uint32
	at     time.Time
}

// reuseAfter is how long a freed number stays unused: longer than an eBPF program may take from the look-up of a route
// to that of its remote.
const reuseAfter = time.Second

// take returns a free number; not ok if there is none.
func (n *remoteNumbers) take() (number uint32, ok bool) {
	switch {
	case len(n.freed) > 0 && time.Since(n.freed[0].at) >= reuseAfter:
		number, n.freed = n.freed[0].number, n.freed[1:]
	case n.next < maxRemotes:
		number = n.next
		n.next++
	default:
		return 0, false
	}
	return number, true
}

func (n *remoteNumbers) free(number uint32) {
	n.freed = append(n.freed, freedNumber{number, time.Now()})
}
