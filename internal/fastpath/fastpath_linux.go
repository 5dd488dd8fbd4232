package fastpath

import (
	"bytes"
	_ "embed" // for the programs
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"ipipd/internal/fib"
)

// object is bpf/ipip.c, compiled: a little-endian ELF, as are all platforms of ipipd.
//
//go:embed bpf/ipip.o
var object []byte

// objects are the programs and maps of object, loaded.
type objects struct {
	Encap *ebpf.Program `ebpf:"ipip_encap"`
	Decap *ebpf.Program `ebpf:"ipip_decap"`

	TxTunnels *ebpf.Map `ebpf:"tx_tunnels"`
	RxTunnels *ebpf.Map `ebpf:"rx_tunnels"`
	Counters  *ebpf.Map `ebpf:"counters"`
	IPIDs     *ebpf.Map `ebpf:"ip_ids"`
	Slots     *ebpf.Map `ebpf:"slots"`

	TxFIB      *ebpf.Map `ebpf:"tx_fib"`
	TxLengths  *ebpf.Map `ebpf:"tx_lengths"`
	Numbers    *ebpf.Map `ebpf:"numbers"`
	Remotes    *ebpf.Map `ebpf:"remotes"`
	AcceptFrom *ebpf.Map `ebpf:"accept_from"`
	AcceptTo   *ebpf.Map `ebpf:"accept_to"`

	LocalAddresses *ebpf.Map `ebpf:"local_addresses"`

	AliveUntil   *ebpf.Variable `ebpf:"alive_until"`
	CaptureRings *ebpf.Map      `ebpf:"capture_rings"`

	fib fibMap // the memory of TxFIB and TxLengths
}

func (o *objects) close() {
	o.fib.close()
	for _, p := range []*ebpf.Program{o.Encap, o.Decap} {
		_ = p.Close()
	}
	for _, m := range []*ebpf.Map{o.TxTunnels, o.RxTunnels, o.Counters, o.IPIDs, o.Slots, o.TxFIB, o.TxLengths, o.Numbers, o.Remotes, o.AcceptFrom, o.AcceptTo, o.LocalAddresses, o.CaptureRings} {
		_ = m.Close()
	}
}

func readObject() (*ebpf.CollectionSpec, error) {
	spec, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(object))
	if err != nil {
		return nil, fmt.Errorf("read the eBPF object: %w", err)
	}
	return spec, nil
}

// loadSpec loads the programs and creates the maps, except those in counts, which it uses as they are. linkHeader is the
// length in bytes of the link layer header of packets on egress: 0 on a TUN, 14 for BPF_PROG_TEST_RUN.
func loadSpec(spec *ebpf.CollectionSpec, linkHeader uint32, counts map[string]*ebpf.Map) (*objects, error) {
	o, hash := new(objects), fib.NewHash()
	if err := errors.Join(spec.Variables["link_header"].Set(linkHeader), spec.Variables["route_hash"].Set(hash)); err != nil {
		return nil, fmt.Errorf("read the eBPF object: %w", err)
	}
	err := spec.LoadAndAssign(o, &ebpf.CollectionOptions{MapReplacements: counts})
	if err != nil {
		return nil, explainLoad(err)
	}
	if o.fib, err = mapFIB(o.TxFIB, o.TxLengths, hash); err != nil {
		o.close()
		return nil, err
	}
	return o, nil
}

// FastPath holds the loaded programs of this process and the underlay devices that they
// are attached to. Its methods, and those of its Links, are safe for concurrent use. The unexported ones are called
// with mu held, but for beat and those that Open calls.
type FastPath struct {
	mu            sync.Mutex // guards the rest, but for aliveUntil
	objects       *objects   // nil when closed
	underlays     map[int]*underlay
	links         map[*Link]bool
	freeSlots     []uint32 // of closed Links
	nextSlot      uint32   // the lowest one never used so far
	encapID       ebpf.ProgramID
	encapName     string
	owners        map[rxKey]*Link // the Link that an entry in rx_tunnels belongs to
	reserved      map[rxKey]bool  // of Reserve
	reserveErr    error
	routes        map[uint32]*Routes // by ifindex
	remoteNumbers remoteNumbers
	local         map[[4]byte]bool // of SetLocalAddresses
	cpus          int              // possible CPUs: values per key of the map counters

	// See kept_linux.go.
	options    Options
	switched   bool
	left       bool
	keptLinks  map[int]link.Link // by device, until Switch
	keptSlots  map[uint32]uint32 // by ifindex, until Switch
	aliveUntil *ebpf.Variable
	stopBeat   func() // ends the heartbeat, and returns once it has ended; nil without one
}

