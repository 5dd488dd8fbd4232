package fastpath

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// With a Manager the tcx links, one for each underlay device, and the maps that count (counters, ip_ids and
// slots) outlive the process. A link holds its program, the filter on a kept TUN holds another one, and the
// programs hold the maps of their process, which say how to carry packets: these stay as they were. The next
// process loads its programs with maps of its own, fills them, and makes the links run them (Switch): no
// packet is treated by half a configuration, and no map has the layout of another version. Only the maps that
// count are taken over as they are; with another layout they begin anew.

const (
	keptCounts = "fast-path-counts-" // followed by layoutOf
	keptLink   = "fast-path-link-"   // followed by the ifindex of the device
)

// Set by the linker in tests.
var (
	// otherLayout, if it is not empty, makes layoutOf return another digest.
	otherLayout string
	// aliveFor is how long the programs go on carrying packets after the process has ended: longer than
	// an upgrade takes.
	aliveFor = "60s"
)

// keptMaps are the maps that count, by name.
var keptMaps = []string{"counters", "ip_ids", "slots"}

// layoutOf returns a digest of the layout of keptMaps.
func layoutOf(spec *ebpf.CollectionSpec) string {
	h := sha256.New()
	for _, name := range keptMaps {
		m := spec.Maps[name]
		fmt.Fprintln(h, name, m.Type, m.KeySize, m.ValueSize, m.MaxEntries, m.Flags)
		if s, ok := btf.UnderlyingType(m.Value).(*btf.Struct); ok {
			for _, member := range s.Members {
				fmt.Fprintln(h, member.Name, member.Offset)
			}
		}
	}
	fmt.Fprint(h, otherLayout)
	return fmt.Sprintf("%x", h.Sum(nil)[:8])
}

// takeCounts takes the maps that count from Options.Kept; nil if there are none, or with another layout than in spec.
func (o *Options) takeCounts(spec *ebpf.CollectionSpec) map[string]*ebpf.Map {
	want, counts := keptCounts+layoutOf(spec), map[string]*ebpf.Map{}
	err := error(nil)
	for _, name := range o.Kept.Names() {
		if !strings.HasPrefix(name, keptCounts) {
			continue
		}
		fds := o.Kept.Take(name)
		if name != want || o.Anew {
			err = errors.New("the maps of the process before have another layout")
			closeAll(fds)
			o.remove(name)
			continue
		}
		for _, fd := range fds {
			m, failed := ebpf.NewMapFromFD(fd) // closes fd if it fails
			if failed != nil {
				err = fmt.Errorf("what is kept as the counters is no map: %w", failed)
				continue
			}
			info, failed := m.Info()
			if failed != nil || spec.Maps[info.Name] == nil || counts[info.Name] != nil || spec.Maps[info.Name].Compatible(m) != nil {
				err = errors.New("a map that is kept as one of the counters is none of them")
				_ = m.Close()
				continue
			}
			counts[info.Name] = m
		}
		if len(counts) != len(keptMaps) && err == nil {
			err = fmt.Errorf("%d of the %d maps that count are kept", len(counts), len(keptMaps))
		}
		if err != nil {
			o.remove(name)
		}
	}
	if err == nil && len(counts) > 0 {
		return counts
	}
	for _, m := range counts {
		_ = m.Close()
	}
	if err != nil && !o.Anew { // with Anew the caller knows
		o.cold("counters", err)
	}
	return nil
}

// keepCounts stores the descriptors of the maps that count at the Manager.
func (o *Options) keepCounts(spec *ebpf.CollectionSpec, maps *objects) {
	err := o.Manager.Store(keptCounts+layoutOf(spec), maps.Counters.FD(), maps.IPIDs.FD(), maps.Slots.FD())
	if err != nil {
		o.cold("counters, which do not outlive this process", err)
	}
}

