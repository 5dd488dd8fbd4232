// Package underlay has the sockets of the outer side: it receives and sends outer packets
// of protocol 4, and receives the ICMP errors about them. One Socket serves all tunnels of
// a process; it knows nothing of what the packets carry.
//
// On Linux, outer packets are received by packet sockets in one fanout group, or by a raw
// socket that is bound and connected where there is one tunnel; they are sent as Ethernet
// frames where the next hop is known (Link), else by a raw socket (raw(7), packet(7)).
// Other systems have the raw socket, one packet a call.
package underlay

import "ipipd/internal/packet"

// Path is the way that the outer packets of a tunnel take. A Path is not changed
// once it is in use: when the route changes, the tunnel makes another.
type Path struct {
	// Local and Remote are the outer addresses, in network byte order.
	Local, Remote [4]byte
	// Mark is put on outer packets for policy routing (SO_MARK); 0 is none.
	Mark uint32
	// Device is the index of the only interface that outer packets may leave
	// by; 0 leaves it to the route.
	Device int
	// MTU of the first hop, in bytes.
	MTU int
	// Link is the Ethernet next hop, where sending past the kernel's route
	// look-up is safe; nil sends through the raw socket.
	Link *Link
}

// Link is a resolved Ethernet next hop.
type Link struct {
	// Device is the index of the interface that the frame leaves by.
	Device int
	// Header is the Ethernet header: destination, source, EtherType 0x0800.
	Header [14]byte
}

// Receiver takes outer packets from the network. One goroutine uses a Receiver.
type Receiver interface {
	// Read waits for at least one protocol-4 packet, takes what else is there
	// without waiting, and fills batch[:n] with whole outer IPv4 packets, outer
	// fragments already reassembled by the kernel.
	// After Close of the Socket it returns os.ErrClosed.
	Read(batch []*packet.Buffer) (n int, err error)
}

// Watcher is a Receiver that can wait for other things besides. The methods below may be
// called by any goroutine, and before Close of the Socket only.
type Watcher interface {
	Receiver
	// Watch has Read return, if need be with n = 0, while the file descriptor can be
	// read. It has to be open during the call, and is forgotten when it is closed.
	// key is the caller's, and not to be that of another.
	Watch(fd int, key int32) error
	// Unwatch ends that. fd has to be open.
	Unwatch(fd int) error
	// Ready gives the key of one that can be read now.
	Ready() (key int32, ok bool)
}

// Sender puts outer packets on the network. One goroutine uses a Sender; a
// Socket gives as many as are asked for.
type Sender interface {
	// Write sends whole outer IPv4 packets, in order, along path. A packet
	// larger than path.MTU must have DF=0 and is cut by the kernel. Write may
	// use the headroom and change the outer header. n counts the packets that
	// the kernel took; err is the last error of one that it did not take, and
	// does not stop the others. A full transmit queue (ENOBUFS) is such an error.
	// After Close of the Socket it returns os.ErrClosed.
	Write(batch []*packet.Buffer, path *Path) (n int, err error)
}

// Socket is the outer door, one for the whole process: the kernel clones every
// protocol-4 packet to every raw socket, so that N sockets for N tunnels would
// cost N copies of each. Its methods may be called by several goroutines.
type Socket interface {
	// Receivers are the ways in, at least one. A flow stays in one.
	Receivers() []Receiver
	// NewSender makes a way out.
	NewSender() Sender
	// ReadError waits for an ICMP message of type 3 or 11 that this host
	// received about a protocol-4 packet, and copies it to buf, from its outer
	// IPv4 header on, n bytes. Nothing else in it has been checked. One goroutine
	// calls it. After Close it returns os.ErrClosed.
	ReadError(buf []byte) (n int, err error)
	// Overflows counts the packets that the kernel had for a Receiver and threw
	// away because its receive buffer was full.
	Overflows() uint64
	// Close unblocks every Read, Write and ReadError, and returns when they have.
	Close() error
}

// Reception is where outer packets are received, and which. The zero value is the raw
// socket, every interface, and everybody's packets.
type Reception struct {
	// LinkLayer receives what enters by the interface LinkDevice from the link layer
	// (AF_PACKET), where the kernel says of each packet whether its inner checksum is
	// finished and which segments a superpacket stands for, and where several Receivers
	// share the flows. It costs a quarter to a third more a packet. The raw socket
	// receives the rest, so that no packet comes twice.
	//
	// Netfilter, rp_filter and IPsec policies do not see packets that are received
	// from the link layer: whoever asks for it knows that none of them has a say.
	LinkLayer bool
	// LinkDevice is the index of that interface, which must not be in a VRF; 0 stands for
	// all, which nothing but rp_filter being off justifies.
	LinkDevice int
	// Device is the index of the only interface that outer packets may enter by, or that
	// of its VRF; 0 stands for all. What enters by another the kernel answers with ICMP
	// protocol unreachable, and counts (IpInUnknownProtos).
	Device int
	// Local and Remote, in network byte order, are the outer addresses of the only
	// tunnel; zero where there are several. Packets with others are not copied to this
	// process: if no other one takes them, the kernel answers and counts them likewise.
	Local, Remote [4]byte
	// Mark is the one that packets to Remote are routed by (SO_MARK); 0 is none.
	Mark uint32
}

// ReceiveSetter is a Socket that can be told where from to receive while packets
// come in.
type ReceiveSetter interface {
	Socket
	// SetReceive changes what is received. What arrives meanwhile may come twice, and
	// none is lost. It does nothing if nothing is to change.
	SetReceive(Reception) error
}

// LateReceiver is a Receiver that has nothing to read before SetReceive asks for it.
type LateReceiver interface {
	Receiver
	// Await waits for that, or, then open is false, for Close of the Socket. Whoever
	// calls it before Read needs no memory and no thread until then.
	Await() (open bool)
}

// SocketOptions are what OpenSocket needs to know. The zero value asks for one
// Receiver on the raw socket that hears every interface.
type SocketOptions struct {
	// Device is the index of the only interface that outer packets may enter
	// by; 0 stands for all.
	Device int
	// ReceiveBuffer is the kernel's receive buffer in bytes, for each Receiver;
	// 0 stands for 8 MiB. Without CAP_NET_ADMIN it is limited to net.core.rmem_max.
	ReceiveBuffer int
	// PacketReceive begins with Reception.LinkLayer, by Device. Linux only.
	PacketReceive bool
	// Receivers is how many Receivers share the inner flows while packets are
	// received from the link layer; 0 stands for 1. The raw socket has always one,
	// and Receivers() gives that first.
	Receivers int
}
