// Package privileged has the system calls that take a capability once the process has begun. The process makes
// them itself, or, from Use on, has its parent make them (package broker): over a socket pair, one request at a time,
// each with at most one descriptor. The parent trusts no request.
package privileged

import "errors"

// Remedy is what to do about the error of a system call that takes a capability. It names all that up needs, so that
// an operator need not learn of each by an error of its own.
const Remedy = "run it as root; without root: setcap cap_net_admin,cap_net_raw,cap_net_bind_service,cap_bpf+ep ipipd; " +
	"in a container: --cap-add NET_ADMIN --cap-add NET_RAW --cap-add BPF"

// The verbs are the first byte of a request. What follows is Fields, each with its length.
const (
	// Netlink: the protocol, and messages. The descriptor is that of an eBPF program, if they name one.
	Netlink = 1 + iota
	// Socket: the protocol of a raw IPv4 socket.
	Socket
	// SetOption: level, name and value. The descriptor is the socket.
	SetOption
	// Bind: an IPv4 address and a port. The descriptor is a UDP socket.
	Bind
	// AttachTUN: the name of an interface, and the flags. The descriptor is of /dev/net/tun.
	AttachTUN
	// Netns: nothing. The descriptor is a queue of a TUN interface; the answer has its namespace's device and inode.
	Netns
	// Programs: the index of a device.
	Programs
	// SetRPS and ClearRPS: the name of an interface, and its mask.
	SetRPS
	ClearRPS
	// CaptureRing: nothing. The answer has the descriptor of a ring buffer for the fast path's programs.
	CaptureRing
)

// The kinds are the first byte of an answer.
const (
	// Part is a datagram of netlink; others follow.
	Part = iota
	// Done ends an answer, with its values.
	Done
	// Failed ends it with the kernel's errno, four bytes.
	Failed
	// Refused ends it with the name of what the configuration does not allow.
	Refused
	// Text ends it with another error, in words.
	Text
)

// MaxMessage is the longest request or answer, in bytes.
const MaxMessage = 64<<10 + 64

// ErrRefused is wrapped by the error of a request that the parent refuses.
var ErrRefused = errors.New("ipipd keep does for its process only what the configuration says: put it there and reload, or start it with --sandbox off")