// takeLinks takes the links from Options.Kept. They run the programs of the process before.
func (o *Options) takeLinks() map[int]link.Link {
	links := map[int]link.Link{}
	for _, name := range o.Kept.Names() {
		number, ok := strings.CutPrefix(name, keptLink)
		if !ok {
			continue
		}
		device, _ := strconv.Atoi(number)
		var err error
		for _, fd := range o.Kept.Take(name) {
			l, wrong := adoptLink(fd, device)
			switch {
			case wrong != nil:
				err = wrong
			case l != nil && links[device] == nil:
				links[device] = l
			case l != nil:
				_ = l.Close()
			}
		}
		if links[device] == nil {
			o.remove(name)
		}
		if err != nil {
			o.cold("programs on a device", fmt.Errorf("%s: %w", deviceName(device), err))
		}
	}
	return links
}

// adoptLink returns the link of a descriptor, which it owns from now on; nil if the device is gone, or has moved.
func adoptLink(fd, device int) (link.Link, error) {
	l, err := link.NewFromFD(fd) // closes fd if it fails
	if err != nil {
		return nil, fmt.Errorf("what is kept as a link is none: %w", err)
	}
	info, err := l.Info()
	switch {
	case err != nil, info.TCX() == nil, ebpf.AttachType(info.TCX().AttachType) != ebpf.AttachTCXIngress:
		err = errors.New("what is kept as a link to the ingress of a device is another one")
	case int(info.TCX().Ifindex) == device:
		return l, nil
	case info.TCX().Ifindex != 0:
		err = errors.New("what is kept as the link to a device is one to another")
	}
	_ = l.Close()
	return nil, err
}

func (o *Options) remove(name string) {
	if err := o.Manager.Remove(name); err != nil {
		o.cold("descriptors that stay at the service manager", err)
	}
}

func (o *Options) cold(what string, err error) {
	if o.Cold != nil {
		o.Cold(what, err)
	}
}

func linkName(device int) string { return keptLink + strconv.Itoa(device) }

// keepLink stores the descriptor of the link to a device at the Manager, if there is one.
func (f *FastPath) keepLink(device int, l link.Link) {
	if f.options.Manager == nil {
		return
	}
	err := fmt.Errorf("%T has no descriptor", l)
	if raw, ok := l.(interface{ FD() int }); ok {
		err = f.options.Manager.Store(linkName(device), raw.FD())
	}
	if err != nil {
		f.options.cold("program on "+deviceName(device)+", which does not outlive this process", err)
	}
}

// endLink detaches ipip_decap from a device: it closes the link, and has the Manager remove it.
func (f *FastPath) endLink(device int, l link.Link) {
	if f.options.Manager != nil {
		f.options.remove(linkName(device))
	}
	_ = l.Close() // fails if the device is gone
}

// Switched reports whether all hooks run the programs of this process: false until Switch, if a process before
// has left any.
func (f *FastPath) Switched() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.switched
}

// Switch makes the links of the process before run the program of this one, each atomically. It closes the links that
// no Link of this process needs, and frees the counters that none has adopted.
func (f *FastPath) Switch() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.switched || f.objects == nil || f.left {
		return
	}
	f.switched = true
	for device, u := range f.underlays {
		if !u.old {
			continue
		}
		u.old = false
		if !isAttached(u.link) { // Update attaches it again
			continue
		}
		if err := u.link.Update(f.objects.Decap); err != nil {
			f.options.cold("program on "+deviceName(device), err)
			f.endLink(device, u.link)
			if again, err := attach(device, f.objects.Decap); err == nil {
				u.link = again
				f.keepLink(device, again)
			}
		}
	}
	for device, l := range f.keptLinks {
		f.endLink(device, l)
	}
	f.keptLinks = nil
	for _, slot := range f.keptSlots {
		f.freeSlot(slot)
	}
	f.keptSlots = nil
}

// Leave ends this process's use of the fast path without detaching anything: the Manager has the links and counters, and
// the programs go on. No Link can be used afterwards; Close closes the descriptors.
func (f *FastPath) Leave() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.objects == nil || f.left {
		return
	}
	f.left = true
	for l := range f.links {
		l.final, _ = l.statsLocked()
	}
	f.stopBeating()
}