// underlay is a device with ipip_decap attached.
type underlay struct {
	link  link.Link
	users int  // Links, and of Routes the remotes and the list of Senders
	old   bool // link still runs the program of the process before
}

// Open loads the programs. It fails with *Unavailable if this host does not support or
// permit that.
func Open(options Options) (f *FastPath, err error) {
	spec, err := readObject()
	if err != nil {
		return nil, err
	}
	f = &FastPath{options: options, underlays: make(map[int]*underlay), links: make(map[*Link]bool),
		owners: make(map[rxKey]*Link), routes: make(map[uint32]*Routes), local: make(map[[4]byte]bool), switched: len(options.Kept) == 0}
	counts := f.options.takeCounts(spec)
	defer func() {
		for _, m := range counts {
			_ = m.Close() // the objects have descriptors of their own
		}
	}()
	if f.objects, err = loadSpec(spec, 0, counts); err != nil {
		return nil, err
	}
	f.aliveUntil = f.objects.AliveUntil
	if err := f.open(spec, counts != nil); err != nil {
		f.objects.close()
		return nil, err
	}
	return f, nil
}

// open queries the loaded programs, and takes over or begins to keep what outlives the process.
func (f *FastPath) open(spec *ebpf.CollectionSpec, counted bool) (err error) {
	if f.cpus, err = ebpf.PossibleCPU(); err != nil {
		return fmt.Errorf("get the number of possible CPUs: %w", err)
	}
	info, err := f.objects.Encap.Info()
	if err != nil {
		return fmt.Errorf("query the eBPF program: %w", err)
	}
	f.encapID, _ = info.ID() // every kernel with tcx has program IDs
	f.encapName = info.Name
	if counted {
		if err := f.readSlots(); err != nil {
			return fmt.Errorf("read the counters of the process before: %w", err)
		}
	}
	if f.options.Manager != nil {
		if err := f.startBeating(); err != nil {
			return fmt.Errorf("tell the eBPF programs that the process is there: %w", err)
		}
		if !counted {
			f.options.keepCounts(spec, f.objects)
		}
	}
	f.keptLinks = f.options.takeLinks()
	return nil
}

// Encap returns ipip_encap, for the caller to attach to the TUN of each tunnel: its descriptor, which Close
// closes, its kernel ID and its name. After Close fd is -1.
func (f *FastPath) Encap() (fd int, id uint32, name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.objects == nil {
		return -1, 0, ""
	}
	return f.objects.Encap.FD(), uint32(f.encapID), f.encapName
}

// Close closes every Link and unloads the programs. It may be called more than once.
func (f *FastPath) Close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.objects == nil {
		return
	}
	f.stopBeating()
	if f.left {
		f.closeLeft()
		return
	}
	for l := range f.links {
		l.closeLocked()
	}
	if !f.switched { // the start has failed: the kept links and counters are left to the next process
		f.closeLeft()
		return
	}
	for _, r := range f.routes {
		r.empty()
		_ = r.receiveSenders(nil)
	}
	if f.options.Manager != nil {
		if spec, err := readObject(); err == nil {
			f.options.remove(keptCounts + layoutOf(spec))
		}
	}
	f.objects.close()
	f.objects = nil
}

// Link is a tunnel of the fast path.
type Link struct {
	f      *FastPath
	tunnel Tunnel
	slot   uint32
	counts []counters // Stats reads into it: one per CPU
	final  Stats      // at Close

	adopted  bool                        // the counters are of the process before
	orphaned uint64                      // see Adopted
	captured atomic.Pointer[captureRing] // nil unless it is captured; written with f.mu held
}

