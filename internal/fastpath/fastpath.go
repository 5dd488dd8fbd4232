// Package fastpath carries the plain packets of tunnels inside the Linux kernel,
// by two eBPF programs: one on the egress of each tunnel's TUN device
// encapsulates, one on the ingress of each underlay device decapsulates, for all
// tunnels of the process. bpf/ipip.c is what they do.
//
// They keep the rules of the userspace path (RFC 2003, 6040, 6864), bit for bit,
// and leave to it whatever is not plain: fragments, IP options, packets that do
// not fit, probes, tunnels within the tunnel, TCP SYN where the MSS is clamped, and
// everything that has to be dropped. So the userspace path must run beside it, and
// is the whole tunnel by itself.
//
// IDs of outer packets with DF=0 are from the upper half, 0x8000 to 0xffff, so that
// userspace can have the other.
//
// What is carried here passes no netfilter rule and no IPsec policy as an outer
// packet; as an inner packet it passes them at the TUN as ever. What is sent leaves
// the TUN at tcx, and so does not meet what is behind: its queueing discipline, tc
// filters on egress, programs of others (ForeignOnEgress), captures. Whoever attaches
// a tunnel sees to it that there are none. The statistics of the TUN device do not
// count what is carried: Stats does.
//
// The programs hang on bpf_links that only this process holds. Nothing is pinned,
// so all of it is gone with the process, however that ends.
//
// Limits: Linux 6.6 (tcx), CAP_BPF and CAP_NET_ADMIN, an underlay device that is
// Ethernet. The network namespace is the one of the thread that calls; a FastPath
// belongs to one. A packet decapsulated here may stay marked as encapsulated
// (skb->encapsulation), since no eBPF helper clears that: the programs leave such
// a packet to userspace if it is to go into a tunnel again.
package fastpath

import (
	"errors"
	"fmt"
	"time"
)

// Tunnel is what the programs know of a tunnel. Addresses are in network byte
// order, lengths in bytes.
type Tunnel struct {
	// Device is the index of the TUN, which has no link layer header. It does not
	// change while the tunnel is attached.
	Device int
	// MTU of the TUN.
	MTU int
	// Local and Remote are the outer addresses of this end and the other.
	Local, Remote [4]byte
	// Underlay is the index of the Ethernet device that outer packets leave and
	// enter by. What enters by another takes the userspace path.
	Underlay int
	// NextHop is the neighbour on it: the gateway, or Remote.
	NextHop [4]byte
	// PathMTU is the largest outer packet.
	PathMTU int
	// DSCP of outer packets, 0 to 63; negative copies the inner one.
	DSCP int
	// TTL of outer packets; 0 copies the inner one.
	TTL uint8
	// DontFragmentInherit copies the inner DF; else it is 0.
	DontFragmentInherit bool
	// ClampTCPMSS leaves received SYN and SYN-ACK to userspace, which clamps.
	ClampTCPMSS bool
	// EchoSource and EchoDestination are the inner addresses of ICMP messages that
	// userspace wants to see, replies to its probes; zero is none.
	EchoSource, EchoDestination [4]byte
	// Send and Receive carry the packets of that direction; without them all of it
	// takes the userspace path.
	Send, Receive bool
}

// Stats counts what was carried for a tunnel since it was attached: inner packets,
// and bytes from their IPv4 headers on. A superpacket counts as what it stands for.
type Stats struct {
	RxPackets, RxBytes uint64
	TxPackets, TxBytes uint64
	// TxFailed packets were lost because the kernel had no memory.
	TxFailed uint64
	// Heard is when the last packet of the remote came, to some milliseconds; zero
	// is never.
	Heard time.Time
}

// Unavailable is why packets cannot be carried in the kernel.
type Unavailable struct {
	// Why in words, and what to do about it.
	Why string
	// Err is what the kernel said, or nil.
	Err error
}

func (e *Unavailable) Error() string {
	if e.Err == nil {
		return e.Why
	}
	return fmt.Sprintf("%s: %v", e.Why, e.Err)
}

func (e *Unavailable) Unwrap() error { return e.Err }

// ErrClosed is what a Link or FastPath fails with after Close.
var ErrClosed = errors.New("the fast path is closed")
