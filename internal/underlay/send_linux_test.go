package underlay

import (
	"encoding/binary"
	"errors"
	"net"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
	"ipipd/test/netlab"
)

// linkTo returns the Ethernet next hop from eth0 of one host to eth0 of the other.
func linkTo(t testing.TB, from, to *netlab.NS) *Link {
	t.Helper()
	return linkBy(t, "eth0", from, to)
}

func linkBy(t testing.TB, name string, from, to *netlab.NS) *Link {
	t.Helper()
	device := func(ns *netlab.NS) (i *net.Interface) {
		var err error
		ns.Do(func() { i, err = net.InterfaceByName(name) })
		if err != nil {
			t.Fatal(err)
		}
		return i
	}
	source, destination := device(from), device(to)
	link := &Link{Device: source.Index}
	copy(link.Header[:], destination.HardwareAddr)
	copy(link.Header[6:], source.HardwareAddr)
	binary.BigEndian.PutUint16(link.Header[12:], ipv4.EtherType)
	return link
}

// The peer receives the same from the link socket as from the raw socket.
func TestSender_link(t *testing.T) {
	a, b := twoHosts(t)
	sender := open(t, a, SocketOptions{}).NewSender()
	r := open(t, b, SocketOptions{}).Receivers()[0]
	framed := *pathA
	framed.Link = linkTo(t, a, b)
	for _, path := range []*Path{pathA, &framed} {
		// The large one in the middle is fragmented and stays in the middle.
		batch := []*packet.Buffer{outerPacket(path, 1500, 1), outerPacket(path, 5000, 2), outerPacket(path, 21, 3)}
		mustWrite(t, sender, path, batch...)
		for i, got := range read(t, r, len(batch), packet.MaxSize) {
			if string(got.Bytes()[20:]) != string(batch[i].Bytes()[20:]) {
				t.Errorf("link %v: packet %d is another", path.Link != nil, i)
			}
		}
		if batch[0].Len() != 1500 {
			t.Errorf("link %v: Write moved the ends of the packet", path.Link != nil)
		}
	}
}

// Packets of one batch go to many remotes: by several next hops, by the kernel's routes, and in fragments.
func TestSender_remotes(t *testing.T) {
	a, b := twoHosts(t)
	netlab.Veth(t, a, b, netlab.End{Name: "eth1", Address: "198.51.100.1/24"}, netlab.End{Name: "eth1", Address: "198.51.100.2/24"})
	r := open(t, b, SocketOptions{}).Receivers()[0]
	sender := open(t, a, SocketOptions{}).NewSender()
	to := func(remote [4]byte, device string) *Path {
		p := &Path{Local: hostA, Remote: remote, MTU: 1500}
		if device != "" {
			p.Link = linkBy(t, device, a, b)
		}
		return p
	}
	first, second := [4]byte{192, 0, 2, 2}, [4]byte{198, 51, 100, 2}
	b.Sysctl("net.ipv4.conf.all.rp_filter", "0")
	b.Sysctl("net.ipv4.conf.eth1.rp_filter", "0")
	small := to(second, "eth1")
	small.MTU = 600
	paths := []*Path{
		to(first, "eth0"), to(second, "eth1"), to(first, "eth0"), // two next hops in turns
		to(second, ""), to(first, ""), // routed
		small, to(second, "eth1"), small, // fragmented, and not
		to(first, ""),
	}
	for range 3 { // in order even if what was sent before is still there
		var batch []*packet.Buffer
		for i, path := range paths {
			batch = append(batch, outerPacket(path, 1000+i, uint16(i+1)))
		}
		if n, err := sender.Write(batch, paths); n != len(batch) || err != nil {
			t.Fatalf("Write sent %d of %d packets: %v", n, len(batch), err)
		}
		last := map[[4]byte]int{}
		for _, got := range read(t, r, len(batch), 1500) {
			p := got.Bytes()
			i := got.Len() - 1000
			if i < 0 || i >= len(paths) || [4]byte(p[16:]) != paths[i].Remote || string(p[20:]) != string(batch[i].Bytes()[20:]) {
				t.Fatalf("%d bytes to %v are none of those sent", got.Len(), p[16:20])
			}
			if i < last[[4]byte(p[16:])] {
				t.Errorf("packet %d comes after %d", i, last[[4]byte(p[16:])])
			}
			last[[4]byte(p[16:])] = i
		}
	}
}

