// Package capture is what a capture of a tunnel consists of: the ring that the data path copies
// packets into, and the pcapng file (draft-ietf-opsawg-pcapng) that is made of it.
//
// The file has an interface for the inner packets of a tunnel and one for the outer ones, both without
// a link layer (LINKTYPE_IPV4). A packet and what it becomes share epb_packetid, and the comment of one
// that is dropped is the reason with its remedy. A capture never slows a packet: what the ring has no
// room for is counted, and the file says how much that was.
package capture

import (
	"sync/atomic"

	"ipipd/internal/drop"
)

// Point is where on its way a packet is seen.
type Point uint8

const (
	InnerOut Point = iota // read from the TUN, or a probe
	OuterOut              // sent to the underlay
	OuterIn               // received from the underlay
	InnerIn               // written to the TUN
	NoTunnel              // received, and dropped: it belongs to no tunnel
)

// Interfaces of the file. It has noTunnelInterface from the first packet of it on.
const (
	innerInterface = iota
	outerInterface
	noTunnelInterface
	interfaces
)

func (p Point) iface() int {
	switch p {
	case InnerOut, InnerIn:
		return innerInterface
	case NoTunnel:
		return noTunnelInterface
	}
	return outerInterface
}

// outbound reports whether the direction in epb_flags is outbound.
func (p Point) outbound() bool { return p == InnerOut || p == OuterOut }

// pointOf returns the Point of packets dropped for that reason of which only the number is known.
func pointOf(why drop.Reason) Point {
	switch {
	case why.ByProcess():
		return NoTunnel
	case why.Direction() == drop.Transmit:
		return InnerOut
	}
	return OuterIn
}

const (
	// MaxSnaplen is the length of the longest IPv4 packet in bytes.
	MaxSnaplen = 65535
	// DefaultSnaplen, in bytes, is enough for the outer, the inner and a TCP header with all its options.
	DefaultSnaplen = 128
)

// Options are what is captured. The zero value is everything.
type Options struct {
	// Count is the number of packets after which the capture ends; 0 is never.
	Count uint64
	// Snaplen is how many bytes of each packet are kept; 0 is MaxSnaplen.
	Snaplen int
	// Drops: only packets that are dropped.
	Drops bool
	// Complete keeps every packet, whatever it costs the tunnel: see Budget.
	Complete bool
	// InnerOnly, OuterOnly: only the inner, or only the outer packets.
	InnerOnly, OuterOnly bool
}

// wants reports whether packets at that point are captured, Drops aside.
func (o *Options) wants(where Point) bool {
	inner := where.iface() == innerInterface
	return !(inner && o.OuterOnly || !inner && o.InnerOnly)
}

// lastID is the last ID that NewID has returned.
var lastID atomic.Uint32

// NewID returns an epb_packetid, never 0, which only comes again after all others.
func NewID() uint32 {
	for {
		if id := lastID.Add(1); id != 0 {
			return id
		}
	}
}
