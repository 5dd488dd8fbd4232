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

// Device is a tun.Device with one queue, whose host's stack is whoever calls
// Inject and Receive.
type Device struct {
	name    string
	mtu     atomic.Int64
	running atomic.Bool
	closed  atomic.Bool
	state   atomic.Pointer[tun.State]
	out, in *ring // out of the host, into the host
}

var _ tun.Device = (*Device)(nil)

// NewDevice makes a Device that is running.
func NewDevice(name string, mtu int) *Device {
	d := &Device{name: name, out: newRing(), in: newRing()}
	d.mtu.Store(int64(mtu))
	d.running.Store(true)
	d.SetState(tun.State{Name: name, Index: 77, Up: true})
	return d
}

// Inject sends a copy of p from the host into the tunnel: a Read of the queue
// gets it. It waits while the queue is full. A packet longer than the MTU is
// refused (EMSGSIZE); one that is injected without a carrier is lost, as on Linux.
func (d *Device) Inject(p []byte) error {
	return d.InjectOffload(p, packet.Offload{Checksum: packet.ChecksumUnknown})
}

// InjectOffload is Inject of a packet that carries what is known of its checksum.
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

// Receive waits for the next packet that the tunnel wrote for the host and
// copies it to b, with its Offload. After Close it returns os.ErrClosed.
func (d *Device) Receive(b *packet.Buffer) error {
	_, err := d.in.pop([]*packet.Buffer{b}, time.Time{})
	return err
}

// ReceiveBatch is Receive of what is there, at least one packet.
func (d *Device) ReceiveBatch(batch []*packet.Buffer) (n int, err error) {
	return d.in.pop(batch, time.Time{})
}

// ReceiveWithin is Receive that gives up, and returns nil, after a time.
func (d *Device) ReceiveWithin(wait time.Duration) *packet.Buffer { return d.in.popWithin(wait) }

// Running is what SetCarrier last said; true at first.
func (d *Device) Running() bool { return d.running.Load() }

// Closed reports whether Close was called.
func (d *Device) Closed() bool { return d.closed.Load() }

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

// State implements tun.Device: what SetState said, with the MTU and the carrier that
// were set.
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

// SetState is what an operator does to the interface.
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

func (q *queue) Read(batch []*packet.Buffer) (int, error) { return q.out.pop(batch, time.Time{}) }

// Write gives the host packets as they are, superpackets and partial checksums
// included. The host takes no more than its queue holds (ENOBUFS).
func (q *queue) Write(batch []*packet.Buffer) (n int, err error) {
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
