package memory

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"ipipd/internal/packet"
	"ipipd/tun"
)

// Device is a tun.Device with one queue. The test takes the part of the host's IP stack by
// Inject and Receive.
type Device struct {
	name    string
	mtu     atomic.Int64
	running atomic.Bool
	closed  atomic.Bool
	deleted atomic.Bool
	state   atomic.Pointer[tun.State]
	out, in *ring // from the host, to the host
}

var _ tun.Device = (*Device)(nil)

// NewDevice returns a Device that is up, with carrier. mtu is in bytes.
func NewDevice(name string, mtu int) *Device {
	d := &Device{name: name, out: newRing(), in: newRing()}
	d.mtu.Store(int64(mtu))
	d.running.Store(true)
	d.SetState(tun.State{Name: name, Index: 77, Up: true})
	return d
}

// Inject sends a copy of p from the host into the tunnel, for Queue.Read. It blocks while the
// queue is full. A packet longer than the MTU fails with EMSGSIZE; without carrier it is
// dropped, as on Linux.
func (d *Device) Inject(p []byte) error {
	return d.InjectOffload(p, packet.Offload{Checksum: packet.ChecksumUnknown})
}

// InjectOffload is Inject with the packet's checksum and segmentation state.
func (d *Device) InjectOffload(p []byte, offload packet.Offload) error {
	if mtu := int(d.mtu.Load()); len(p) > mtu {
		return fmt.Errorf("packet of %d bytes on an MTU of %d: %w", len(p), mtu, syscall.EMSGSIZE)
	}
	if !d.running.Load() {
		return nil
	}
	_, err := d.out.push(p, offload, true)
	return err
}

// Receive waits for the next packet from the tunnel to the host and copies it to b, with its
// Offload. After Close it returns os.ErrClosed.
func (d *Device) Receive(b *packet.Buffer) error {
	_, err := d.in.pop([]*packet.Buffer{b}, time.Time{})
	return err
}

// ReceiveBatch receives the queued packets, and waits for the first.
func (d *Device) ReceiveBatch(batch []*packet.Buffer) (n int, err error) {
	return d.in.pop(batch, time.Time{})
}

// ReceiveWithin is Receive with a timeout, after which it returns nil.
func (d *Device) ReceiveWithin(wait time.Duration) *packet.Buffer { return d.in.popWithin(wait) }

// Running reports the carrier set by SetCarrier, initially true.
func (d *Device) Running() bool { return d.running.Load() }

// Closed reports whether Close was called.
func (d *Device) Closed() bool { return d.closed.Load() }

// Delete simulates that somebody deletes the interface: each queue's Read fails.
func (d *Device) Delete() {
	d.deleted.Store(true)
	_, _ = d.out.push(nil, packet.Offload{}, false) // makes FD readable
}

// Queues implements tun.Device.
func (d *Device) Queues() []tun.Queue { return []tun.Queue{(*queue)(d)} }

// SetCarrier implements tun.Device.
func (d *Device) SetCarrier(running bool) error {
	if d.Closed() {
		return os.ErrClosed
	}
	d.running.Store(running)
	return nil
}

// Name implements tun.Device.
func (d *Device) Name() string { return d.name }

// State implements tun.Device: the state of SetState, with the current MTU and carrier.
func (d *Device) State() (tun.State, error) {
	if d.Closed() {
		return tun.State{Name: d.name}, os.ErrClosed
	}
	s := *d.state.Load()
	s.MTU, s.Carrier = int(d.mtu.Load()), s.Up && d.running.Load()
	if s.Moved {
		return s, errMoved
	}
	return s, nil
}

var errMoved = errors.New("the interface is in another network namespace")

// SetState simulates an operator's change of the interface.
func (d *Device) SetState(s tun.State) { d.state.Store(&s) }

// SetMTU implements tun.Device.
func (d *Device) SetMTU(mtu int) error {
	if d.Closed() {
		return os.ErrClosed
	}
	if d.state.Load().Moved {
		return errMoved
	}
	d.mtu.Store(int64(mtu))
	return nil
}

// Close implements tun.Device.
func (d *Device) Close() error {
	d.closed.Store(true)
	d.out.close()
	d.in.close()
	return nil
}

type queue Device

func (q *queue) FD() int { return q.out.fd() }

func (q *queue) Read(_ *tun.Scratch, batch []*packet.Buffer) (int, error) {
	if q.deleted.Load() {
		return 0, os.NewSyscallError("readv", syscall.EBADF)
	}
	return q.out.tryPop(batch)
}

// Write delivers packets to the host unchanged, superpackets and partial checksums included.
// It returns ENOBUFS if the host's queue is full.
func (q *queue) Write(_ *tun.Scratch, batch []*packet.Buffer) (n int, err error) {
	for _, b := range batch {
		ok, e := q.in.push(b.Bytes(), b.Offload, false)
		if e != nil {
			return n, e
		}
		if ok {
			n++
		} else {
			err = syscall.ENOBUFS
		}
	}
	return n, err
}
