package conformance

import (
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"ipipd/test/netlab"
)

// The other tests of this package run over the fast path as a variant; these are about when it
// is active, and the fallback to userspace.

var fast = variants[len(variants)-1]

// requireFastPath skips the test unless the fast path of each daemon is active.
func requireFastPath(t *testing.T, daemons ...*netlab.Daemon) {
	t.Helper()
	for _, d := range daemons {
		if s := d.Status().FastPath; s != "active" {
			t.Skipf("no fast path here: %s", s)
		}
	}
}

// fastHosts returns two hosts, and the ends of a tunnel between them that the fast path carries. It skips the test without
// one.
func fastHosts(t *testing.T) (a, b *netlab.NS, da, db *netlab.Daemon) {
	t.Helper()
	a, b = hosts(t)
	da, db = fast.upA(t, a), fast.upB(t, b)
	requireFastPath(t, da, db)
	return a, b, da, db
}

// The fast path is on by default, and print shows why it is off.
func TestFastPath_default(t *testing.T) {
	t.Parallel()
	a, b := hosts(t)
	da, db := upA(t, a), upB(t, b, "--allow-fast-path", "no")
	requireFastPath(t, da)
	ping(t, a, innerB)
	if out, err := da.Run("print", "t0"); err != nil || !strings.Contains(out, "fast-path: active") {
		t.Errorf("print says %v\n%s", err, out)
	}
	if out, err := db.Run("print", "t0"); err != nil || !strings.Contains(out, "fast-path: allow-fast-path is no") {
		t.Errorf("print says %v\n%s", err, out)
	}
}

// The fast path needs CAP_BPF besides the capabilities of every tunnel.
func TestFastPath_capabilities(t *testing.T) {
	t.Parallel()
	runtime.LockOSThread() // never unlocked: see "no CAP_BPF"
	a, b := hosts(t)
	fast.upB(t, b)
	requireFastPath(t, fast.upA(t, a, "--mtu", "1400"))
	a2, _ := hosts(t)
	for c := range uintptr(unix.CAP_LAST_CAP + 1) {
		if c == unix.CAP_BPF || c == unix.CAP_NET_ADMIN || c == unix.CAP_NET_RAW {
			continue
		}
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil {
			t.Skipf("cannot do without a capability: %v", err)
		}
	}
	if s := fast.upA(t, a2).Status().FastPath; s != "active" {
		t.Errorf("fast-path is %q", s)
	}
}

// Reasons for the fallback to userspace, as print shows them; traffic still passes.
func TestFastPath_fallback(t *testing.T) {
	t.Parallel()
	t.Run("fwmark", func(t *testing.T) {
		t.Parallel()
		a, b := hosts(t)
		d := fast.upA(t, a, "--fwmark", "7")
		fast.upB(t, b)
		wantUserspace(t, d, "fwmark")
		ping(t, a, innerB)
	})
	t.Run("no CAP_BPF", func(t *testing.T) {
		t.Parallel()
		// Dropping a capability is irreversible for the thread and its children, so the
		// thread stays locked and ends with the goroutine.
		runtime.LockOSThread()
		a, b := hosts(t)
		for _, c := range []uintptr{unix.CAP_BPF, unix.CAP_SYS_ADMIN} {
			if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil {
				t.Skipf("cannot do without a capability: %v", err)
			}
		}
		d := fast.upA(t, a)
		fast.upB(t, b)
		wantUserspace(t, d, "not permitted")
		ping(t, a, innerB)
	})
	t.Run("an underlay without Ethernet", func(t *testing.T) {
		t.Parallel()
		a, b := hosts(t)
		fast.upA(t, a)
		fast.upB(t, b)
		// A tunnel through the tunnel: its underlay is a TUN.
		d := netlab.Up(t, a, "t1", "--remote-address", innerB, "--address", "10.254.0.1/24")
		netlab.Up(t, b, "t1", "--remote-address", innerA, "--address", "10.254.0.2/24")
		wantUserspace(t, d, "not a plain Ethernet")
		ping(t, a, "10.254.0.2")
		transfer(t, a, b, "10.254.0.2", 1<<20)
	})
}

// wantUserspace checks the reason in print why the fast path is off.
func wantUserspace(t *testing.T, d *netlab.Daemon, why string) {
	t.Helper()
	if s := d.Status(); !strings.Contains(s.FastPath, why) {
		t.Errorf("fast-path is %q, want something about %q", s.FastPath, why)
	}
}

// The peer's MAC address changes, and the neighbour entry is stale until ARP resolves it again.
func TestFastPath_neighbourMACChanged(t *testing.T) {
	t.Parallel()
	a, b, da, db := fastHosts(t)
	ping(t, a, innerB)
	b.Run("ip", "link", "set", "dev", "veth0", "address", "02:00:00:00:00:77")
	a.Run("ip", "neigh", "flush", "dev", "veth0")
	awaitPing(t, a, "the neighbour has another MAC address")
	requireFastPath(t, da, db)
}