// Attach attaches ipip_decap to the underlay device of t, and enters t in the maps. It fails with
// *Unavailable if the kernel refuses. A tunnel that must not use the fast path yet is attached with both
// directions disabled, so that the Update that enables them opens no descriptor.
func (f *FastPath) Attach(t Tunnel) (*Link, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.objects == nil || f.left {
		return nil, ErrClosed
	}
	l := &Link{f: f, counts: make([]counters, f.cpus)}
	f.links[l] = true
	err := l.takeSlot(uint32(t.Ifindex))
	if err == nil {
		err = l.updateLocked(t)
	}
	if err != nil {
		l.closeLocked()
		return nil, err
	}
	return l, nil
}

// newCounters resets the slot's counters and IP ID, and makes the TUN ifindex its owner.
func (l *Link) newCounters(ifindex uint32) error {
	f := l.f
	if err := f.objects.Counters.Put(l.slot, l.counts); err != nil {
		return f.explainMap("counters", err)
	}
	if err := f.objects.IPIDs.Put(l.slot, rand.Uint32()); err != nil { // random, so that a restarted daemon does not reuse recent IDs (RFC 6864)
		return f.explainMap("the IP ID counter", err)
	}
	if err := f.objects.Slots.Put(l.slot, slotEntry{Ifindex: ifindex}); err != nil {
		return f.explainMap("the owner of the counters", err)
	}
	return nil
}

// open reports whether the Link may be used.
func (l *Link) open() bool { return l.f.links[l] && !l.f.left }

// Update replaces the configuration of the tunnel. It opens a descriptor if the underlay device
// is another, or has lost the program. After an error the tunnel is as after Disable.
func (l *Link) Update(t Tunnel) error {
	l.f.mu.Lock()
	defer l.f.mu.Unlock()
	if !l.open() {
		return ErrClosed
	}
	if l.captured.Load() == nil {
		t.Capture = Capture{}
	}
	err := l.updateLocked(t)
	if err != nil {
		l.disableLocked()
	}
	return err
}

// Enabled reports whether the tunnel is in the maps: an error in Routes or Reserve may have disabled it.
func (l *Link) Enabled() bool {
	l.f.mu.Lock()
	defer l.f.mu.Unlock()
	return l.f.links[l] && l.f.owners[l.tunnel.rxKey()] == l
}

// Disable makes all packets go to userspace until the next Update. ipip_decap stays attached.
func (l *Link) Disable() {
	l.f.mu.Lock()
	defer l.f.mu.Unlock()
	if l.open() {
		l.disableLocked()
	}
}

// disableLocked is Disable with f.mu held: it removes the tunnel from the maps.
func (l *Link) disableLocked() {
	l.deleteRxTunnel()
	l.tunnel.Local, l.tunnel.Remote = [4]byte{}, [4]byte{}
	_ = l.f.objects.TxTunnels.Delete(uint32(l.tunnel.Ifindex)) // absent if it is disabled
}

// updateLocked is Update with f.mu held. The maps follow ipip_decap, so that a tunnel is in them only
// if it is attached.
func (l *Link) updateLocked(t Tunnel) error {
	f, old := l.f, l.tunnel
	if t.UnderlayIfindex != old.UnderlayIfindex {
		if err := f.acquireUnderlay(t.UnderlayIfindex); err != nil {
			return err
		}
		l.tunnel.UnderlayIfindex = t.UnderlayIfindex
		f.releaseUnderlay(old.UnderlayIfindex)
	} else if err := f.reattachUnderlay(t.UnderlayIfindex); err != nil {
		return err
	}
	if t.Ifindex != old.Ifindex {
		_ = f.objects.TxTunnels.Delete(uint32(old.Ifindex)) // absent if it is disabled
		l.tunnel.Ifindex = t.Ifindex
		if old.Ifindex != 0 {
			_ = f.objects.Slots.Put(l.slot, slotEntry{Ifindex: uint32(t.Ifindex)}) // it replaces an entry
		}
	}
	if err := f.checkRoutes(&t); err != nil {
		return err
	}
	if err := l.putRxTunnel(&t); err != nil {
		return err
	}
	if err := f.objects.TxTunnels.Update(uint32(t.Ifindex), t.txTunnel(l.slot, f.tableOf(&t)), ebpf.UpdateAny); err != nil {
		return f.explainMap("the transmit entry of the tunnel", err)
	}
	l.tunnel = t
	return nil
}

