package sandbox

import (
	"encoding/binary"
	"testing"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// The filter runs in the interpreter of package bpf, which loads words as big-endian, on a struct seccomp_data whose
// arguments have their low word first.
func TestFilter(t *testing.T) {
	const pid, refused = 4711, unix.SECCOMP_RET_KILL_PROCESS
	run := func(p Policy, arch uint32, number uint32, args ...uint64) uint32 {
		t.Helper()
		vm, err := bpf.NewVM(filter(auditArch, calls(p, pid), refused))
		if err != nil {
			t.Fatal(err)
		}
		data := make([]byte, 64)
		binary.BigEndian.PutUint32(data[numberOffset:], number)
		binary.BigEndian.PutUint32(data[archOffset:], arch)
		for i, a := range args {
			binary.BigEndian.PutUint32(data[argumentOffset+8*i:], uint32(a))
			binary.BigEndian.PutUint32(data[argumentOffset+8*i+4:], uint32(a>>32))
		}
		got, err := vm.Run(data)
		if err != nil {
			t.Fatal(err)
		}
		return uint32(got)
	}
	const cloexec = unix.SOCK_CLOEXEC | unix.SOCK_NONBLOCK
	plain, ebpf := Policy{}, Policy{EBPF: true}
	for _, c := range []struct {
		name   string
		p      Policy
		arch   uint32
		number uint32
		args   []uint64
		want   uint32
	}{
		{"the first", plain, auditArch, unix.SYS_READV, nil, allow},
		{"the last", plain, auditArch, unix.SYS_IOCTL, []uint64{3, unix.SIOCGSKNS}, allow},
		{"another architecture", plain, unix.AUDIT_ARCH_I386, unix.SYS_READV, nil, refused},
		{"x32", plain, auditArch, unix.SYS_READV | 0x40000000, nil, refused},
		{"execve", plain, auditArch, unix.SYS_EXECVE, nil, refused},
		{"clone3", plain, auditArch, unix.SYS_CLONE3, nil, noSuchCall},
		{"a thread of Go", plain, auditArch, unix.SYS_CLONE, []uint64{0x50f00}, allow},
		{"a thread of the C library", plain, auditArch, unix.SYS_CLONE, []uint64{0x3d0f00}, allow},
		{"fork", plain, auditArch, unix.SYS_CLONE, []uint64{uint64(unix.SIGCHLD)}, refused},
		{"vfork", plain, auditArch, unix.SYS_CLONE, []uint64{unix.CLONE_VM | unix.CLONE_VFORK}, refused},
		{"a thread in a namespace", plain, auditArch, unix.SYS_CLONE, []uint64{0x50f00 | unix.CLONE_NEWNET}, refused},
		{"a stream", plain, auditArch, unix.SYS_SOCKET, []uint64{unix.AF_INET, unix.SOCK_STREAM | cloexec, 6}, allow},
		{"a raw socket", plain, auditArch, unix.SYS_SOCKET, []uint64{unix.AF_INET, unix.SOCK_RAW | cloexec, 4}, allow},
		{"a raw socket of IPv6", plain, auditArch, unix.SYS_SOCKET, []uint64{unix.AF_INET6, unix.SOCK_RAW | cloexec, 4}, refused},
		{"SCTP", plain, auditArch, unix.SYS_SOCKET, []uint64{unix.AF_INET, unix.SOCK_SEQPACKET, 132}, refused},
		{"netlink", plain, auditArch, unix.SYS_SOCKET, []uint64{unix.AF_NETLINK, unix.SOCK_RAW | cloexec, unix.NETLINK_XFRM}, allow},
		{"generic netlink", plain, auditArch, unix.SYS_SOCKET, []uint64{unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_GENERIC}, refused},
		{"a packet socket", plain, auditArch, unix.SYS_SOCKET, []uint64{unix.AF_PACKET, unix.SOCK_RAW, 0}, refused},
		{"TUNSETIFF", plain, auditArch, unix.SYS_IOCTL, []uint64{3, unix.TUNSETIFF}, allow},
		{"TUNSETSTEERINGEBPF", plain, auditArch, unix.SYS_IOCTL, []uint64{3, unix.TUNSETSTEERINGEBPF}, allow},
		{"TUNSETCARRIER", plain, auditArch, unix.SYS_IOCTL, []uint64{3, unix.TUNSETCARRIER}, allow},
		{"TUNGETDEVNETNS", plain, auditArch, unix.SYS_IOCTL, []uint64{3, unix.TUNGETDEVNETNS}, allow},
		{"TIOCSTI", plain, auditArch, unix.SYS_IOCTL, []uint64{0, unix.TIOCSTI}, refused},
		{"TIOCLINUX", plain, auditArch, unix.SYS_IOCTL, []uint64{0, 0x541c}, refused},
		{"SIOCSIFFLAGS", plain, auditArch, unix.SYS_IOCTL, []uint64{3, unix.SIOCSIFFLAGS}, refused},
		{"memory", plain, auditArch, unix.SYS_MMAP, []uint64{0, 4096, unix.PROT_READ | unix.PROT_WRITE}, allow},
		{"code", plain, auditArch, unix.SYS_MMAP, []uint64{0, 4096, unix.PROT_READ | unix.PROT_EXEC}, refused},
		{"a signal to itself", plain, auditArch, unix.SYS_TGKILL, []uint64{pid, 1, 10}, allow},
		{"a signal to another", plain, auditArch, unix.SYS_TGKILL, []uint64{pid + 1, 1, 10}, refused},
		{"limits", plain, auditArch, unix.SYS_PRLIMIT64, []uint64{0, unix.RLIMIT_NOFILE, 0, 1}, allow},
		{"new limits", plain, auditArch, unix.SYS_PRLIMIT64, []uint64{0, unix.RLIMIT_NOFILE, 0xc000000000, 0}, refused},
		{"limits of another", plain, auditArch, unix.SYS_PRLIMIT64, []uint64{1, unix.RLIMIT_NOFILE, 0, 1}, refused},
		{"not dumpable", plain, auditArch, unix.SYS_PRCTL, []uint64{unix.PR_SET_DUMPABLE, 0}, allow},
		{"dumpable", plain, auditArch, unix.SYS_PRCTL, []uint64{unix.PR_SET_DUMPABLE, 1}, refused},
		{"bpf", plain, auditArch, unix.SYS_BPF, []uint64{unix.BPF_PROG_LOAD}, refused},
		{"bpf of the fast path", ebpf, auditArch, unix.SYS_BPF, []uint64{unix.BPF_PROG_LOAD}, allow},
		{"bpf by ID", ebpf, auditArch, unix.SYS_BPF, []uint64{unix.BPF_PROG_GET_FD_BY_ID}, refused},
		{"bpf that leaves something behind", ebpf, auditArch, unix.SYS_BPF, []uint64{unix.BPF_OBJ_PIN}, refused},
	} {
		if got := run(c.p, c.arch, c.number, c.args...); got != c.want {
			t.Errorf("%s: %#x, want %#x", c.name, got, c.want)
		}
	}
	// A jump of BPF skips 255 instructions at most, so no call has more; no call is there twice.
	seen := map[uintptr]bool{}
	for _, c := range calls(ebpf, pid) {
		if n := len(c.instructions(refused)); n > 255 {
			t.Errorf("call %d: %d instructions", c.number, n)
		}
		if seen[c.number] {
			t.Errorf("call %d is there twice", c.number)
		}
		seen[c.number] = true
	}
}
