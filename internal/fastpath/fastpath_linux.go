package fastpath

import (
	"bytes"
	_ "embed" // for the programs
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// object is bpf/ipip.c, compiled. It is little-endian, as are the processors that
// ipipd is built for.
//
//go:embed bpf/ipip.o
var object []byte

// objects are what is in it.
type objects struct {
	Send    *ebpf.Program `ebpf:"send"`
	Receive *ebpf.Program `ebpf:"receive"`

	Paths       *ebpf.Map `ebpf:"paths"`
	Ends        *ebpf.Map `ebpf:"ends"`
	Counts      *ebpf.Map `ebpf:"counts"`
	Identifiers *ebpf.Map `ebpf:"identifiers"`
}

func (o *objects) close() {
	for _, p := range []*ebpf.Program{o.Send, o.Receive} {
		_ = p.Close()
	}
	for _, m := range []*ebpf.Map{o.Paths, o.Ends, o.Counts, o.Identifiers} {
		_ = m.Close()
	}
}

// load verifies the programs and makes the maps. linkHeader is the length of what
// stands in front of the packets that send sees.
func load(linkHeader uint32) (*objects, error) {
	spec, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(object))
	if err != nil {
		return nil, fmt.Errorf("read the eBPF object: %w", err)
	}
	if err := spec.Variables["link_header"].Set(linkHeader); err != nil {
		return nil, fmt.Errorf("read the eBPF object: %w", err)
	}
	o := new(objects)
	if err := spec.LoadAndAssign(o, nil); err != nil {
		return nil, explainLoad(err)
	}
	return o, nil
}

// FastPath is the programs of a process, and the underlay devices that they are
// attached to. Its methods, and those of its Links, may be called by several
// goroutines.
type FastPath struct {
	mu        sync.Mutex
	objects   *objects // nil when closed
	underlays map[int]*underlay
	links     map[*Link]bool
	slots     []uint32 // that are free again
	taken     uint32   // slots that have ever been
	sendID    ebpf.ProgramID
	// cpus is how many counters of each kind there are.
	cpus int
}

// underlay is a device that has the receiving program.
type underlay struct {
	link  link.Link
	users int
}

// Open loads the programs. Its error is an *Unavailable if it is this host that
// does not permit it.
func Open() (*FastPath, error) {
	o, err := load(0)
	if err != nil {
		return nil, err
	}
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		o.close()
		return nil, fmt.Errorf("count the processors: %w", err)
	}
	info, err := o.Send.Info()
	if err != nil {
		o.close()
		return nil, fmt.Errorf("look at the eBPF program: %w", err)
	}
	id, _ := info.ID() // every kernel with tcx has IDs
	return &FastPath{objects: o, sendID: id, underlays: make(map[int]*underlay), links: make(map[*Link]bool), cpus: cpus}, nil
}

// Close ends every Link and unloads the programs. It may be called more than once.
func (f *FastPath) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.objects == nil {
		return nil
	}
	var errs []error
	for l := range f.links {
		errs = append(errs, l.close())
	}
	f.objects.close()
	f.objects = nil
	return errors.Join(errs...)
}

// Link is a tunnel whose packets are carried.
type Link struct {
	f      *FastPath
	egress link.Link
	tunnel Tunnel
	slot   uint32
	counts []counters // one for each processor, for reading
}

// Attach carries the packets of t from now on.
func (f *FastPath) Attach(t Tunnel) (_ *Link, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.objects == nil {
		return nil, ErrClosed
	}
	l := &Link{f: f, counts: make([]counters, f.cpus)}
	defer func() {
		if err != nil {
			_ = l.close()
		}
	}()
	l.tunnel.Device = t.Device
	l.slot = f.slot()
	f.links[l] = true
	if err := f.objects.Counts.Put(l.slot, l.counts); err != nil {
		return nil, f.explainMap("counters", err)
	}
	// A restarted daemon is not to repeat what it has just used.
	if err := f.objects.Identifiers.Put(l.slot, rand.Uint32()); err != nil {
		return nil, f.explainMap("an identifier", err)
	}
	if err := l.update(t); err != nil {
		return nil, err
	}
	l.egress, err = attach(t.Device, f.objects.Send, ebpf.AttachTCXEgress)
	if err != nil {
		return nil, err
	}
	return l, nil
}

// Update replaces what the programs know of the tunnel. If it fails, they know the
// old or the new, or of one direction the old: Close then.
func (l *Link) Update(t Tunnel) error {
	l.f.mu.Lock()
	defer l.f.mu.Unlock()
	if !l.f.links[l] {
		return ErrClosed
	}
	if t.Device != l.tunnel.Device {
		return fmt.Errorf("a tunnel keeps its device: was %d, is %d", l.tunnel.Device, t.Device)
	}
	return l.update(t)
}