// One remote that cannot be reached costs no other's packets.
func TestSender_remotesFail(t *testing.T) {
	a, b := twoHosts(t)
	a.Run("ip", "route", "add", "unreachable", "198.51.100.0/24")
	r := open(t, b, SocketOptions{}).Receivers()[0]
	sender := open(t, a, SocketOptions{}).NewSender()
	lost := &Path{Local: hostA, Remote: [4]byte{198, 51, 100, 9}, MTU: 1500}
	gone, framed := *lost, *pathA
	gone.Link, framed.Link = &Link{Device: 999}, linkTo(t, a, b)
	for _, paths := range [][]*Path{{lost, pathA, lost, pathA}, {&gone, &framed, &gone, &framed}, {lost, &framed, &gone, pathA}} {
		var batch []*packet.Buffer
		for i, path := range paths {
			batch = append(batch, outerPacket(path, 100+i, uint16(i+1)))
		}
		if n, err := sender.Write(batch, paths); n != 2 || !errors.Is(err, unix.EHOSTUNREACH) {
			t.Errorf("Write sent %d packets: %v; want 2, and EHOSTUNREACH", n, err)
		}
		if got := read(t, r, 2, 1500); got[0].Len() != 101 && got[0].Len() != 103 {
			t.Errorf("got %d bytes", got[0].Len())
		}
	}
}

// Packets that wait for dead neighbours do not stop those to another one.
func TestSender_neighborsDead(t *testing.T) {
	a, b := twoHosts(t)
	r := open(t, b, SocketOptions{}).Receivers()[0]
	sender := open(t, a, SocketOptions{}).NewSender()
	for _, mtu := range []int{1500, 1000} { // whole, and fragmented by the kernel
		for dead := range 60 { // twice what the send buffer of a frame holds
			path := &Path{Local: hostA, Remote: [4]byte{192, 0, 2, byte(100 + dead)}, MTU: mtu}
			var batch []*packet.Buffer
			for range 128 {
				batch = append(batch, outerPacket(path, 1400, 1))
			}
			if n, err := sender.Write(batch, []*Path{path}); n != len(batch) || err != nil {
				t.Fatalf("MTU %d: Write sent %d of %d packets to dead neighbor %d: %v", mtu, n, len(batch), dead, err)
			}
		}
		path := *pathA
		path.MTU = mtu
		mustWrite(t, sender, &path, outerPacket(&path, 1400, 1))
		if got := read(t, r, 1, 1500); got[0].Len() != 1400 {
			t.Errorf("MTU %d: got %d bytes", mtu, got[0].Len())
		}
	}
}

// If the link's interface is down or gone, packets are sent along the kernel's routes.
func TestSender_linkGone(t *testing.T) {
	a, b := twoHosts(t)
	netlab.Veth(t, a, b, netlab.End{Name: "old"}, netlab.End{Name: "old"})
	sender := open(t, a, SocketOptions{}).NewSender()
	r := open(t, b, SocketOptions{}).Receivers()[0]
	down, gone := *pathA, *pathA
	down.Link = &Link{Device: deviceIndex(t, a, "old")}
	gone.Link = &Link{Device: 999}
	a.Run("ip", "link", "set", "old", "down")
	for _, path := range []*Path{&down, &gone} {
		mustWrite(t, sender, path, outerPacket(path, 100, 1), outerPacket(path, 101, 2))
		if got := read(t, r, 2, 1500); got[0].Len() != 100 || got[1].Len() != 101 {
			t.Errorf("got %d and %d bytes", got[0].Len(), got[1].Len())
		}
	}
}

func deviceIndex(t testing.TB, ns *netlab.NS, name string) (index int) {
	t.Helper()
	ns.Do(func() {
		i, err := net.InterfaceByName(name)
		if err != nil {
			t.Fatal(err)
		}
		index = i.Index
	})
	return index
}

