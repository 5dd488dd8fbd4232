package encap

import (
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"ipipd/internal/packet"
)

// direct sends frames by a socket of the family AF_XDP in its copy mode: the kernel
// makes a packet of each and calls the driver, one system call for all of them. That
// is a quarter less work than a message for each, and past everything between a socket
// and the driver.
//
// The kernel has copied a frame when the system call ends, so none is left in tx, and
// its memory is free again. An interface's queue takes one such socket, which its senders
// share.
type direct struct {
	device int

	mu     sync.Mutex // held while it sends
	closed bool
	fd     int
	frames []byte // the memory that frames lie in (UMEM), frameSize bytes for each
	tx     ring   // what is to be sent
	done   ring   // what the receiver's stack has taken
	// descriptors of tx, and how many there were in all, modulo 2^32.
	descriptors *[directRing]unix.XDPDesc
	produced    uint32
}

// ring is one that the kernel and we share: the counts of what was put in and taken out.
type ring struct {
	memory             []byte
	produced, consumed *uint32
}

const (
	directRing = 256 // frames; a power of two
	frameSize  = 2048
	// directUnderWay is how many packets the receiver's stack may leave untaken; as
	// many as fit into sendBuffer, or more. A power of two.
	directUnderWay = 2048
	// directFew is how many packets are worth it.
	directFew = 8
)

// SetDirect opens or closes the socket for direct transmission.
func (s *socket) SetDirect(device int) error {
	s.switching.Lock()
	defer s.switching.Unlock()
	defer s.door.Leave()
	if !s.door.Enter() {
		return os.ErrClosed
	}
	old := s.direct.Load()
	if old != nil && old.device == device || old == nil && device == 0 {
		return nil
	}
	s.endDirect(old)
	if device == 0 {
		return nil
	}
	d, err := openDirect(device)
	if err == nil {
		s.direct.Store(d)
	}
	return err
}

// endDirect closes d, if it is the one in use.
func (s *socket) endDirect(d *direct) {
	if d != nil && s.direct.CompareAndSwap(d, nil) {
		d.close()
	}
}

func openDirect(device int) (*direct, error) {
	d := &direct{device: device}
	var err error
	if d.fd, err = newSocket(unix.AF_XDP, unix.SOCK_RAW, 0, sends(sendBuffer)); err == nil {
		err = d.open()
	}
	if err != nil {
		d.close()
		return nil, fmt.Errorf("direct transmission: %w", err)
	}
	return d, nil
}

// open makes the rings, the completion and the fill ring because the kernel insists,
// and binds to queue 0.
func (d *direct) open() (err error) {
	if d.frames, err = mapMemory(-1, 0, directRing*frameSize, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS); err != nil {
		return err
	}
	memory := unix.XDPUmemReg{Addr: uint64(uintptr(unsafe.Pointer(&d.frames[0]))), Len: uint64(len(d.frames)), Size: frameSize}
	if _, _, errno := unix.Syscall6(unix.SYS_SETSOCKOPT, uintptr(d.fd), unix.SOL_XDP, unix.XDP_UMEM_REG,
		uintptr(unsafe.Pointer(&memory)), unsafe.Sizeof(memory), 0); errno != 0 {
		return os.NewSyscallError("setsockopt XDP_UMEM_REG", errno)
	}
	for _, set := range []func(int) error{
		option(unix.SOL_XDP, unix.XDP_UMEM_FILL_RING, "XDP_UMEM_FILL_RING", directRing),
		option(unix.SOL_XDP, unix.XDP_UMEM_COMPLETION_RING, "XDP_UMEM_COMPLETION_RING", directUnderWay),
		option(unix.SOL_XDP, unix.XDP_TX_RING, "XDP_TX_RING", directRing),
	} {
		if err := set(d.fd); err != nil {
			return err
		}
	}
	// How many one system call takes. Older kernels take 32, and send asks again.
	_ = unix.SetsockoptInt(d.fd, unix.SOL_XDP, unix.XDP_MAX_TX_SKB_BUDGET, directRing)

	var at unix.XDPMmapOffsets
	size := uint32(unsafe.Sizeof(at))
	if _, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(d.fd), unix.SOL_XDP, unix.XDP_MMAP_OFFSETS,
		uintptr(unsafe.Pointer(&at)), uintptr(unsafe.Pointer(&size)), 0); errno != 0 {
		return os.NewSyscallError("getsockopt XDP_MMAP_OFFSETS", errno)
	}
	if err := d.tx.open(d.fd, unix.XDP_PGOFF_TX_RING, at.Tx, directRing*unsafe.Sizeof(unix.XDPDesc{})); err != nil {
		return err
	}
	d.descriptors = (*[directRing]unix.XDPDesc)(unsafe.Pointer(&d.tx.memory[at.Tx.Desc]))
	if err := d.done.open(d.fd, unix.XDP_UMEM_PGOFF_COMPLETION_RING, at.Cr, directUnderWay*unsafe.Sizeof(uint64(0))); err != nil {
		return err
	}
	return os.NewSyscallError("bind", unix.Bind(d.fd, &unix.SockaddrXDP{Flags: unix.XDP_COPY, Ifindex: uint32(d.device)}))
}

