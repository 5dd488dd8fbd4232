package interop

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"ipipd/internal/ipv4"
	"ipipd/internal/netlab"
)

// A kernel that encapsulates on the same physical machine as its peer (veth, or a
// virtual NIC) neither cuts superpackets nor finishes checksums: it leaves both to
// hardware that never comes. Here two BPF programs make a namespace of this
// machine such an end of the tunnel, since its kernel may lack the ipip module and
// no program can send an IP-in-IP superpacket from userspace:
//
//	t0 (one end of a veth) egress → outer header in front → eth0 egress
//	eth0 ingress, protocol 4 → outer header off → t0 ingress
func kernelEncapsulator(t *testing.T, ns *netlab.NS) {
	t.Helper()
	ns.Run("ping", "-n", "-c", "1", "-w", "10", ourOuter)
	remoteMAC := neighbour(t, ns, ourOuter)
	// Nothing ever reaches unused: t0's program takes it all.
	netlab.Veth(t, ns, ns, netlab.End{Name: "t0", Address: peerInner + "/30", MTU: innerMTU}, netlab.End{Name: "unused"})
	var eth0, t0 *net.Interface
	ns.Do(func() {
		var errs [2]error
		eth0, errs[0] = net.InterfaceByName("eth0")
		t0, errs[1] = net.InterfaceByName("t0")
		if err := errors.Join(errs[:]...); err != nil {
			t.Fatal(err)
		}
	})
	// The same Ethernet address, so that what eth0 receives is for t0 as well;
	// superpackets small enough for the outer header's total length.
	ns.Run("ip", "link", "set", "dev", "t0", "address", eth0.HardwareAddr.String(), "arp", "off", "gso_max_size", "60000")

	header := make([]byte, 14+20)
	copy(header, remoteMAC)
	copy(header[6:], eth0.HardwareAddr)
	binary.BigEndian.PutUint16(header[12:], unix.ETH_P_IP)
	outer := ipv4.Header{DF: true, TTL: 64, Protocol: ipv4.ProtocolIPIP, Source: [4]byte{192, 0, 2, 2}, Destination: [4]byte{192, 0, 2, 1}}
	outer.Put(header[14:])
	attach(t, ns, encapsulateProgram([34]byte(header), eth0.Index), t0.Index, bpfTCXEgress)
	attach(t, ns, decapsulateProgram(t0.Index), eth0.Index, bpfTCXIngress)
}

// neighbour is the Ethernet address of a neighbour that was spoken to.
func neighbour(t *testing.T, ns *netlab.NS, address string) net.HardwareAddr {
	t.Helper()
	var to, lladdr, mac string
	out := ns.Run("ip", "neighbour", "show", address, "dev", "eth0")
	if _, err := fmt.Sscan(out, &to, &lladdr, &mac); err != nil {
		t.Fatalf("the Ethernet address of %s is not known: %s", address, out)
	}
	addr, err := net.ParseMAC(mac)
	if err != nil {
		t.Fatal(err)
	}
	return addr
}

// From linux/bpf.h.
const (
	bpfProgLoad, bpfLinkCreate  = 5, 28
	bpfSchedCLS                 = 3
	bpfTCXIngress, bpfTCXEgress = 46, 47

	skbLen, skbProtocol = 0, 16 // offsets in struct __sk_buff

	skbStoreBytes, redirect, skbLoadBytes, skbAdjustRoom = 9, 23, 26, 50

	roomMAC                   = 1 // BPF_ADJ_ROOM_MAC
	roomFixedGSO, roomEncapL3 = 1, 2
	redirectIngress           = 1
	actOK                     = 0
)

// instruction is struct bpf_insn, of a little-endian machine.
type instruction struct {
	code      uint8
	registers uint8 // source << 4 | destination
	offset    int16
	immediate int32
}

func move(dst uint8, imm int32) instruction     { return instruction{0xb7, dst, 0, imm} }
func copyReg(dst, src uint8) instruction        { return instruction{0xbf, src<<4 | dst, 0, 0} }
func add(dst uint8, imm int32) instruction      { return instruction{0x07, dst, 0, imm} }
func addReg(dst, src uint8) instruction         { return instruction{0x0f, src<<4 | dst, 0, 0} }
func and(dst uint8, imm int32) instruction      { return instruction{0x57, dst, 0, imm} }
func xor(dst uint8, imm int32) instruction      { return instruction{0xa7, dst, 0, imm} }
func shiftRight(dst uint8, n int32) instruction { return instruction{0x77, dst, 0, n} }
func toBE16(dst uint8) instruction              { return instruction{0xdc, dst, 0, 16} }
func call(helper int32) instruction             { return instruction{0x85, 0, 0, helper} }
func exit() instruction                         { return instruction{0x95, 0, 0, 0} }