// Source, mark and device of the path select the kernel's route.
func TestSender_path(t *testing.T) {
	a, b := twoHosts(t)
	netlab.Veth(t, a, b, netlab.End{Name: "eth1", Address: "198.51.100.1/24"}, netlab.End{Name: "eth1", Address: "198.51.100.2/24"})
	b.Run("ip", "address", "add", "203.0.113.9/32", "dev", "lo")
	b.Sysctl("net.ipv4.conf.all.rp_filter", "0")
	// The remote is reached by eth0, unless source, mark or device select eth1.
	a.Run("ip", "route", "add", "203.0.113.9", "via", "192.0.2.2")
	a.Run("ip", "route", "add", "203.0.113.9", "via", "198.51.100.2", "table", "100")
	a.Run("ip", "route", "add", "203.0.113.9", "via", "198.51.100.2", "metric", "1000")
	a.Run("ip", "rule", "add", "from", "198.51.100.1", "lookup", "100")
	a.Run("ip", "rule", "add", "fwmark", "5", "lookup", "100")
	sender := open(t, a, SocketOptions{}).NewSender()
	by := map[string]Receiver{}
	for _, name := range []string{"eth0", "eth1"} {
		by[name] = open(t, b, SocketOptions{Device: deviceIndex(t, b, name)}).Receivers()[0]
	}
	remote := [4]byte{203, 0, 113, 9}
	for _, c := range []struct {
		what string
		path Path
		want string
	}{
		{"nothing", Path{Local: hostA}, "eth0"},
		{"source", Path{Local: [4]byte{198, 51, 100, 1}}, "eth1"},
		{"mark", Path{Local: hostA, Mark: 5}, "eth1"},
		{"device", Path{Local: hostA, Device: deviceIndex(t, a, "eth1")}, "eth1"},
		{"source that this host does not have", Path{Local: [4]byte{192, 0, 2, 77}}, "eth0"},
	} {
		c.path.Remote, c.path.MTU = remote, 1500
		for _, size := range []int{100, 2000} {
			mustWrite(t, sender, &c.path, outerPacket(&c.path, size, 1))
			got := read(t, by[c.want], 1, packet.MaxSize)
			if len(got) != 1 || got[0].Len() != size || [4]byte(got[0].Bytes()[12:]) != c.path.Local {
				t.Errorf("%s, %d bytes: not received by %s as sent", c.what, size, c.want)
			}
		}
	}
}

// An IPsec policy for protocol 4 applies to both raw sockets.
func TestSender_ipsecPolicy(t *testing.T) {
	a, _ := twoHosts(t)
	s := open(t, a, SocketOptions{})
	if !s.(*socket).protocolCmsg {
		t.Skip("needs a kernel that takes IP_PROTOCOL (6.4)")
	}
	if out, err := a.Try("ip", "xfrm", "policy", "add", "src", "192.0.2.1", "dst", "192.0.2.2", "proto", "4", "dir", "out", "action", "block"); err != nil {
		t.Skipf("needs a kernel with IPsec: %s", out)
	}
	sender := s.NewSender()
	for _, size := range []int{100, 2000} { // hdrincl, fragmenting
		n, err := sender.Write([]*packet.Buffer{outerPacket(pathA, size, 1)}, []*Path{pathA})
		if n != 0 || !errors.Is(err, unix.EPERM) {
			t.Errorf("%d bytes: %d sent, %v; want the policy to forbid it", size, n, err)
		}
	}
}

// If the first hop's MTU is lower than path.MTU, packets with DF=0 are fragmented all the same.
func TestSender_firstHopMTULower(t *testing.T) {
	a, b := twoHosts(t)
	a.Run("ip", "link", "set", "eth0", "mtu", "1400")
	sender := open(t, a, SocketOptions{}).NewSender()
	r := open(t, b, SocketOptions{}).Receivers()[0]
	framed := *pathA
	framed.Link = linkTo(t, a, b)
	for _, path := range []*Path{pathA, &framed} {
		batch := []*packet.Buffer{outerPacket(path, 1400, 1), outerPacket(path, 1500, 2), outerPacket(path, 1399, 3)}
		mustWrite(t, sender, path, batch...)
		for i, got := range read(t, r, 3, 1500) {
			if got.Len() != batch[i].Len() {
				t.Errorf("link %v: packet %d has %d bytes, want %d", path.Link != nil, i, got.Len(), batch[i].Len())
			}
		}
		// With DF=1 the packet cannot be sent; the others can.
		batch[1].Bytes()[6] = 0x40
		if n, err := sender.Write(batch, []*Path{path}); n != 2 || !errors.Is(err, unix.EMSGSIZE) {
			t.Errorf("link %v: Write sent %d packets: %v; want 2 and EMSGSIZE", path.Link != nil, n, err)
		}
		read(t, r, 2, 1500)
	}
}

