// Package fastpath encapsulates and decapsulates the ordinary packets of tunnels inside
// the Linux kernel, with two eBPF programs (bpf/ipip.c): ipip_encap on the egress of each
// tunnel's TUN device, and ipip_decap on the ingress of each underlay device, shared by all
// tunnels of the process.
//
// The programs follow the rules of the userspace data path (RFC 2003, 6040, 6864) bit for
// bit, and pass everything else on to it: fragments, IP options, packets over the MTU,
// probes, nested tunnels, TCP SYN where the MSS is clamped, and every packet that has to
// be dropped. So the userspace data path must run as well, and is a complete tunnel
// without this package.
//
// Outer packets with DF=0 get IDs from 0x8000 to 0xffff; userspace uses the lower half.
//
// Outer packets of the fast path pass no netfilter hook and no IPsec policy; inner packets
// pass both at the TUN as usual. Sent packets are redirected and so bypass what follows the
// program on the TUN: the qdisc and packet sockets. The caller must check that there are none
// before it enables a tunnel. The interface statistics of the TUN do not include these packets:
// add Stats.
//
// The caller attaches ipip_encap (Encap), as a tc filter, which goes with the TUN. An underlay
// device is not ours: ipip_decap is attached to it by tcx, with a bpf_link that only this process
// holds, and Options.Manager. Nothing is pinned: without a Manager the kernel detaches it however the process ends.
// With one it stays, but a minute later at most it leaves all packets to the stack, unless there is a next process.
//
// Requirements: Linux 6.6 (tcx), CAP_BPF and CAP_NET_ADMIN, an Ethernet underlay device.
// A FastPath belongs to one network namespace, that of the calling thread. A packet
// decapsulated here may keep skb->encapsulation set, since no eBPF helper clears it:
// ipip_encap passes such a packet to userspace.
package fastpath

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"ipipd/internal/handover"
)

// Tunnel is the configuration of one tunnel. Addresses are in network byte order, MTUs
// in bytes.
type Tunnel struct {
	// Ifindex is the interface index of the TUN.
	Ifindex int
	// MTU of the TUN.
	MTU int
	// Local and Remote are the outer addresses.
	Local, Remote [4]byte
	// UnderlayIfindex is the Ethernet device that sends and receives the outer packets.
	// Outer packets received on another device go to userspace. 0 is none: enable no direction then.
	UnderlayIfindex int
	// NextHop is the neighbour on the underlay: the gateway, or Remote if on-link.
	NextHop [4]byte
	// PathMTU is the largest outer packet.
	PathMTU int
	// DSCP of outer packets, 0 to 63; negative copies the inner one.
	DSCP int
	// TTL of outer packets; 0 copies the inner one.
	TTL uint8
	// DontFragmentInherit copies the inner DF; otherwise DF is 0.
	DontFragmentInherit bool
	// ClampTCPMSS passes received SYN and SYN-ACK to userspace, which clamps the MSS.
	ClampTCPMSS bool
	// EchoSource and EchoDestination are the inner addresses of ICMP messages to pass
	// to userspace, the replies to its keepalive probes; zero is none.
	EchoSource, EchoDestination [4]byte
	// TxEnabled and RxEnabled enable a direction. All packets of a disabled one go to
	// userspace.
	TxEnabled, RxEnabled bool
	// Many: the tunnel has many remotes, those of the Routes of Ifindex, each with a next hop, device and
	// path MTU of its own (Remote). Remote is AnyRemote then; UnderlayIfindex is the device on which packets
	// arrive whose source is neither a gateway nor a Sender's. A zero Local stands for all of SetLocalAddresses.
	Many bool
	// AnyPeer is fib.Acceptance.AnyPeer; AcceptFrom and AcceptTo say that its From and To are not empty.
	AnyPeer, AcceptFrom, AcceptTo bool
	// Refuse drops and counts received packets that fib.Acceptance refuses. Otherwise they go to userspace.
	Refuse bool
	// Capture says which packets are copied for Link.Captured. It has no effect before OpenCapture.
	Capture Capture
}

// AnyRemote is the Remote of a Tunnel that has Many.
var AnyRemote = [4]byte{255, 255, 255, 255}

// Remote is how to send to one of many remotes.
type Remote struct {
	// Source is the source address of outer packets.
	Source [4]byte
	// NextHop, UnderlayIfindex and PathMTU are as in Tunnel.
	NextHop                  [4]byte
	UnderlayIfindex, PathMTU int
	// Tx and Rx enable a direction. Packets received on a device other than UnderlayIfindex go to userspace.
	Tx, Rx bool
}

// Sender is a prefix of accept-from, and the index of the device on which its packets arrive: those that arrive
// on another go to userspace, as all do if it is 0.
type Sender struct {
	Prefix netip.Prefix
	Device int
}

// Pair is a tunnel's pair of outer addresses, in network byte order.
type Pair struct{ Local, Remote [4]byte }

// Options of Open.
type Options struct {
	// Manager keeps the links and counters when the process ends: see Leave. nil keeps nothing.
	Manager *handover.Manager
	// Kept are the descriptors that the process before has left. Open takes the fast path's.
	Kept handover.Kept
	// Anew: the counters of Kept are not to be used.
	Anew bool
	// Cold is called with what of Kept cannot be used, or cannot be kept for the next process, and why; nil is none.
	Cold func(what string, err error)
}

// Stats counts a tunnel's packets in the kernel since Attach, or since the Attach of an earlier process whose counters were
// adopted: inner packets, and bytes from the inner IPv4 header on. A GSO packet counts as its segments, headers included.
type Stats struct {
	RxPackets, RxBytes uint64
	TxPackets, TxBytes uint64
	// TxFailed counts packets dropped for lack of memory.
	TxFailed uint64
	// ReversePath, NotInAcceptFrom and NotInAcceptTo count packets dropped by Tunnel.Refuse. A GSO
	// packet counts as one.
	ReversePath, NotInAcceptFrom, NotInAcceptTo uint64
	// LastReceived is the time of the last packet from the remote, accurate to a kernel
	// tick; zero if there was none.
	LastReceived time.Time
	// Orphaned counts packets left to userspace while there was no process: see Link.Adopted. A GSO packet
	// counts as one.
	Orphaned uint64
}

// Unavailable is the error if this host does not support or permit the fast path.
type Unavailable struct {
	// Why is the reason in words, and what to do about it.
	Why string
	// Err is the kernel's error, or nil.
	Err error
}

func (e *Unavailable) Error() string {
	if e.Err == nil {
		return e.Why
	}
	return fmt.Sprintf("%s: %v", e.Why, e.Err)
}

func (e *Unavailable) Unwrap() error { return e.Err }

// ErrClosed is returned by methods of a Link or FastPath after Close.
var ErrClosed = errors.New("the fast path is closed")
