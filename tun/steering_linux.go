package tun

import (
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// steer has the kernel choose the queue of a packet by its flow and nothing else.
//
// By itself it puts a flow into the queue by which that flow's packets were last
// written, once there are any, and by a hash before: the first answer moves a flow
// from one thread to another while there are packets in the first one's queue, and
// the flow is reordered. It also costs a hash for each packet that is written.
//
// The choice is a program's (TUNSETSTEERINGEBPF, Linux 4.16), which takes CAP_BPF
// wherever eBPF is not for everyone. Without it the kernel's own way has to do.
func steer(fd int) error {
	program, err := loadSteering()
	if err != nil {
		return err
	}
	defer unix.Close(program) // the interface holds it
	return os.NewSyscallError("ioctl TUNSETSTEERINGEBPF", unix.IoctlSetPointerInt(fd, unix.TUNSETSTEERINGEBPF, program))
}

// instruction is struct bpf_insn of a little-endian machine.
type instruction struct {
	code      uint8
	registers uint8 // source << 4 | destination
	offset    int16
	immediate int32
}

// Opcodes, from linux/bpf_common.h and linux/bpf.h. What loads from the packet puts
// it, in the machine's byte order, into register 0; a packet that is too short for it
// ends the program with 0.
const (
	loadByte   = unix.BPF_LD | unix.BPF_ABS | unix.BPF_B
	loadHalf   = unix.BPF_LD | unix.BPF_ABS | unix.BPF_H
	loadWord   = unix.BPF_LD | unix.BPF_ABS | unix.BPF_W
	loadBehind = unix.BPF_LD | unix.BPF_IND | unix.BPF_W // at a register
	and        = unix.BPF_ALU | unix.BPF_AND
	shiftLeft  = unix.BPF_ALU | unix.BPF_LSH
	shiftRight = unix.BPF_ALU | unix.BPF_RSH
	multiply   = unix.BPF_ALU | unix.BPF_MUL
	xorWith    = unix.BPF_ALU | unix.BPF_XOR | unix.BPF_X
	copyWord   = unix.BPF_ALU | unix.BPF_MOV | unix.BPF_X
	copyWhole  = unix.BPF_ALU64 | unix.BPF_MOV | unix.BPF_X
	ifAnyBit   = unix.BPF_JMP | unix.BPF_JSET
	ifEqual    = unix.BPF_JMP | unix.BPF_JEQ
	unless     = unix.BPF_JMP | unix.BPF_JNE
	exit       = unix.BPF_JMP | unix.BPF_EXIT
)

// steering hashes addresses and, of TCP and UDP in one piece, ports; the queue is
// the result modulo their number. Fragments have no ports but the first, so none of
// them is taken to have any.
func steering() []instruction {
	const golden = -0x61c88647 // 2^32 divided by the golden ratio, as an int32
	return []instruction{
		{code: copyWhole, registers: 1<<4 | 6}, // the packet has to be there for the loads
		{code: loadWord, immediate: 12},
		{code: copyWord, registers: 0<<4 | 7},
		{code: multiply, registers: 7, immediate: golden},
		{code: loadWord, immediate: 16},
		{code: xorWith, registers: 0<<4 | 7},
		{code: loadHalf, immediate: 6},
		{code: ifAnyBit, registers: 0, offset: 10, immediate: 0x3fff}, // MF and the offset
		{code: loadByte, immediate: 9},
		{code: ifEqual, registers: 0, offset: 1, immediate: unix.IPPROTO_TCP},
		{code: unless, registers: 0, offset: 7, immediate: unix.IPPROTO_UDP},
		{code: loadByte, immediate: 0},
		{code: and, registers: 0, immediate: 0xf},
		{code: shiftLeft, registers: 0, immediate: 2},
		{code: copyWord, registers: 0<<4 | 8},
		{code: loadBehind, registers: 8 << 4},
		{code: multiply, registers: 7, immediate: golden},
		{code: xorWith, registers: 0<<4 | 7},
		{code: multiply, registers: 7, immediate: golden},
		{code: shiftRight, registers: 7, immediate: 16}, // the kernel takes 16 bits: the better ones
		{code: copyWord, registers: 7 << 4},
		{code: exit},
	}
}

func loadSteering() (fd int, err error) {
	program, license := steering(), []byte("MIT\x00")
	// The beginning of union bpf_attr, as far as BPF_PROG_LOAD needs it.
	attr := struct {
		kind, count      uint32
		program, license unsafe.Pointer
		_                [96]byte
	}{unix.BPF_PROG_TYPE_SOCKET_FILTER, uint32(len(program)), unsafe.Pointer(&program[0]), unsafe.Pointer(&license[0]), [96]byte{}}
	r, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_LOAD, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	runtime.KeepAlive(program)
	runtime.KeepAlive(license)
	if errno != 0 {
		return -1, os.NewSyscallError("bpf BPF_PROG_LOAD", errno)
	}
	return int(r), nil
}