func loadWord(dst, src uint8, offset int16) instruction {
	return instruction{0x61, src<<4 | dst, offset, 0}
}
func loadByte(dst, src uint8, offset int16) instruction {
	return instruction{0x71, src<<4 | dst, offset, 0}
}
func storeHalf(dst uint8, offset int16, src uint8) instruction {
	return instruction{0x6b, src<<4 | dst, offset, 0}
}
func storeHalfImm(dst uint8, offset int16, imm int32) instruction {
	return instruction{0x6a, dst, offset, imm}
}

// otherwisePass jumps to the program's last two instructions, which let the packet
// go its usual way, unless the register is imm. finish fills in how far that is.
func otherwisePass(dst uint8, imm int32) instruction { return instruction{0x55, dst, toPass, imm} }

const toPass = -1

func finish(p []instruction) []instruction {
	for i := range p {
		if p[i].code == 0x55 && p[i].offset == toPass {
			p[i].offset = int16(len(p) - i - 1)
		}
	}
	return append(p, move(0, actOK), exit())
}

// encapsulateProgram puts an Ethernet and an outer header in front, the latter
// with its total length and checksum still to be made, and sends the packet on by
// another interface.
func encapsulateProgram(header [34]byte, device int) []instruction {
	const frame = -40 // on the stack
	binary.BigEndian.PutUint16(header[14+10:], 0)
	binary.BigEndian.PutUint16(header[14+2:], 0)
	sum := ipv4.Sum(header[14:], 0)
	p := []instruction{
		copyReg(6, 1),
		loadWord(2, 6, skbProtocol), otherwisePass(2, int32(htons(unix.ETH_P_IP))),
		copyReg(1, 6), move(2, 20), move(3, roomMAC), move(4, roomFixedGSO|roomEncapL3), call(skbAdjustRoom), otherwisePass(0, 0),
	}
	for i := 0; i < len(header); i += 2 {
		p = append(p, storeHalfImm(10, frame+int16(i), int32(binary.LittleEndian.Uint16(header[i:]))))
	}
	return finish(append(p,
		loadWord(7, 6, skbLen), add(7, -14),
		move(8, int32(sum)), addReg(8, 7),
		copyReg(2, 8), shiftRight(2, 16), and(8, 0xffff), addReg(8, 2),
		copyReg(2, 8), shiftRight(2, 16), and(8, 0xffff), addReg(8, 2),
		xor(8, 0xffff), toBE16(8), storeHalf(10, frame+14+10, 8),
		toBE16(7), storeHalf(10, frame+14+2, 7),
		copyReg(1, 6), move(2, 0), copyReg(3, 10), add(3, frame), move(4, int32(len(header))), move(5, 0), call(skbStoreBytes),
		move(1, int32(device)), move(2, 0), call(redirect), exit(),
	))
}

// decapsulateProgram takes the outer header off what is IP-in-IP, and gives it to
// another interface as if it had arrived there.
func decapsulateProgram(device int) []instruction {
	return finish([]instruction{
		copyReg(6, 1),
		loadWord(2, 6, skbProtocol), otherwisePass(2, int32(htons(unix.ETH_P_IP))),
		copyReg(1, 6), move(2, 14+9), copyReg(3, 10), add(3, -8), move(4, 1), call(skbLoadBytes), otherwisePass(0, 0),
		loadByte(2, 10, -8), otherwisePass(2, ipv4.ProtocolIPIP),
		copyReg(1, 6), move(2, -20), move(3, roomMAC), move(4, roomFixedGSO), call(skbAdjustRoom), otherwisePass(0, 0),
		move(1, int32(device)), move(2, redirectIngress), call(redirect), exit(),
	})
}

