package tun

import (
	"fmt"
	"os"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// attachQueueSelector attaches an eBPF program that selects the queue of a packet by a hash
// of its flow only (TUNSETSTEERINGEBPF, Linux 4.16). Loading it needs CAP_BPF where
// unprivileged eBPF is disabled.
//
// The kernel's default (tun_automq_select_queue) is a hash until a packet of the flow is
// written, then the queue that was written to: the first reply moves the flow to another
// queue, which reorders it. It also hashes every packet written.
func attachQueueSelector(fd int) error {
	program, err := queueSelectorProgram()
	if err != nil {
		return fmt.Errorf("load the program that chooses the queue: %w", err)
	}
	return os.NewSyscallError("ioctl TUNSETSTEERINGEBPF", unix.IoctlSetPointerInt(fd, unix.TUNSETSTEERINGEBPF, program.FD()))
}

// queueSelectorProgram loads the program once, for all devices: when later ones are opened, the process may have
// given up the privilege to load it.
var queueSelectorProgram = sync.OnceValues(loadQueueSelector)

// LoadQueueSelector loads the program ahead of Open, which then needs no more privileges for several queues than
// for one. If that fails, Options.OnDegraded gets the error.
func LoadQueueSelector() { _, _ = queueSelectorProgram() }

func loadQueueSelector() (*ebpf.Program, error) {
	return ebpf.NewProgram(&ebpf.ProgramSpec{
		Name:         "ipipd_steering",
		Type:         ebpf.SocketFilter,
		Instructions: queueSelector(),
		License:      "MIT",
	})
}

// queueSelector returns a program that hashes the addresses and, for unfragmented TCP and
// UDP, the ports; the kernel takes the result modulo the number of queues. Ports of a first
// fragment are ignored, as the other fragments have none. A load beyond the packet's end
// ends the program with 0.
func queueSelector() asm.Instructions {
	const (
		packet = asm.R6 // the skb: LD_ABS and LD_IND take it from R6
		hash   = asm.R7
		header = asm.R8 // the IPv4 header's length in bytes
		loaded = asm.R0

		golden        = -0x61c88647 // 2^32 divided by the golden ratio, as an int32
		fragmentation = 0x3fff      // MF and the offset
	)
	return asm.Instructions{
		asm.Mov.Reg(packet, asm.R1),
		asm.LoadAbs(12, asm.Word), // source address
		asm.Mov.Reg32(hash, loaded),
		asm.Mul.Imm32(hash, golden),
		asm.LoadAbs(16, asm.Word), // destination address
		asm.Xor.Reg32(hash, loaded),
		asm.LoadAbs(6, asm.Half),
		asm.JSet.Imm(loaded, fragmentation, "finish"),
		asm.LoadAbs(9, asm.Byte),
		asm.JEq.Imm(loaded, unix.IPPROTO_TCP, "ports"),
		asm.JNE.Imm(loaded, unix.IPPROTO_UDP, "finish"),
		asm.LoadAbs(0, asm.Byte).WithSymbol("ports"),
		asm.And.Imm32(loaded, 0xf),
		asm.LSh.Imm32(loaded, 2),
		asm.Mov.Reg32(header, loaded),
		asm.LoadInd(loaded, header, 0, asm.Word),
		asm.Mul.Imm32(hash, golden),
		asm.Xor.Reg32(hash, loaded),
		asm.Mul.Imm32(hash, golden).WithSymbol("finish"),
		asm.RSh.Imm32(hash, 16), // the kernel uses 16 bits; the high ones are mixed best
		asm.Mov.Reg32(loaded, hash),
		asm.Return(),
	}
}
