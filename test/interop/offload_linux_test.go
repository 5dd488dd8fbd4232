package interop

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"ipipd/internal/ipv4"
	"ipipd/test/netlab"
)

// kernelEncapsulator makes ns a tunnel end whose kernel encapsulates. A kernel on the same
// machine as its peer (veth, or a virtual NIC) sends superpackets and partial checksums, as
// it leaves both to the hardware. Two BPF programs do it, since the host's kernel may lack
// the ipip module, and userspace cannot send an IP-in-IP superpacket:
//
//	t0 (one end of a veth) egress → outer header in front → eth0 egress
//	eth0 ingress, protocol 4 → outer header off → t0 ingress
func kernelEncapsulator(t *testing.T, ns *netlab.NS) {
	t.Helper()
	ns.Run("ping", "-n", "-c", "1", "-w", netlab.Seconds(netlab.Timeout()), ourOuter)
	remoteMAC := neighbour(t, ns, ourOuter)
	// No packet reaches unused: t0's program redirects them all.
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
	// The same MAC address, so that t0 accepts packets redirected from eth0; superpackets
	// small enough for the outer header's total length.
	ns.Run("ip", "link", "set", "dev", "t0", "address", eth0.HardwareAddr.String(), "arp", "off", "gso_max_size", "60000")

	header := make([]byte, 14+20)
	copy(header, remoteMAC)
	copy(header[6:], eth0.HardwareAddr)
	binary.BigEndian.PutUint16(header[12:], unix.ETH_P_IP)
	outer := ipv4.Header{DF: true, TTL: 64, Protocol: ipv4.ProtocolIPIP, Source: [4]byte{192, 0, 2, 2}, Destination: [4]byte{192, 0, 2, 1}}
	outer.Put(header[14:])
	attach(t, ns, encapsulateProgram([34]byte(header), eth0.Index), t0.Index, ebpf.AttachTCXEgress)
	attach(t, ns, decapsulateProgram(t0.Index), eth0.Index, ebpf.AttachTCXIngress)
}

// neighbour returns the MAC address in the neighbour table.
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

const (
	skbLen, skbProtocol = 0, 16 // offsets in struct __sk_buff

	roomMAC                   = 1    // BPF_ADJ_ROOM_MAC
	roomFixedGSO, roomEncapL3 = 1, 2 // BPF_F_ADJ_ROOM_FIXED_GSO, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4
	redirectIngress           = 1    // BPF_F_INGRESS
	actOK                     = 0    // TC_ACT_OK
)

// pass returns TC_ACT_OK, at the label "pass".
func pass() asm.Instructions {
	return asm.Instructions{asm.Mov.Imm(asm.R0, actOK).WithSymbol("pass"), asm.Return()}
}

// encapsulateProgram prepends header, Ethernet and outer IPv4, with the total length and
// checksum filled in, and redirects the packet to another interface.
func encapsulateProgram(header [34]byte, device int) asm.Instructions {
	const frame = -40 // on the stack
	binary.BigEndian.PutUint16(header[14+10:], 0)
	binary.BigEndian.PutUint16(header[14+2:], 0)
	sum := ipv4.Sum(header[14:], 0)
	p := asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMem(asm.R2, asm.R6, skbProtocol, asm.Word),
		asm.JNE.Imm(asm.R2, int32(htons(unix.ETH_P_IP)), "pass"),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Imm(asm.R2, 20),
		asm.Mov.Imm(asm.R3, roomMAC),
		asm.Mov.Imm(asm.R4, roomFixedGSO|roomEncapL3),
		asm.FnSkbAdjustRoom.Call(),
		asm.JNE.Imm(asm.R0, 0, "pass"),
	}
	for i := 0; i < len(header); i += 2 {
		p = append(p, asm.StoreImm(asm.RFP, frame+int16(i), int64(binary.LittleEndian.Uint16(header[i:])), asm.Half))
	}
	p = append(p,
		asm.LoadMem(asm.R7, asm.R6, skbLen, asm.Word), // R7: the total length
		asm.Add.Imm(asm.R7, -14),
		asm.Mov.Imm(asm.R8, int32(sum)), // R8: the checksum
		asm.Add.Reg(asm.R8, asm.R7),
	)
	for range 2 {
		p = append(p,
			asm.Mov.Reg(asm.R2, asm.R8),
			asm.RSh.Imm(asm.R2, 16),
			asm.And.Imm(asm.R8, 0xffff),
			asm.Add.Reg(asm.R8, asm.R2),
		)
	}
	p = append(p,
		asm.Xor.Imm(asm.R8, 0xffff),
		asm.HostTo(asm.BE, asm.R8, asm.Half),
		asm.StoreMem(asm.RFP, frame+14+10, asm.R8, asm.Half),
		asm.HostTo(asm.BE, asm.R7, asm.Half),
		asm.StoreMem(asm.RFP, frame+14+2, asm.R7, asm.Half),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Imm(asm.R2, 0),
		asm.Mov.Reg(asm.R3, asm.RFP),
		asm.Add.Imm(asm.R3, frame),
		asm.Mov.Imm(asm.R4, int32(len(header))),
		asm.Mov.Imm(asm.R5, 0),
		asm.FnSkbStoreBytes.Call(),
		asm.Mov.Imm(asm.R1, int32(device)),
		asm.Mov.Imm(asm.R2, 0),
		asm.FnRedirect.Call(),
		asm.Return(),
	)
	return append(p, pass()...)
}