// An error that was pending on the socket (sk_err) costs no packet.
func TestSender_pendingSocketError(t *testing.T) {
	a, b := twoHosts(t)
	s := open(t, a, SocketOptions{}).(*socket)
	// Like the hdrincl socket, but it gets ICMP errors.
	a.Do(func() {
		fd, err := newSocket(unix.AF_INET, unix.IPPROTO_IPIP,
			sockopt(unix.IPPROTO_IP, unix.IP_HDRINCL, "IP_HDRINCL", 1),
			sockopt(unix.IPPROTO_IP, unix.IP_RECVERR, "IP_RECVERR", 1))
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(s.hdrincl)
		s.hdrincl = fd
	})
	sender := s.NewSender()
	// Nobody listens in b yet: its kernel answers protocol unreachable.
	mustWrite(t, sender, pathA, outerPacket(pathA, 100, 1))
	fds := []unix.PollFd{{Fd: int32(s.hdrincl)}}
	if n, err := unix.Poll(fds, 10000); n != 1 || fds[0].Revents&unix.POLLERR == 0 {
		t.Fatalf("no error came: %v", err)
	}
	r := open(t, b, SocketOptions{}).Receivers()[0]
	mustWrite(t, sender, pathA, outerPacket(pathA, 101, 1), outerPacket(pathA, 102, 1))
	if got := read(t, r, 2, 1500); got[0].Len() != 101 {
		t.Errorf("got %d bytes first, want 101", got[0].Len())
	}
}

// A packet without a route does not stop the batch.
func TestSender_noRoute(t *testing.T) {
	a := netlab.New(t)
	sender := open(t, a, SocketOptions{}).NewSender()
	batch := []*packet.Buffer{outerPacket(pathA, 100, 1), outerPacket(pathA, 2000, 1), outerPacket(pathA, 100, 1)}
	if n, err := sender.Write(batch, []*Path{pathA}); n != 0 || !errors.Is(err, unix.ENETUNREACH) {
		t.Errorf("Write sent %d packets: %v; want 0 and ENETUNREACH", n, err)
	}
}

func TestSender_queueFull(t *testing.T) {
	a, b := twoHosts(t)
	sender := open(t, a, SocketOptions{}).NewSender()
	a.Run("tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "8kbit", "burst", "1600", "limit", "3000")
	framed := *pathA
	framed.Link = linkTo(t, a, b)
	for _, path := range []*Path{pathA, &framed} {
		var batch []*packet.Buffer
		for range 20 {
			batch = append(batch, outerPacket(path, 1500, 1))
		}
		if n, err := sender.Write(batch, []*Path{path}); n >= 20 || !errors.Is(err, unix.ENOBUFS) {
			t.Errorf("link %v: Write sent %d of 20 packets: %v; want ENOBUFS", path.Link != nil, n, err)
		}
	}
}

// The sockets for sending get no copies of received packets.
func TestSender_receivesNothing(t *testing.T) {
	a, b := twoHosts(t)
	s := open(t, a, SocketOptions{}).(*socket)
	for _, fd := range []int{s.hdrincl, s.fragmenting, s.link} {
		// Without the filter: the packets must not even be cloned to these sockets.
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0); err != nil && fd != s.link {
			t.Fatal(err)
		}
	}
	mustWrite(t, open(t, b, SocketOptions{}).NewSender(), pathB, outerPacket(pathB, 100, 1))
	read(t, s.Receivers()[0], 1, 1500)
	for i, fd := range []int{s.hdrincl, s.fragmenting, s.link} {
		if n, _, err := unix.Recvfrom(fd, make([]byte, 1500), unix.MSG_DONTWAIT); err != unix.EAGAIN {
			t.Errorf("socket %d received %d bytes: %v", i, n, err)
		}
	}
}

// The error names the missing capability, and no file descriptor leaks.
func TestOpenSocket_missingCapability(t *testing.T) {
	ns := netlab.New(t)
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		ns.Do(func() {
			// Capabilities belong to the thread, and Do has locked it.
			header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
			var all, data [2]unix.CapUserData
			if err = unix.Capget(&header, &all[0]); err != nil {
				return
			}
			data = all
			data[0].Effective &^= 1 << unix.CAP_NET_RAW
			if err = unix.Capset(&header, &data[0]); err != nil {
				return
			}
			before := openFiles(t)
			_, err = OpenSocket(SocketOptions{})
			if after := openFiles(t); after != before {
				t.Errorf("%d files are open, were %d", after, before)
			}
			if e := unix.Capset(&header, &all[0]); e != nil {
				err = e
			}
		})
	}()
	<-done
	if !errors.Is(err, os.ErrPermission) || !strings.Contains(err.Error(), "CAP_NET_RAW") || strings.Contains(err.Error(), "\n") {
		t.Errorf("got %v", err)
	}
}