// attach loads a program and puts it on an interface of ns, until the test ends.
func attach(t *testing.T, ns *netlab.NS, program []instruction, device int, where uint32) {
	t.Helper()
	license, log := []byte("MIT\x00"), make([]byte, 64<<10)
	var load struct {
		progType, count   uint32
		program, license  unsafe.Pointer
		logLevel, logSize uint32
		log               unsafe.Pointer
		_                 [64]byte
	}
	load.progType, load.count, load.program, load.license = bpfSchedCLS, uint32(len(program)), unsafe.Pointer(&program[0]), unsafe.Pointer(&license[0])
	load.logLevel, load.logSize, load.log = 1, uint32(len(log)), unsafe.Pointer(&log[0])
	fd, err := bpf(bpfProgLoad, unsafe.Pointer(&load), unsafe.Sizeof(load))
	runtime.KeepAlive(program)
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSYS) {
		t.Skipf("needs BPF programs: %v", err)
	}
	if err != nil {
		t.Fatalf("load a BPF program: %v\n%s", err, unix.ByteSliceToString(log))
	}
	defer unix.Close(fd)
	link := struct {
		program, device, where, flags uint32
		_                             [48]byte
	}{program: uint32(fd), device: uint32(device), where: where}
	ns.Do(func() { fd, err = bpf(bpfLinkCreate, unsafe.Pointer(&link), unsafe.Sizeof(link)) })
	if errors.Is(err, unix.EINVAL) {
		t.Skip("needs BPF programs on interfaces by tcx (Linux 6.6)")
	}
	if err != nil {
		t.Fatalf("attach a BPF program: %v", err)
	}
	t.Cleanup(func() { unix.Close(fd) })
}

func bpf(command uintptr, attr unsafe.Pointer, size uintptr) (fd int, err error) {
	r, _, errno := unix.Syscall(unix.SYS_BPF, command, uintptr(attr), size)
	if errno != 0 {
		return -1, os.NewSyscallError("bpf", errno)
	}
	return int(r), nil
}

// htons is right on a little-endian machine, as all the rest here.
func htons(v uint16) uint16 { return v>>8 | v<<8 }

// What the peer's stack left undone must be done before our stack gets it:
// otherwise TCP from there stands still (0 Gb/s).
func TestInteropUnfinishedSegmentsOfAPeerOnTheSameMachine(t *testing.T) {
	ours, peer := netlab.New(t), netlab.New(t)
	netlab.Veth(t, ours, peer, netlab.End{Name: "eth0", Address: ourOuter + "/24"}, netlab.End{Name: "eth0", Address: peerOuter + "/24"})
	kernelEncapsulator(t, peer)
	d := up(t, ours)
	ping(t, inNamespace(ours), peerInner, fullSize, "")
	ping(t, inNamespace(peer), ourInner, manyFrags, "")

	wire := netlab.Capture(t, ours, "eth0", func(f netlab.Frame) bool { return f.ChecksumPartial && !f.Outgoing })
	bulk(t, inNamespace(ours), inNamespace(peer), peerInner, true)
	bulk(t, inNamespace(ours), inNamespace(peer), peerInner, false)
	// Otherwise this would not be a test of what it is named after.
	wire.Await(netlab.Outer(netlab.Inner(netlab.Protocol(ipv4.ProtocolTCP), netlab.Not(netlab.MaxTotalLen(innerMTU)))))

	datagram(t, peer, ours, ourInner)
	wire.Await(netlab.Outer(netlab.Inner(netlab.Protocol(ipv4.ProtocolUDP), netlab.Not(netlab.TransportChecksum()))))
	if drops := d.Status().Drops; len(drops) > 0 {
		t.Errorf("drops are %v", drops)
	}
}

// datagram sends one over UDP, which must arrive.
func datagram(t *testing.T, from, to *netlab.NS, address string) {
	t.Helper()
	var server net.PacketConn
	var client net.Conn
	var err error
	to.Do(func() { server, err = net.ListenPacket("udp4", address+":0") })
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	from.Do(func() { client, err = net.Dial("udp4", server.LocalAddr().String()) })
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if _, err := client.Write([]byte("a datagram")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 64)
	_ = server.SetReadDeadline(time.Now().Add(30 * time.Second))
	if n, _, err := server.ReadFrom(buf); err != nil || string(buf[:n]) != "a datagram" {
		t.Errorf("received %q: %v", buf[:n], err)
	}
}