// decapsulateProgram removes the outer header of IP-in-IP packets and redirects them to the
// ingress of another interface.
func decapsulateProgram(device int) asm.Instructions {
	const protocol = -8 // on the stack
	return append(asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMem(asm.R2, asm.R6, skbProtocol, asm.Word),
		asm.JNE.Imm(asm.R2, int32(htons(unix.ETH_P_IP)), "pass"),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Imm(asm.R2, 14+9),
		asm.Mov.Reg(asm.R3, asm.RFP),
		asm.Add.Imm(asm.R3, protocol),
		asm.Mov.Imm(asm.R4, 1),
		asm.FnSkbLoadBytes.Call(),
		asm.JNE.Imm(asm.R0, 0, "pass"),
		asm.LoadMem(asm.R2, asm.RFP, protocol, asm.Byte),
		asm.JNE.Imm(asm.R2, ipv4.ProtocolIPIP, "pass"),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Imm(asm.R2, -20),
		asm.Mov.Imm(asm.R3, roomMAC),
		asm.Mov.Imm(asm.R4, roomFixedGSO),
		asm.FnSkbAdjustRoom.Call(),
		asm.JNE.Imm(asm.R0, 0, "pass"),
		asm.Mov.Imm(asm.R1, int32(device)),
		asm.Mov.Imm(asm.R2, redirectIngress),
		asm.FnRedirect.Call(),
		asm.Return(),
	}, pass()...)
}

// attach loads a program and attaches it to an interface of ns by tcx, until the test ends.
func attach(t *testing.T, ns *netlab.NS, instructions asm.Instructions, device int, where ebpf.AttachType) {
	t.Helper()
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, Instructions: instructions, License: "MIT"})
	if errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, unix.EPERM) {
		t.Skipf("needs BPF programs: %v", err)
	}
	if err != nil {
		t.Fatalf("load a BPF program: %+v", err)
	}
	t.Cleanup(func() { program.Close() })
	var attached link.Link
	ns.Do(func() {
		attached, err = link.AttachTCX(link.TCXOptions{Interface: device, Program: program, Attach: where})
	})
	if errors.Is(err, ebpf.ErrNotSupported) {
		t.Skipf("needs BPF programs on interfaces by tcx: %v", err)
	}
	if err != nil {
		t.Fatalf("attach a BPF program: %v", err)
	}
	t.Cleanup(func() { attached.Close() })
}

// htons assumes a little-endian machine, as the programs above do.
func htons(v uint16) uint16 { return v>>8 | v<<8 }

// Superpackets and partial checksums from a peer on the same machine must be completed or
// marked as such before the host's stack gets them: otherwise it drops them, and TCP stalls.
func TestOffload_sameHostPeer(t *testing.T) {
	t.Parallel()
	ours, peer := netlab.New(t), netlab.New(t)
	netlab.Veth(t, ours, peer, netlab.End{Name: "eth0", Address: ourOuter + "/24"}, netlab.End{Name: "eth0", Address: peerOuter + "/24"})
	kernelEncapsulator(t, peer)
	d := up(t, ours)
	ping(t, inNamespace(ours), peerInner, fullSize, "")
	ping(t, inNamespace(peer), ourInner, manyFrags, "")

	wire := netlab.Capture(t, ours, "eth0", func(f netlab.Frame) bool { return f.ChecksumPartial && !f.Outgoing })
	bulk(t, inNamespace(ours), inNamespace(peer), peerInner, true)
	bulk(t, inNamespace(ours), inNamespace(peer), peerInner, false)
	// Otherwise the peer did not offload.
	wire.Await(netlab.Outer(netlab.Inner(netlab.Protocol(ipv4.ProtocolTCP), netlab.Not(netlab.MaxTotalLen(innerMTU)))))

	datagram(t, peer, ours, ourInner)
	wire.Await(netlab.Outer(netlab.Inner(netlab.Protocol(ipv4.ProtocolUDP), netlab.Not(netlab.TransportChecksum()))))
	if drops := d.Status().AllDrops(); len(drops) > 0 {
		t.Errorf("drops are %v", drops)
	}
}

// datagram sends one UDP datagram, which must arrive.
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
	_ = server.SetReadDeadline(time.Now().Add(netlab.Timeout()))
	if n, _, err := server.ReadFrom(buf); err != nil || string(buf[:n]) != "a datagram" {
		t.Errorf("received %q: %v", buf[:n], err)
	}
}
