package rtnl

import (
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	tcx "github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"ipipd/internal/netlab"
)

func TestWhatASocketsFrameMeetsIsAReasonNotToSendDirectly(t *testing.T) {
	const tap = "a packet socket"
	for _, c := range []struct {
		name   string
		device string
		setUp  func(t *testing.T, ns *netlab.NS)
		want   string // a part of the reason; "" is none
	}{
		{"nothing", "eth0", nil, ""},
		{"no veth", "br0", commands("ip link add br0 type bridge"), "no veth"},
		{"a device that is gone", "eth1", commands("ip link delete eth1"), "cannot tell: look up the underlay device"},
		{"a queueing discipline", "eth0", commands("tc qdisc add dev eth0 root pfifo"), "queueing discipline pfifo"},
		{"one on another device", "eth0", commands("tc qdisc add dev eth1 root pfifo"), ""},
		{"one that was taken away", "eth0", commands("tc qdisc add dev eth0 root pfifo", "tc qdisc delete dev eth0 root"), ""},
		{"a place for filters", "eth0", commands("tc qdisc add dev eth0 clsact"), ""},
		{"tcx", "eth0", tcxProgram("eth0", ebpf.AttachTCXEgress), "eBPF programs on its egress"},
		{"tcx on ingress", "eth0", tcxProgram("eth0", ebpf.AttachTCXIngress), ""},
		{"tcx on another device", "eth0", tcxProgram("eth1", ebpf.AttachTCXEgress), ""},
		{"tcpdump", "eth0", packetSocket("eth0", unix.ETH_P_ALL), tap},
		{"tcpdump on every device", "eth0", packetSocket("", unix.ETH_P_ALL), tap},
		{"tcpdump on another device", "eth0", packetSocket("eth1", unix.ETH_P_ALL), ""},
		{"who receives IPv4", "eth0", packetSocket("eth0", unix.ETH_P_IP), ""},
		{"who receives nothing", "eth0", packetSocket("eth0", 0), ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			ns, other := netlab.New(t), netlab.New(t)
			netlab.Veth(t, ns, other, netlab.End{Name: "eth0"}, netlab.End{Name: "eth0"})
			netlab.Veth(t, ns, other, netlab.End{Name: "eth1"}, netlab.End{Name: "eth1"})
			var device int
			if c.device == "eth1" { // which will be gone
				device = index(t, ns, "eth1")
			}
			if c.setUp != nil {
				c.setUp(t, ns)
			}
			if device == 0 {
				device = index(t, ns, c.device)
			}
			ns.Do(func() {
				got := SafeToSendDirectly(device)
				if c.want == "" && got != "" || !strings.Contains(got, c.want) || strings.Contains(got, "\n") {
					t.Errorf("%q, want %q", got, c.want)
				}
			})
		})
	}
}

func commands(all ...string) func(*testing.T, *netlab.NS) {
	return func(t *testing.T, ns *netlab.NS) {
		for _, command := range all {
			if out, err := ns.Try("sh", "-c", command); err != nil {
				t.Skipf("this system cannot %s: %s", command, strings.TrimSpace(out))
			}
		}
	}
}

func tcxProgram(ifname string, where ebpf.AttachType) func(*testing.T, *netlab.NS) {
	return func(t *testing.T, ns *netlab.NS) {
		program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Type:         ebpf.SchedCLS,
			License:      "MIT",
			Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()}, // TCX_NEXT
		})
		if err != nil {
			t.Skipf("needs eBPF: %v", err)
		}
		t.Cleanup(func() { program.Close() })
		device := index(t, ns, ifname)
		ns.Do(func() {
			l, err := tcx.AttachTCX(tcx.TCXOptions{Interface: device, Program: program, Attach: where})
			if err != nil {
				t.Errorf("needs tcx (Linux 6.6): %v", err)
				return
			}
			t.Cleanup(func() { l.Close() })
		})
	}
}

// packetSocket is one for that protocol on an interface, or on all.
func packetSocket(ifname string, protocol uint16) func(*testing.T, *netlab.NS) {
	return func(t *testing.T, ns *netlab.NS) {
		device := 0
		if ifname != "" {
			device = index(t, ns, ifname)
		}
		protocol = protocol<<8 | protocol>>8 // in network byte order
		ns.Do(func() {
			fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Error(err)
				return
			}
			t.Cleanup(func() { unix.Close(fd) })
			if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: protocol, Ifindex: device}); err != nil {
				t.Error(err)
			}
		})
	}
}
