package conformance

import (
	"runtime"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"ipipd/test/netlab"
)

// A kernel that lacks what the fast path needs, or does not let it have it, as the
// daemon meets it: bpf(2) fails, or one command of it does.
func TestWhereTheKernelRefusesEBPFUserspaceCarries(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name    string
		command int // of bpf(2); -1 is all of them
		errno   unix.Errno
		want    string // in what print and the log say
	}{
		{"lockdown, or a seccomp filter of a container", -1, unix.EPERM, "not permitted"},
		{"no eBPF", -1, unix.ENOSYS, "no eBPF"},
		{"no maps", unix.BPF_MAP_CREATE, unix.EPERM, "not permitted"},
		{"the verifier refuses", unix.BPF_PROG_LOAD, unix.EACCES, "refuses"},
		{"no tcx", unix.BPF_LINK_CREATE, unix.EINVAL, "Linux 6.6"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			a, b := hosts(t)
			isFast(t, fast.upB(t, b))
			// For good, of this thread and what it starts: the goroutine keeps the
			// thread, and both end.
			runtime.LockOSThread()
			refuseBPF(t, test.command, test.errno)
			d := fast.upA(t, a)
			slow(t, d, test.want)
			d.LogsOnce("fast-path")
			ping(t, a, innerB)
			transfer(t, a, b, innerB, 1<<20)
			transfer(t, b, a, innerA, 1<<20)
		})
	}
}

// refuseBPF makes bpf(2), or only one command of it, fail for this thread.
func refuseBPF(t *testing.T, command int, errno unix.Errno) {
	t.Helper()
	const allow, fail = 0x7fff0000, 0x00050000 // SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO
	load := func(offset uint32) unix.SockFilter { return unix.SockFilter{Code: 0x20, K: offset} }
	// otherwise skips n instructions unless what was loaded is k.
	otherwise := func(k uint32, n uint8) unix.SockFilter { return unix.SockFilter{Code: 0x15, K: k, Jf: n} }
	answer := func(k uint32) unix.SockFilter { return unix.SockFilter{Code: 0x06, K: k} }
	// struct seccomp_data: the system call at 0, its first argument at 16.
	program := []unix.SockFilter{load(0), otherwise(unix.SYS_BPF, 1), answer(fail | uint32(errno)), answer(allow)}
	if command >= 0 {
		program = []unix.SockFilter{load(0), otherwise(unix.SYS_BPF, 3), load(16), otherwise(uint32(command), 1), answer(fail | uint32(errno)), answer(allow)}
	}
	filter := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		t.Skipf("needs seccomp: %v", err)
	}
	if err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&filter)), 0, 0); err != nil {
		t.Skipf("needs seccomp: %v", err)
	}
	runtime.KeepAlive(program)
}

// What the fast path stands on goes away while it carries, and comes back.
func TestTheFastPathOutlivesWhatItStandsOn(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name string
		lose func(a, b *netlab.NS)
		back func(a, b *netlab.NS)
	}{
		{"the neighbour",
			func(a, b *netlab.NS) {
				b.Run("ip", "link", "set", "dev", "veth0", "arp", "off")
				a.Run("ip", "neigh", "flush", "dev", "veth0")
			},
			func(a, b *netlab.NS) { b.Run("ip", "link", "set", "dev", "veth0", "arp", "on") }},
		{"the address",
			func(a, b *netlab.NS) { a.Run("ip", "address", "delete", outerA+"/24", "dev", "veth0") },
			func(a, b *netlab.NS) { a.Run("ip", "address", "add", outerA+"/24", "dev", "veth0") }},
		{"the interface's being up",
			func(a, b *netlab.NS) { a.Run("ip", "link", "set", "dev", "t0", "down") },
			func(a, b *netlab.NS) { a.Run("ip", "link", "set", "dev", "t0", "up") }},
		{"the underlay device",
			func(a, b *netlab.NS) { a.Run("ip", "link", "delete", "veth0") },
			func(a, b *netlab.NS) {
				netlab.Veth(t, a, b, netlab.End{Name: "veth0", Address: outerA + "/24"}, netlab.End{Name: "veth0", Address: outerB + "/24"})
			}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			a, b := hosts(t)
			da, db := fast.upA(t, a), fast.upB(t, b)
			isFast(t, da, db)
			ping(t, a, innerB)
			test.lose(a, b)
			netlab.Eventually(t, "packets stop", func() bool { return !answered(a, innerB) })
			test.back(a, b)
			pingsAgain(t, a, test.name+" was lost")
			netlab.Eventually(t, "the kernel carries again", func() bool {
				return da.Status().FastPath == "active" && db.Status().FastPath == "active"
			})
			transfer(t, a, b, innerB, 1<<20)
			transfer(t, b, a, innerA, 1<<20)
		})
	}
}

// Nothing of a killed process is in the way of the next one, nor of the peer's.
func TestTheFastPathOfAKilledTunnelIsItsSuccessors(t *testing.T) {
	t.Parallel()
	a, b := hosts(t)
	da, db := fast.upA(t, a), fast.upB(t, b)
	isFast(t, da, db)
	ping(t, a, innerB)
	da.Stop(unix.SIGKILL)
	d := da.Again()
	ping(t, a, innerB)
	netlab.Eventually(t, "the kernel carries again", func() bool { s := d.Status(); return s.FastPath == "active" && s.TxPacket > 0 })
	transfer(t, a, b, innerB, 1<<20)
	transfer(t, b, a, innerA, 1<<20)
}
