// Package tun is the TUN side of a tunnel: the network interface whose packets it
// carries.
//
// On Linux the device is opened with IFF_VNET_HDR, so that one read can bring a
// superpacket of up to 64 KiB, which is split here, and one write can take many
// segments of a flow, which are coalesced here. Where the kernel does not offer
// that, and on other systems, github.com/songgao/water opens the device and each
// packet crosses it by itself.
//
// Only inner IPv4 is split. A packet of anything else comes out of Read as it is,
// an IPv6 superpacket cut off at the Buffer's end, so that it can be counted.
//
// What is coalesced, and how a superpacket is split, follows the kernel's GRO and
// GSO; the rules of RFC 791 and 6864 (ID), 3168 (ECN, CWR), 9293 and 768 stand
// where they are kept.
package tun

import "ipipd/internal/packet"

// Queue is one way in and out of a Device. One goroutine reads a Queue; writers
// may be several.
type Queue interface {
	// Read waits for at least one packet, takes what else is there without
	// waiting, and fills batch[:n] with whole IPv4 packets, none of them a
	// superpacket, each with a finished transport checksum and packet.Headroom
	// in front. What does not fit into batch comes with the next Read.
	// After Close it returns os.ErrClosed; another error means that the queue
	// is of no use any more.
	//
	// The reader does best on a thread of its own (runtime.LockOSThread), with
	// GOMAXPROCS above the number of such threads: for a quarter of a second after
	// a packet it waits in a system call that the Go scheduler does not know of.
	// A Buffer needs room for the MTU: of a larger packet it gets the start,
	// which tells a length that is not there.
	Read(batch []*packet.Buffer) (n int, err error)

	// Write puts whole IPv4 packets into the host's network stack, superpackets
	// and partial checksums included, and keeps none of the memory. It may
	// change the bytes. In-order segments of a flow in batch are written as one;
	// packets of a flow stay in order, those of different flows may not. n counts
	// the packets the kernel took; err is the last error of one it did not take,
	// and does not stop the others.
	// After Close it returns os.ErrClosed.
	Write(batch []*packet.Buffer) (n int, err error)
}

// SharedQueue is a Queue whose reader can wait for it beside something else. One
// goroutine at a time reads it.
type SharedQueue interface {
	Queue
	// TryRead is Read that does not wait: n is 0 where nothing is there.
	TryRead(batch []*packet.Buffer) (n int, err error)
	// Control calls f with the file descriptor that can be polled for something to
	// read, and is not closed meanwhile, and returns what f does. After Close it
	// returns os.ErrClosed.
	Control(f func(fd int) error) error
}

// Device is a TUN interface. Its methods may be called by several goroutines.
type Device interface {
	// Queues are the ways in and out, at least one. The kernel spreads flows
	// over them and keeps each flow in one; without CAP_BPF it may move a flow,
	// once, when the first answer to it is written.
	Queues() []Queue
	// SetCarrier sets the carrier: without it Linux shows NO-CARRIER, marks the
	// routes of the interface linkdown, and sends nothing into it.
	SetCarrier(running bool) error
	// Name is the name that the interface was made with.
	Name() string
	// State is how the interface stands now, whatever others have made of it. After
	// Close it fails with os.ErrClosed. Where the interface is in another network
	// namespace, it fails too, and Name and Moved are right beside the error.
	State() (State, error)
	// SetMTU sets the largest inner packet, in bytes. It fails where the interface is in
	// another network namespace.
	SetMTU(mtu int) error
	// Close removes the interface and unblocks every Read and Write.
	Close() error
}

// State is how the interface of a Device stands.
type State struct {
	// Name and Index are those that it has in its network namespace.
	Name  string
	Index int
	// MTU is the largest inner packet in bytes.
	MTU int
	// Up is what an administrator sets (IFF_UP); Carrier is IFF_LOWER_UP, which an
	// interface that is down does not have.
	Up, Carrier bool
	// Moved: it is in another network namespace than the one it was made in.
	Moved bool
}

// Options are what Open needs to know. The zero value asks for one queue and
// the first free name.
type Options struct {
	// Name is the interface's name, up to 15 bytes. "" stands for the first
	// free ipipN, counted from ipip1.
	Name string
	// MTU in bytes, 68 to 65515; 0 leaves the kernel's default of 1500.
	MTU int
	// Queues is the number of queues; 0 stands for 1.
	Queues int
	// NoOffload opens the device without IFF_VNET_HDR, through water: one
	// packet a read and one a write.
	NoOffload bool
	// OnDegraded, if it is not nil, is told what the kernel refused that the device
	// works without, before Open returns.
	OnDegraded func(err error)
}
