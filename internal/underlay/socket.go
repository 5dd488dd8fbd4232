// Package underlay has the sockets of the underlay side: they send and receive outer packets of
// protocol 4, and receive the ICMP errors about them. One Socket serves all tunnels of the
// process. Of inner packets it reads only the headers that offload metadata refers to.
//
// On Linux, outer packets are received by packet sockets in a fanout group (packet(7)), or by a
// raw socket (raw(7)), which is bound and connected if there is only one tunnel. They are sent
// as Ethernet frames if the next hop is resolved (Link), else through a raw socket. Where
// the kernel or the service refuses packet sockets (AF_PACKET), the raw sockets do all. Other
// systems have only the raw socket, one packet per system call.
package underlay

import "ipipd/internal/packet"

// Path is the route of a tunnel's outer packets. It is immutable once in use: when the route changes, the
// tunnel makes another one.
type Path struct {
	// Link is the Ethernet next hop, if it is safe to bypass the kernel's route look-up; nil
	// sends through the raw socket. Paths of one batch with the same next hop should share it.
	Link *Link
	// MTU is the MTU of the first hop, in bytes.
	MTU int
	// Local and Remote are the outer addresses, in network byte order. A Sender does not look at
	// Remote: a packet goes to the destination of its header.
	Local, Remote [4]byte
	// Mark is the firewall mark of outer packets (SO_MARK), for policy routing; 0 is none.
	Mark uint32
	// Device is the index of the interface that outer packets are bound to; 0 leaves it to the
	// route.
	Device int
}

// Link is a resolved Ethernet next hop. It is immutable once in use.
type Link struct {
	// Device is the index of the egress interface.
	Device int
	// Header is the Ethernet header: destination, source, EtherType 0x0800.
	Header [14]byte
}

// Receiver receives outer packets. One goroutine at a time reads.
type Receiver interface {
	// Watch calls opened with each file descriptor that is readable when there are packets: the
	// present one, and later ones that take its place, until Close of the Socket. opened must not
	// block. If it fails, so does what changed the descriptor.
	Watch(opened func(fd int) error) error
	// Read takes the protocol-4 packets that are queued, without waiting for any, and fills
	// batch[:n] with whole outer IPv4 packets; the kernel has reassembled outer fragments. After
	// Close of the Socket it returns os.ErrClosed; any other error is permanent.
	Read(batch []*packet.Buffer) (n int, err error)
}

// Sender sends outer packets. Only one goroutine may use a Sender; a Socket can have any number.
type Sender interface {
	// Write sends whole outer IPv4 packets of one tunnel, in order. paths[i] is the path of
	// batch[i]; a single path is that of all. They differ in Remote, MTU and Link at most. The
	// kernel fragments a packet longer than its path's MTU, which must have DF=0. Write may use the
	// headroom and change the outer header. n is how many packets the kernel accepted. err is the
	// last error among the others, such as ENOBUFS for a full transmit queue; it does not stop the
	// batch. After Close of the Socket Write returns os.ErrClosed.
	Write(batch []*packet.Buffer, paths []*Path) (n int, err error)
}

// Socket has the sockets of the underlay side, one Socket for the whole process: the kernel
// clones every protocol-4 packet to every raw socket, so N sockets for N tunnels would cost N
// copies of each. Its methods may be called concurrently.
type Socket interface {
	// Receivers returns the Receivers, at least one. A flow stays in one of them.
	Receivers() []Receiver
	// NewSender returns a new Sender.
	NewSender() Sender
	// ReadError waits for an ICMP message of type 3 or 11 about an outer packet; Linux passes
	// only those that quote protocol 4, ESP, or UDP from port 4500. It copies the message, from
	// its own IPv4 header on, to buf[:n]; nothing else in it has been checked. Only one
	// goroutine may call it. After Close it returns os.ErrClosed.
	ReadError(buf []byte) (n int, err error)
	// Overflows returns how many received packets the kernel dropped because the receive buffer
	// was full, or because virtio_net_hdr could not describe them.
	Overflows() uint64
	// Close unblocks ReadError, and waits until every Read, Write and ReadError has returned.
	Close() error
}

// Reception is where outer packets are received, and which. The zero value is the raw socket, on
// every interface, with any addresses.
type Reception struct {
	// LinkLayer receives the packets that enter by the interface LinkDevice through packet
	// sockets (AF_PACKET). There the kernel reports for each packet whether its inner checksum
	// is complete and how a superpacket was segmented, and a flow is hashed to one of several
	// Receivers. It costs a quarter to a third more per packet. The raw socket receives the
	// rest, so no packet comes twice.
	//
	// Netfilter, rp_filter and IPsec policies do not apply to packets received there: set it
	// only if none of them matters.
	LinkLayer bool
	// LinkDevice is the index of that interface, which must not be in a VRF; 0 is all
	// interfaces, which is only correct with rp_filter off.
	LinkDevice int
	// Device is the index of the only interface, or VRF, that outer packets may enter by; 0 is
	// any. The kernel answers packets from other interfaces with ICMP protocol unreachable and
	// counts them (IpInUnknownProtos).
	Device int
	// Local and Remote, in network byte order, are the outer addresses of the only tunnel; zero
	// if there are several. Packets with other addresses are not copied to this process: if no
	// other process takes them, the kernel answers and counts them likewise.
	Local, Remote [4]byte
	// Mark is the firewall mark that packets to Remote are routed with (SO_MARK); 0 is none.
	Mark uint32
}

// ReceiveSetter is a Socket whose Reception can be changed while packets arrive.
type ReceiveSetter interface {
	Socket
	// PacketSockets reports whether there are packet sockets. Where the address family AF_PACKET
	// is refused there are none: then no Path has a Link, and no Reception is LinkLayer.
	PacketSockets() bool
	// SetReceive changes what is received. A packet that arrives meanwhile may be received
	// twice, but is not lost. If nothing changes, it does nothing.
	SetReceive(Reception) error
}

// SocketOptions are the options of OpenSocket. The zero value is one Receiver on the raw socket,
// for every interface.
type SocketOptions struct {
	// Device is the index of the only interface that outer packets may enter by; 0 is any.
	Device int
	// ReceiveBuffer is the size of each socket's kernel receive buffer, in bytes; 0 means 8 MiB.
	// Without CAP_NET_ADMIN it is limited to net.core.rmem_max.
	ReceiveBuffer int
	// PacketReceive starts with Reception.LinkLayer, on Device. Linux only.
	PacketReceive bool
	// Adopt are the sockets that an earlier process's Opened was called with, in any order. The
	// Socket receives through them what that process received, until the first SetReceive. It
	// owns them, and closes those that are not as it would open them. Linux only.
	Adopt []int
	// Opened is called with each socket that receives packets when it can be left to another
	// process, and Closed before it is closed because another takes its place, but not by Close.
	// Neither may block, nor call the Socket; nil is none. Linux only.
	Opened, Closed func(fd int)
	// Receivers is how many packet sockets share the inner flows; 0 means 1. The raw socket has
	// one Receiver more, which Receivers() returns first.
	Receivers int
}