// Stats returns the totals since Attach, until Close.
func (l *Link) Stats() (s Stats, err error) {
	l.f.mu.Lock()
	defer l.f.mu.Unlock()
	if !l.open() {
		return l.final, nil
	}
	return l.statsLocked()
}

// statsLocked is Stats with f.mu held.
func (l *Link) statsLocked() (s Stats, err error) {
	if err := l.f.objects.Counters.Lookup(l.slot, l.counts); err != nil {
		return s, fmt.Errorf("read the counters: %w", err)
	}
	var last uint64
	for i := range l.counts {
		c := &l.counts[i]
		s.RxPackets += c.RxPackets
		s.RxBytes += c.RxBytes
		s.TxPackets += c.TxPackets
		s.TxBytes += c.TxBytes
		s.TxFailed += c.TxFailed
		s.ReversePath += c.ReversePath
		s.NotInAcceptFrom += c.NotInAcceptFrom
		s.NotInAcceptTo += c.NotInAcceptTo
		s.Orphaned += c.Orphaned
		last = max(last, c.LastReceived)
	}
	s.LastReceived, err = monotonicToTime(last)
	return s, err
}

// monotonicToTime converts CLOCK_MONOTONIC nanoseconds; 0 gives the zero time.
func monotonicToTime(monotonic uint64) (time.Time, error) {
	if monotonic == 0 {
		return time.Time{}, nil
	}
	at, err := monotonicNow()
	if err != nil {
		return time.Time{}, err
	}
	now := time.Now()
	return now.Add(-max(0, at-time.Duration(monotonic))), nil
}

// monotonicNow returns the time of CLOCK_MONOTONIC, the clock of the eBPF programs.
func monotonicNow() (time.Duration, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return 0, os.NewSyscallError("clock_gettime", err)
	}
	return time.Duration(ts.Nano()), nil
}

// Close takes the tunnel out of the maps: its packets go to userspace again. It may be called
// more than once.
func (l *Link) Close() {
	l.CloseCapture()
	l.f.mu.Lock()
	defer l.f.mu.Unlock()
	l.closeLocked()
}

// closeLocked is Close with f.mu held.
func (l *Link) closeLocked() {
	f := l.f
	if !l.open() {
		return
	}
	delete(f.links, l)
	l.disableLocked()
	l.final, _ = l.statsLocked()
	f.releaseUnderlay(l.tunnel.UnderlayIfindex)
	l.giveSlot()
}

// allocSlot returns a free slot. Beyond MAX_TUNNELS the map update fails.
func (f *FastPath) allocSlot() uint32 {
	if n := len(f.freeSlots); n > 0 {
		slot := f.freeSlots[n-1]
		f.freeSlots = f.freeSlots[:n-1]
		return slot
	}
	f.nextSlot++
	return f.nextSlot - 1
}

// acquireUnderlay attaches ipip_decap to a device for its first user; 0 is none.
func (f *FastPath) acquireUnderlay(device int) error {
	if device == 0 {
		return nil
	}
	u := f.underlays[device]
	if kept := f.keptLinks[device]; u == nil && kept != nil {
		delete(f.keptLinks, device)
		u = &underlay{link: kept, old: true}
		f.underlays[device] = u
	} else if u == nil {
		attached, err := attach(device, f.objects.Decap)
		if err != nil {
			return err
		}
		u = &underlay{link: attached}
		f.underlays[device] = u
		f.keepLink(device, attached)
	}
	u.users++
	return nil
}

// reattachUnderlay attaches ipip_decap again if the device has lost it, for instance by moving
// to another network namespace and back with the same index.
func (f *FastPath) reattachUnderlay(device int) error {
	u := f.underlays[device]
	if u == nil || isAttached(u.link) {
		return nil
	}
	attached, err := attach(device, f.objects.Decap)
	if err != nil {
		return err
	}
	f.endLink(device, u.link)
	u.link, u.old = attached, false
	f.keepLink(device, attached)
	return nil
}

// releaseUnderlay detaches ipip_decap with the last user of the device.
func (f *FastPath) releaseUnderlay(device int) {
	u := f.underlays[device]
	if u == nil {
		return // index 0
	}
	if u.users--; u.users > 0 {
		return
	}
	delete(f.underlays, device)
	if u.old {
		f.keptLinks[device] = u.link
		return
	}
	f.endLink(device, u.link)
}
