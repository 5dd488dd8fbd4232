package tun

import (
	"fmt"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// attachQueueSelector has the kernel choose the queue of a packet by its flow and nothing else.
//
// By itself it puts a flow into the queue by which that flow's packets were last
// written, once there are any, and by a hash before: the first answer moves a flow
// from one thread to another while there are packets in the first one's queue, and
// the flow is reordered. It also costs a hash for each packet that is written.
//
// The choice is a program's (TUNSETSTEERINGEBPF, Linux 4.16), which takes CAP_BPF
// wherever eBPF is not for everyone. Without it the kernel's own way has to do.
func attachQueueSelector(fd int) error {
	program, err := loadQueueSelector()
	if err != nil {
		return fmt.Errorf("load the program that chooses the queue: %w", err)
	}
	defer program.Close() // the interface holds it
	return os.NewSyscallError("ioctl TUNSETSTEERINGEBPF", unix.IoctlSetPointerInt(fd, unix.TUNSETSTEERINGEBPF, program.FD()))
}

func loadQueueSelector() (*ebpf.Program, error) {
	return ebpf.NewProgram(&ebpf.ProgramSpec{
		Name:         "ipipd_steering",
		Type:         ebpf.SocketFilter,
		Instructions: queueSelector(),
		License:      "MIT",
	})
}

// steering hashes addresses and, of TCP and UDP in one piece, ports; the queue is
// the result modulo their number. Fragments have no ports but the first, so none of
// them is taken to have any. A packet that is too short for a load ends the program
// with 0.
func queueSelector() asm.Instructions {
	const (
		packet = asm.R6 // where the loads look for it
		hash   = asm.R7
		header = asm.R8 // its length
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
		asm.RSh.Imm32(hash, 16), // the kernel takes 16 bits: the better ones
		asm.Mov.Reg32(loaded, hash),
		asm.Return(),
	}
}
