// Package capture has what a capture of a tunnel is made of: the ring that the data path copies
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

// Interfaces of the file. noTunnel is there once there is a packet of it.
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

// outbound is the direction of epb_flags.
func (p Point) outbound() bool { return p == InnerOut || p == OuterOut }

// pointOf is where packets are that why is about, of which only a number is known.
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
	// MaxSnaplen is the length of the longest packet.
	MaxSnaplen = 65535
	// DefaultSnaplen has the headers of both packets with all options of TCP.
	DefaultSnaplen = 128
)

// Options are what is captured. The zero value is everything.
type Options struct {
	// Count is after how many packets the capture ends; 0 is never.
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

// wants reports whether a packet at that point is captured, if it is dropped or Drops is not set.
func (o *Options) wants(where Point) bool {
	inner := where.iface() == innerInterface
	return !(inner && o.OuterOnly || !inner && o.InnerOnly)
}

// lastID is the last of NewID.
var lastID atomic.Uint32

// NewID returns an epb_packetid that another packet does not have, never 0.
func NewID() uint32 {
	for {
		if id := lastID.Add(1); id != 0 {
			return id
		}
	}
}