// update is Update for a caller who holds mu.
func (l *Link) update(t Tunnel) error {
	f, old := l.f, l.tunnel
	if t.Underlay != old.Underlay {
		if err := f.hold(t.Underlay); err != nil {
			return err
		}
		l.tunnel.Underlay = t.Underlay
		f.release(old.Underlay)
	} else if err := f.renew(t.Underlay); err != nil {
		return err
	}
	if key := t.addresses(); key != old.addresses() {
		if err := f.objects.Ends.Update(key, t.end(l.slot), ebpf.UpdateNoExist); err != nil {
			return f.explainMap("this end of a tunnel", err)
		}
		l.removeEnd()
		l.tunnel.Local, l.tunnel.Remote = t.Local, t.Remote
	} else if err := f.objects.Ends.Update(key, t.end(l.slot), ebpf.UpdateExist); err != nil {
		return f.explainMap("this end of the tunnel", err)
	}
	if err := f.objects.Paths.Update(uint32(t.Device), t.path(l.slot), ebpf.UpdateAny); err != nil {
		return f.explainMap("the path of the tunnel", err)
	}
	l.tunnel = t
	return nil
}

// Stats are what was counted so far.
func (l *Link) Stats() (s Stats, err error) {
	l.f.mu.Lock()
	defer l.f.mu.Unlock()
	if !l.f.links[l] {
		return s, ErrClosed
	}
	if err := l.f.objects.Counts.Lookup(l.slot, l.counts); err != nil {
		return s, fmt.Errorf("read the counters: %w", err)
	}
	var heard uint64
	for i := range l.counts {
		c := &l.counts[i]
		s.RxPackets += c.RxPackets
		s.RxBytes += c.RxBytes
		s.TxPackets += c.TxPackets
		s.TxBytes += c.TxBytes
		s.TxFailed += c.TxFailed
		heard = max(heard, c.Heard)
	}
	s.Heard, err = onClock(heard)
	return s, err
}

// onClock turns nanoseconds of CLOCK_MONOTONIC into a time, 0 into the zero one.
func onClock(monotonic uint64) (time.Time, error) {
	if monotonic == 0 {
		return time.Time{}, nil
	}
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return time.Time{}, os.NewSyscallError("clock_gettime", err)
	}
	now := time.Now()
	return now.Add(-max(0, time.Duration(ts.Nano()-int64(monotonic)))), nil
}

// Close leaves the tunnel's packets to userspace again. It may be called more than
// once.
func (l *Link) Close() error {
	l.f.mu.Lock()
	defer l.f.mu.Unlock()
	return l.close()
}

// close is Close for a caller who holds mu.
func (l *Link) close() error {
	f := l.f
	if !f.links[l] {
		return nil
	}
	delete(f.links, l)
	var err error
	if l.egress != nil {
		err = l.egress.Close()
	}
	l.removeEnd()
	f.release(l.tunnel.Underlay)
	_ = f.objects.Paths.Delete(uint32(l.tunnel.Device)) // it may not have come to be
	f.slots = append(f.slots, l.slot)
	return err
}

// slot is one that is free. That there are not so many, the kernel says.
func (f *FastPath) slot() uint32 {
	if n := len(f.slots); n > 0 {
		slot := f.slots[n-1]
		f.slots = f.slots[:n-1]
		return slot
	}
	f.taken++
	return f.taken - 1
}

func (l *Link) removeEnd() {
	if l.tunnel.Local != l.tunnel.Remote { // both zero: not yet described
		_ = l.f.objects.Ends.Delete(l.tunnel.addresses())
	}
}

// hold attaches the receiving program to a device, unless it is there.
func (f *FastPath) hold(device int) error {
	u := f.underlays[device]
	if u == nil {
		attached, err := attach(device, f.objects.Receive, ebpf.AttachTCXIngress)
		if err != nil {
			return err
		}
		u = &underlay{link: attached}
		f.underlays[device] = u
	}
	u.users++
	return nil
}

// renew attaches it once more to a device that has lost it: one that was taken away,
// or to another network namespace, and came back with the same index.
func (f *FastPath) renew(device int) error {
	u := f.underlays[device]
	info, err := u.link.Info()
	if err != nil {
		return fmt.Errorf("look at the link to the underlay device: %w", err)
	}
	if tcx := info.TCX(); tcx != nil && tcx.Ifindex != 0 {
		return nil
	}
	attached, err := attach(device, f.objects.Receive, ebpf.AttachTCXIngress)
	if err != nil {
		return err
	}
	_ = u.link.Close()
	u.link = attached
	return nil
}

// release takes it away again when the last tunnel has gone.
func (f *FastPath) release(device int) {
	u := f.underlays[device]
	if u == nil {
		return // 0: none yet
	}
	if u.users--; u.users == 0 {
		_ = u.link.Close() // fails if the device has gone before
		delete(f.underlays, device)
	}
}