// refuse makes socket(2) of a family fail with errno in the calling thread, for good (seccomp).
func refuse(family uint32, errno unix.Errno) error {
	raw, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadAbsolute{Off: 0, Size: 4}, // the number of the call
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.SYS_SOCKET, SkipTrue: 3},
		bpf.LoadAbsolute{Off: 16, Size: 4}, // the lower half of its first argument
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: family, SkipTrue: 1},
		bpf.RetConstant{Val: unix.SECCOMP_RET_ERRNO | uint32(errno)},
		bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW},
	})
	if err != nil {
		return err
	}
	code := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		code[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	program := unix.SockFprog{Len: uint16(len(code)), Filter: &code[0]}
	return unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&program)), 0, 0)
}

// Where AF_PACKET is refused the raw sockets send and receive, and packet sockets that are left are closed.
func TestOpenSocket_noPacketSockets(t *testing.T) {
	a, b := twoHosts(t)
	k := newKeeping(t)
	before := open(t, a, k.options(SocketOptions{Receivers: 2}))
	before.Close()
	if len(k.kept) < 3 {
		t.Fatalf("%d sockets are left", len(k.kept))
	}
	for _, o := range []SocketOptions{{Receivers: 2}, k.options(SocketOptions{Receivers: 2})} {
		var s Socket
		var err error
		done := make(chan struct{})
		go func() {
			defer close(done)
			runtime.LockOSThread() // and the thread ends with the goroutine
			a.Do(func() {
				if err = refuse(unix.AF_PACKET, unix.EAFNOSUPPORT); err == nil {
					s, err = OpenSocket(o)
				}
			})
		}()
		<-done
		if err != nil {
			t.Fatal(err)
		}
		if s.(ReceiveSetter).PacketSockets() || len(s.Receivers()) != 1 {
			t.Errorf("packet sockets %v, %d receivers", s.(ReceiveSetter).PacketSockets(), len(s.Receivers()))
		}
		setReceive(t, a, s, Reception{Local: hostA, Remote: hostB})
		other := open(t, b, SocketOptions{})
		mustWrite(t, s.NewSender(), pathA, outerPacket(pathA, 100, 1), outerPacket(pathA, 2000, 2))
		read(t, other.Receivers()[0], 2, 2000)
		mustWrite(t, other.NewSender(), pathB, outerPacket(pathB, 100, 3))
		read(t, s.Receivers()[0], 1, 1500)
		s.Close()
		other.Close()
	}
	for _, fd := range k.kept {
		if socketOption(fd, unix.SO_DOMAIN) == unix.AF_PACKET {
			t.Error("a packet socket is left to the next process")
		}
	}
}

func TestSocketReadError(t *testing.T) {
	a, b := twoHosts(t)
	s := open(t, a, SocketOptions{})
	type result struct {
		p   []byte
		err error
	}
	got := make(chan result, 1)
	go func() {
		buf := make([]byte, 1500)
		n, err := s.ReadError(buf)
		got <- result{buf[:n], err}
	}()
	// ICMP errors about UDP, and echo replies, are not reported.
	a.Run("ping", "-c", "1", "-w", netlab.Seconds(netlab.Timeout()), "192.0.2.2")
	a.Do(func() {
		c, err := net.Dial("udp4", "192.0.2.2:9")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		netlab.Eventually(t, "the answer is there", func() bool {
			_, err := c.Write([]byte("x"))
			return errors.Is(err, unix.ECONNREFUSED)
		})
	})
	_ = b // without a protocol-4 socket: its kernel answers ICMP 3/2
	mustWrite(t, s.NewSender(), pathA, outerPacket(pathA, 100, 1))
	select {
	case r := <-got:
		if r.err != nil || len(r.p) < 56 || r.p[9] != 1 || r.p[20] != 3 || r.p[21] != 2 || r.p[28+9] != 4 {
			t.Errorf("got %x, %v; want a protocol unreachable that quotes protocol 4", r.p, r.err)
		}
	case <-time.After(patience):
		t.Fatal("no error came")
	}
}