// closeLeft is Close after Leave.
func (f *FastPath) closeLeft() {
	for _, u := range f.underlays {
		_ = u.link.Close()
	}
	for _, l := range f.keptLinks {
		_ = l.Close()
	}
	clear(f.links)
	f.objects.close()
	f.objects = nil
}

// The kernel carries packets for aliveFor after the last beat.

func (f *FastPath) startBeating() error {
	most, err := time.ParseDuration(aliveFor)
	if err != nil {
		return err
	}
	if err := f.beat(most); err != nil {
		return err
	}
	stop, ended := make(chan struct{}), make(chan struct{})
	f.stopBeat = func() {
		close(stop)
		<-ended
	}
	go func() {
		defer close(ended)
		tick := time.NewTicker(most / 4)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				_ = f.beat(most) // it has worked before, and writes to mapped memory only
			}
		}
	}()
	return nil
}

func (f *FastPath) beat(most time.Duration) error {
	now, err := monotonicNow()
	if err != nil {
		return err
	}
	return f.aliveUntil.Set(uint64(now + most))
}

func (f *FastPath) stopBeating() {
	if f.stopBeat != nil {
		f.stopBeat()
		f.stopBeat = nil
	}
}

// Slots are taken over by the ifindex of the TUN.

// slotEntry is a value of the map slots.
type slotEntry struct {
	Ifindex  uint32 // 0 is none
	Orphaned uint32 // the low bits of counters.Orphaned when it was last reported
}

// readSlots finds the slots of the process before.
func (f *FastPath) readSlots() error {
	n := f.objects.Slots.MaxEntries()
	keys, values := make([]uint32, n), make([]slotEntry, n)
	var cursor ebpf.MapBatchCursor
	count, err := f.objects.Slots.BatchLookup(&cursor, keys, values, nil)
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return err
	}
	f.keptSlots = map[uint32]uint32{}
	for i := range count {
		if ifindex := values[i].Ifindex; ifindex != 0 {
			f.keptSlots[ifindex] = keys[i]
			f.nextSlot = max(f.nextSlot, keys[i]+1)
		}
	}
	for slot := range f.nextSlot {
		if values[slot].Ifindex == 0 {
			f.freeSlots = append(f.freeSlots, slot)
		}
	}
	return nil
}

// takeSlot gives a Link its slot: the one that the process before had for the same TUN, whose counters go on, or one
// with new counters.
func (l *Link) takeSlot(ifindex uint32) error {
	f := l.f
	if slot, ok := f.keptSlots[ifindex]; ok {
		delete(f.keptSlots, ifindex)
		l.slot, l.adopted = slot, true
		return l.readOrphaned(ifindex)
	}
	l.slot = f.allocSlot()
	return l.newCounters(ifindex)
}

// readOrphaned sets l.orphaned to the packets counted since the last report, and notes that they are reported.
func (l *Link) readOrphaned(ifindex uint32) error {
	var entry slotEntry
	if err := l.f.objects.Slots.Lookup(l.slot, &entry); err != nil {
		return err
	}
	s, err := l.statsLocked()
	if err != nil {
		return err
	}
	l.orphaned = s.Orphaned - uint64(entry.Orphaned)
	return l.f.objects.Slots.Put(l.slot, slotEntry{ifindex, uint32(s.Orphaned)})
}

// giveSlot frees the slot. Before Switch an adopted one can be adopted again instead.
func (l *Link) giveSlot() {
	if f := l.f; l.adopted && !f.switched {
		f.keptSlots[uint32(l.tunnel.Ifindex)] = l.slot
	} else {
		f.freeSlot(l.slot)
	}
}

func (f *FastPath) freeSlot(slot uint32) {
	_ = f.objects.Slots.Put(slot, slotEntry{})
	f.freeSlots = append(f.freeSlots, slot)
}

// Adopted reports whether the counters are those of the process before, and how many packets after its end were left to
// userspace, where no process was: those that came later than aliveFor.
func (l *Link) Adopted() (adopted bool, orphaned uint64) { return l.adopted, l.orphaned }

func closeAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
}