// The fast path at one end interoperates with userspace at the other, in both directions.
func TestFastPath_peerInUserspace(t *testing.T) {
	t.Parallel()
	a, b := hosts(t)
	requireFastPath(t, fast.upA(t, a))
	variants[0].upB(t, b)
	transfer(t, a, b, innerB, 20<<20)
	transfer(t, b, a, innerA, 20<<20)
}

// Decapsulated packets are forwarded: as superpackets, by a device without segmentation
// offload, and into a second tunnel.
//
//	a ═ t0 ═ b ── to-c ── c        or        a ═ t0 ═ b ═ t1 ═ c
func TestFastPath_forwarding(t *testing.T) {
	t.Parallel()
	for _, way := range []string{"superpackets", "segments", "tunnel", "tunnel, from userspace"} {
		t.Run(way, func(t *testing.T) {
			t.Parallel()
			a, b := hosts(t)
			c := netlab.New(t)
			netlab.Veth(t, b, c, netlab.End{Name: "to-c", Address: "198.51.100.2/24"}, netlab.End{Name: "veth0", Address: "198.51.100.3/24"})
			b.Sysctl("net.ipv4.ip_forward", "1")
			da := fast.upA(t, a, "--route", "198.51.100.0/24", "--route", "10.254.0.0/24")
			carried := fast
			if way == "tunnel, from userspace" { // superpackets from a TUN are marked SKB_GSO_DODGY
				carried = variants[0]
			}
			db := carried.upB(t, b)
			requireFastPath(t, da)
			var near, far *netlab.Daemon // of the second tunnel
			target, back := "198.51.100.3", "198.51.100.2"
			switch way {
			case "segments":
				b.Run("ethtool", "-K", "to-c", "tx", "off", "tso", "off", "gso", "off")
			case "tunnel", "tunnel, from userspace":
				target, back = "10.254.0.2", "10.254.0.1"
				near = fast.upAs(t, b, "t1", "--remote-address", "198.51.100.3", "--address", back+"/24")
				far = fast.upAs(t, c, "t1", "--remote-address", "198.51.100.2", "--address", target+"/24")
			}
			c.Run("ip", "route", "add", "10.255.0.0/24", "via", back)
			ping(t, a, target)
			some := func() {
				transfer(t, a, c, target, 1<<16)
				transfer(t, c, a, innerA, 1<<16)
			}
			first, second := ends{da, db}, ends{near, far}
			var beforeSecond counted
			if near != nil {
				beforeSecond = second.settle(t, some)
			}
			before := first.settle(t, some)
			transfer(t, a, c, target, 1<<20)
			transfer(t, c, a, innerA, 1<<20)
			first.awaitEqual(t, before)
			if near != nil {
				second.awaitEqual(t, beforeSecond)
			}
		})
	}
}

// Fallback to userspace where bpf(2), or one command of it, fails.
func TestFastPath_bpfRefused(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name    string
		command int // of bpf(2); -1 is all of them
		errno   unix.Errno
		want    string // in what print says
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
			requireFastPath(t, fast.upB(t, b))
			// A seccomp filter is irreversible for the thread and its children, so the
			// thread stays locked and ends with the goroutine.
			runtime.LockOSThread()
			refuseBPF(t, test.command, test.errno)
			d := fast.upA(t, a)
			wantUserspace(t, d, test.want)
			ping(t, a, innerB)
			transfer(t, a, b, innerB, 1<<20)
			transfer(t, b, a, innerA, 1<<20)
		})
	}
}

// refuseBPF makes bpf(2), or one command of it unless that is -1, fail with errno for this
// thread and its children (seccomp).
func refuseBPF(t *testing.T, command int, errno unix.Errno) {
	t.Helper()
	const allow, fail = 0x7fff0000, 0x00050000 // SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO
	load := func(offset uint32) unix.SockFilter { return unix.SockFilter{Code: 0x20, K: offset} }
	// otherwise skips n instructions unless the accumulator is k.
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

// A requirement of the active fast path is lost and comes back.
func TestFastPath_recovery(t *testing.T) {
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
			a, b, da, db := fastHosts(t)
			ping(t, a, innerB)
			test.lose(a, b)
			netlab.Eventually(t, "packets stop", func() bool { return !answered(a, innerB) })
			test.back(a, b)
			awaitPing(t, a, test.name+" was lost")
			netlab.Eventually(t, "the fast path is active again", func() bool {
				return da.Status().FastPath == "active" && db.Status().FastPath == "active"
			})
			transfer(t, a, b, innerB, 1<<20)
			transfer(t, b, a, innerA, 1<<20)
		})
	}
}

// A killed process leaves nothing behind that disturbs its successor or the peer.
func TestFastPath_killed(t *testing.T) {
	t.Parallel()
	a, b, da, _ := fastHosts(t)
	ping(t, a, innerB)
	da.Stop(unix.SIGKILL)
	d := da.Restart()
	ping(t, a, innerB)
	netlab.Eventually(t, "the fast path is active again", func() bool { s := d.Status(); return s.FastPath == "active" && s.TxPacket > 0 })
	transfer(t, a, b, innerB, 1<<20)
	transfer(t, b, a, innerA, 1<<20)
}
