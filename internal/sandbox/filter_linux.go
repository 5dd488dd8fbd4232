package sandbox

import (
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// call allows a system call: always, or if all conditions of one of the alternatives hold.
type call struct {
	number       uintptr
	alternatives [][]condition
}

// condition holds if the lower half of an argument, or the upper one, masked with mask, is one of values.
type condition struct {
	argument int
	upper    bool
	mask     uint32
	values   []uint32
}

// is returns the condition that argument i, an int, is one of values.
func is(i int, values ...uint32) condition {
	return condition{argument: i, mask: ^uint32(0), values: values}
}

// masked returns the condition that argument i has, of the bits of mask, exactly these.
func masked(i int, mask, bits uint32) condition {
	return condition{argument: i, mask: mask, values: []uint32{bits}}
}

// isZero returns the conditions that argument i, a pointer, is nil.
func isZero(i int) []condition {
	return []condition{is(i, 0), {argument: i, upper: true, mask: ^uint32(0), values: []uint32{0}}}
}

// struct seccomp_data (linux/seccomp.h), little-endian.
const (
	numberOffset   = 0
	archOffset     = 4
	argumentOffset = 16
	wordLen        = 4
)

// What the filter returns, besides the answer to a refused call.
const (
	allow      = unix.SECCOMP_RET_ALLOW
	noSuchCall = unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
)

// filter returns a program that allows calls of an architecture. Any other returns refused, but for clone3,
// whose callers have to try clone.
func filter(arch uint32, calls []call, refused uint32) []bpf.Instruction {
	program := []bpf.Instruction{
		bpf.LoadAbsolute{Off: archOffset, Size: wordLen},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: arch, SkipTrue: 1},
		bpf.RetConstant{Val: refused},
		bpf.LoadAbsolute{Off: numberOffset, Size: wordLen},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.SYS_CLONE3, SkipTrue: 1},
		bpf.RetConstant{Val: noSuchCall},
	}
	for _, c := range calls {
		// The instructions of a call are skipped for other calls, and always return.
		then := c.instructions(refused)
		program = append(program, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: uint32(c.number), SkipTrue: uint8(len(then))})
		program = append(program, then...)
	}
	return append(program, bpf.RetConstant{Val: refused})
}

func (c *call) instructions(refused uint32) (all []bpf.Instruction) {
	if len(c.alternatives) == 0 {
		return []bpf.Instruction{bpf.RetConstant{Val: allow}}
	}
	for _, conditions := range c.alternatives {
		left := 1 // instructions of the alternative that follow
		for _, c := range conditions {
			left += c.length()
		}
		for _, c := range conditions {
			left -= c.length()
			all = append(all, c.instructions(left)...)
		}
		all = append(all, bpf.RetConstant{Val: allow})
	}
	return append(all, bpf.RetConstant{Val: refused})
}

func (c *condition) length() int { return len(c.values) + 3 }

// instructions returns a test of the condition: if it does not hold, more instructions behind the test are skipped.
func (c *condition) instructions(more int) []bpf.Instruction {
	offset := uint32(argumentOffset + 2*wordLen*c.argument)
	if c.upper {
		offset += wordLen
	}
	all := []bpf.Instruction{
		bpf.LoadAbsolute{Off: offset, Size: wordLen},
		bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: c.mask},
	}
	for i, v := range c.values {
		all = append(all, bpf.JumpIf{Cond: bpf.JumpEqual, Val: v, SkipTrue: uint8(len(c.values) - i)})
	}
	return append(all, bpf.Jump{Skip: uint32(more)})
}

// restrictCalls allows all threads of the process only the system calls that p needs.
func restrictCalls(p Policy) error {
	refused := unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
	if p.Mode == Strict {
		refused = unix.SECCOMP_RET_KILL_PROCESS
	}
	raw, err := bpf.Assemble(filter(auditArch, calls(p, os.Getpid()), refused))
	if err != nil {
		return err
	}
	code := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		code[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	program := unix.SockFprog{Len: uint16(len(code)), Filter: &code[0]}
	// With TSYNC all threads get the filter, or the ID of a thread is returned that cannot. With LOG refused
	// calls are in the audit log, which is the kernel's log without an auditd.
	const flags = unix.SECCOMP_FILTER_FLAG_TSYNC | unix.SECCOMP_FILTER_FLAG_LOG
	thread, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&program)))
	runtime.KeepAlive(code)
	switch {
	case errno != 0:
		return os.NewSyscallError("seccomp", errno)
	case thread != 0:
		return os.NewSyscallError("seccomp", unix.ESRCH)
	}
	return nil
}
