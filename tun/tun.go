// Package tun is the TUN side of a tunnel: the network interface that inner packets come
// from and go to.
//
// On Linux the device is opened with IFF_VNET_HDR: a read may return a superpacket of up
// to 64 KiB, which this package splits, and a write may carry many segments of a flow,
// which it coalesces. Without IFF_VNET_HDR, and on other systems, github.com/songgao/water
// opens the device, and each read or write is one packet.
//
// Only inner IPv4 is split. Read returns any other packet unchanged, an IPv6 superpacket
// truncated to the Buffer, so that the data path can count it.
//
// Coalescing and splitting follow the kernel's GRO and GSO, within RFC 791 and 6864 (ID),
// 3168 (ECN, CWR), 9293 (TCP) and 768 (UDP).
package tun

import "ipipd/internal/packet"

// Queue is one queue of a Device. No call waits. One goroutine at a time reads; any number write, each
// with its own Scratch: the kernel takes concurrent writes to one TUN descriptor.
type Queue interface {
	// FD is a file descriptor that is readable when there are packets, or when Read fails. It
	// stays open until Close of the Device: remove it from what polls it before that.
	FD() int

	// Read fills batch[:n] with the packets that are queued: whole IPv4 packets, already split,
	// each with packet.Headroom in front and a complete transport checksum. Segments that do
	// not fit into batch stay in s (Scratch.Pending). After Close it returns os.ErrClosed;
	// any other error is permanent.
	//
	// Each Buffer needs space for the MTU: a larger packet is truncated, and its total
	// length then exceeds the bytes read.
	Read(s *Scratch, batch []*packet.Buffer) (n int, err error)

	// Write passes whole IPv4 packets to the host's network stack, superpackets and
	// partial checksums included. It may change their bytes, and keeps no reference to
	// batch. In-order segments of a flow are written as one superpacket. Order is kept
	// within a flow, not between flows. n is the number of packets that the kernel
	// accepted; err is the last error, and does not stop the others. After Close it
	// returns os.ErrClosed.
	Write(s *Scratch, batch []*packet.Buffer) (n int, err error)
}

// Device is a TUN interface. Its methods are safe for concurrent use.
type Device interface {
	// Queues returns the queues, at least one. The kernel keeps each flow in one queue;
	// without CAP_BPF it may move a flow once, when the first reply to it is written.
	Queues() []Queue
	// SetCarrier sets the carrier: without it Linux shows NO-CARRIER, marks the
	// interface's routes linkdown, and transmits nothing.
	SetCarrier(carrier bool) error
	// Name returns the interface's name at creation.
	Name() string
	// State returns the current state, which others may have changed. If the interface
	// is in another network namespace it fails, but sets Name and Moved. After Close
	// the error is os.ErrClosed.
	State() (State, error)
	// SetMTU sets the interface's MTU in bytes. It fails if the interface is in another
	// network namespace.
	SetMTU(mtu int) error
	// Close removes the interface when the last Read and Write have returned. If another process
	// has descriptors of its queues (Adopt), the interface stays, and its packets go there.
	Close() error
}

// State is the state of a Device's interface.
type State struct {
	// Name and Index are the present ones, in the interface's network namespace.
	Name  string
	Index int
	// MTU is in bytes.
	MTU int
	// Up is IFF_UP. Carrier is IFF_LOWER_UP, which is never set while IFF_UP is not.
	Up, Carrier bool
	// Moved reports that the interface left the network namespace it was created in.
	Moved bool
}

// Options are the options of Open. The zero value means one queue and the first free name.
type Options struct {
	// Name is the interface name; see CheckName. "" means the first free ipipN, from
	// ipip1 on.
	Name string
	// MTU is in bytes, 68 to 65515; 0 means the kernel's default, 1500.
	MTU int
	// Queues is the number of queues; 0 means 1.
	Queues int
	// QueueLength is how many unread packets each queue holds (txqueuelen); 0 means the kernel's
	// default, 500. To change it later would lose packets: the kernel deactivates the interface
	// for that.
	QueueLength int
	// NoOffload opens the device through water, without IFF_VNET_HDR: one packet per
	// read and write.
	NoOffload bool
	// OnDegraded, if it is not nil, is called before Open returns with the error of each
	// optional feature that the kernel refused.
	OnDegraded func(err error)
}
