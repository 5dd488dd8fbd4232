package fastpath

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"

	"ipipd/internal/privileged"
)

// captureRingBytes is the size of the ring of a Link, a power of two.
const captureRingBytes = 4 << 20

// captureRecord is a struct capture_record of bpf/capture.h.
type captureRecord struct {
	At           uint64 // CLOCK_MONOTONIC, ns
	Length, Kept uint32
	Direction    uint8
	Why          uint8
	Changed, TOS uint8
	Checksum     [2]byte
	Unused       [3]uint16
	Outer        [20]byte
}

// captureRing is the ring buffer that the programs copy a Link's packets into, while there is a capture.
type captureRing struct {
	mu     sync.Mutex // lets one goroutine read at a time; once l.captured has the ring, not taken with f.mu held
	ring   *ebpf.Map
	reader *ringbuf.Reader
	record ringbuf.Record
	seen   uint64 // counters.NotCaptured when it was last reported
	drops  uint64 // counters.DropsNotCaptured when it was last reported
	closed bool
}

// OpenCapture makes the ring buffer that Tunnel.Capture needs, unless the Link has one. It opens descriptors. It
// fails with *Unavailable if the kernel refuses.
func (l *Link) OpenCapture() error {
	l.f.mu.Lock()
	defer l.f.mu.Unlock()
	if !l.f.links[l] {
		return ErrClosed
	}
	if l.captured.Load() != nil {
		return nil
	}
	c, err := l.newCaptureRing()
	if err != nil {
		return explainCapture(err)
	}
	l.captured.Store(c)
	return nil
}

// NewCaptureRing makes the ring buffer of a Link, which takes CAP_BPF. The caller closes it.
func NewCaptureRing() (*ebpf.Map, error) {
	return ebpf.NewMap(&ebpf.MapSpec{Name: "capture_ring", Type: ebpf.RingBuf, MaxEntries: captureRingBytes})
}

// openCaptureRing calls NewCaptureRing, or has the parent process call it if this one has given up CAP_BPF.
func openCaptureRing() (*ebpf.Map, error) {
	if !privileged.Brokered() {
		return NewCaptureRing()
	}
	fd, err := privileged.RingBuffer()
	if err != nil {
		return nil, err
	}
	return ebpf.NewMapFromFD(fd) // closes fd if it fails
}

func (l *Link) newCaptureRing() (_ *captureRing, err error) {
	c := new(captureRing)
	if c.ring, err = openCaptureRing(); err != nil {
		return nil, err
	}
	if c.reader, err = ringbuf.NewReader(c.ring); err != nil {
		_ = c.ring.Close()
		return nil, err
	}
	c.reader.SetDeadline(time.Unix(1, 0)) // a read does not wait
	if c.seen, c.drops, err = l.notCaptured(); err == nil {
		err = l.f.objects.CaptureRings.Put(l.slot, c.ring)
	}
	if err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

func explainCapture(err error) error {
	if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) {
		return &Unavailable{"no file descriptor is left for a ring buffer: raise the limit (LimitNOFILE=, ulimit -n)", err}
	}
	if errors.Is(err, unix.EPERM) {
		return &Unavailable{"a ring buffer of the kernel takes CAP_BPF, which is missing, under ipipd keep for keep", unix.EPERM}
	}
	return &Unavailable{"there is no ring buffer for the eBPF programs", err}
}

// CloseCapture closes the ring buffer of OpenCapture, if there is one. Captured returns nothing more.
func (l *Link) CloseCapture() {
	l.f.mu.Lock()
	c := l.captured.Swap(nil)
	if c != nil && l.f.objects != nil {
		_ = l.f.objects.CaptureRings.Delete(l.slot)
	}
	l.f.mu.Unlock()
	if c != nil {
		c.close()
	}
}

func (c *captureRing) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	_ = c.reader.Close()
	_ = c.ring.Close()
}

// notCaptured returns the counters of the packets that the ring buffer had no room for: those carried, those dropped.
func (l *Link) notCaptured() (n, drops uint64, err error) {
	if err := l.f.objects.Counters.Lookup(l.slot, l.counts); err != nil {
		return 0, 0, fmt.Errorf("read the counters: %w", err)
	}
	for i := range l.counts {
		n += l.counts[i].NotCaptured
		drops += l.counts[i].DropsNotCaptured
	}
	return n, drops, nil
}

// Captured calls visit with the packets of the fast path since the last call, as long as more returns true. A
// *Captured is valid until visit returns. Several goroutines may call it: each packet goes to one of them. n is
// how many packets it has read.
func (l *Link) Captured(more func() bool, visit func(*Captured)) (n int, err error) {
	c := l.captured.Load()
	if c == nil {
		return 0, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return 0, nil
	}
	var p Captured
	var since time.Duration // monotonicEpoch
	for more() {
		if err := c.reader.ReadInto(&c.record); err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, os.ErrClosed) {
				return n, nil
			}
			return n, fmt.Errorf("read the captured packets of the fast path: %w", err)
		}
		if n == 0 {
			if since, err = monotonicEpoch(); err != nil {
				return 0, err
			}
		}
		n++
		if p.parse(c.record.RawSample, since) {
			visit(&p)
		}
	}
	return n, nil
}

// parse decodes a captureRecord; false if b is none. since is monotonicEpoch.
func (c *Captured) parse(b []byte, since time.Duration) bool {
	const size = int(unsafe.Sizeof(captureRecord{}))
	if len(b) < size {
		return false
	}
	r := (*captureRecord)(unsafe.Pointer(&b[0]))
	const header = int(unsafe.Offsetof(r.Outer))
	if int(r.Kept) > len(b)-size {
		return false
	}
	*c = Captured{
		At: time.Unix(0, int64(since)+int64(r.At)), Outbound: r.Direction == 0, Why: Why(r.Why), Length: int(r.Length),
		Outer: b[header:][:len(r.Outer)+int(r.Kept)], tos: r.TOS, checksum: r.Checksum, changed: r.Changed != 0,
	}
	return true
}

// monotonicEpoch returns when CLOCK_MONOTONIC was 0, as the time since 1970.
func monotonicEpoch() (time.Duration, error) {
	at, err := monotonicNow()
	return time.Duration(time.Now().UnixNano()) - at, err
}

// NotCaptured returns how many packets did not fit into the ring buffer since the last call: n that the fast path
// carried, and drops that it dropped.
func (l *Link) NotCaptured() (n, drops uint64, err error) {
	l.f.mu.Lock()
	defer l.f.mu.Unlock()
	c := l.captured.Load()
	if c == nil || !l.f.links[l] {
		return 0, 0, nil
	}
	if n, drops, err = l.notCaptured(); err != nil {
		return 0, 0, err
	}
	c.seen, n = n, n-c.seen
	c.drops, drops = drops, drops-c.drops
	return n, drops, nil
}