func (r *ring) open(fd int, offset int64, at unix.XDPRingOffset, entries uintptr) (err error) {
	if r.memory, err = mapMemory(fd, offset, int(at.Desc)+int(entries), unix.MAP_SHARED); err != nil {
		return err
	}
	r.produced = (*uint32)(unsafe.Pointer(&r.memory[at.Producer]))
	r.consumed = (*uint32)(unsafe.Pointer(&r.memory[at.Consumer]))
	return nil
}

func mapMemory(fd int, offset int64, size, flags int) ([]byte, error) {
	b, err := unix.Mmap(fd, offset, size, unix.PROT_READ|unix.PROT_WRITE, flags|unix.MAP_POPULATE)
	return b, os.NewSyscallError("mmap", err)
}

// close returns when nobody sends any more.
func (d *direct) close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = true
	if d.fd >= 0 {
		_ = unix.Close(d.fd)
	}
	for _, memory := range [][]byte{d.frames, d.tx.memory, d.done.memory} {
		if memory != nil {
			_ = unix.Munmap(memory)
		}
	}
}

// takes reports whether packets along path, none of which is larger than its MTU, are
// for d.
func (d *direct) takes(path *Path, packets int) bool {
	return d != nil && d.device == path.Link.Device && packets >= directFew &&
		path.MTU > 0 && path.MTU+len(path.Link.Header) <= frameSize
}

// send sends packets behind an Ethernet header, in order. It has done with the first n,
// refused of which the driver did not take. d is not to be used again after an error,
// which is about the packets that are left. While another sender uses it, it does nothing.
func (d *direct) send(batch []*packet.Buffer, header []byte) (n, refused int, err error) {
	if !d.mu.TryLock() {
		return 0, 0, nil
	}
	defer d.mu.Unlock()
	if d.closed {
		return 0, 0, nil
	}
	for n < len(batch) {
		put := batch[n:min(len(batch), n+directRing)]
		for _, b := range put {
			d.put(header, b.Bytes())
		}
		atomic.StoreUint32(d.tx.produced, d.produced)
		for left := len(put); left > 0; {
			errno := d.wake()
			still := int(d.produced - atomic.LoadUint32(d.tx.consumed))
			if still == left { // nothing was taken
				if errno == 0 {
					errno = unix.EAGAIN
				}
				return n, refused, os.NewSyscallError("sendto", errno)
			}
			n += left - still
			left = still
			switch errno {
			case 0, unix.EAGAIN: // EAGAIN: there is more to do
			case unix.EBUSY:
				refused++
			default:
				return n, refused, os.NewSyscallError("sendto", errno)
			}
		}
	}
	return n, refused, nil
}

// put copies a frame to where the kernel takes it from.
func (d *direct) put(header, p []byte) {
	i := d.produced % directRing
	frame := d.frames[i*frameSize : (i+1)*frameSize]
	n := copy(frame, header)
	n += copy(frame[n:], p)
	d.descriptors[i] = unix.XDPDesc{Addr: uint64(i * frameSize), Len: uint32(n)}
	d.produced++
}

// wake has the kernel send what was put. What has been taken is taken note of first.
func (d *direct) wake() unix.Errno {
	atomic.StoreUint32(d.done.consumed, atomic.LoadUint32(d.done.produced))
	_, _, errno := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(d.fd), 0, 0, unix.MSG_DONTWAIT, 0, 0)
	return errno
}
