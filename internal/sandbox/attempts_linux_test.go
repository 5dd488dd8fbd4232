package sandbox

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"runtime/pprof"
	"strings"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// attempt is something that a child tries.
type attempt struct {
	name string
	do   func() error
	// landlock is the first ABI of Landlock that refuses it; 0: it is for seccomp or the kernel to refuse.
	landlock int
	// possible: root can do it outside the sandbox, and the process goes on.
	possible bool
	// capability: the kernel refuses it for want of a capability, and seccomp does not.
	capability bool
}

// landlockScope is the first ABI of Landlock with scopes, which refuse with EPERM, not EACCES.
const landlockScope = 6

// childOutside is set for a child that enters no sandbox.
const childOutside = "SANDBOX_TEST_OUTSIDE"

var (
	other    = os.Getenv("SANDBOX_TEST_OTHER")
	run      = os.Getenv("SANDBOX_TEST_RUN")
	readable = os.Getenv("SANDBOX_TEST_READ")
)

// What a child has open before it enters its sandbox.
var (
	tcpListener, abstractListener net.Listener
	pair                          [2]int
)

func prepareChild() {
	tcpListener, _ = net.Listen("tcp", "127.0.0.1:0")
	abstractListener, _ = net.Listen("unix", fmt.Sprintf("@sandbox-test-%d", os.Getpid()))
	pair, _ = unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
}

func raw(number uintptr, args ...uintptr) error {
	var a [6]uintptr
	copy(a[:], args)
	if _, _, errno := unix.Syscall6(number, a[0], a[1], a[2], a[3], a[4], a[5]); errno != 0 {
		return errno
	}
	return nil
}

// socket opens a socket and closes it.
func socket(domain, typ, protocol int) error {
	fd, err := unix.Socket(domain, typ|unix.SOCK_CLOEXEC, protocol)
	if err == nil {
		unix.Close(fd)
	}
	return err
}

func newFD(fd int, err error) error {
	if err == nil {
		unix.Close(fd)
	}
	return err
}

func call1(number uintptr, args ...uintptr) func() error {
	return func() error { return raw(number, args...) }
}

func text(s string) uintptr { // stays valid: kept has the pointer
	b, _ := unix.BytePtrFromString(s)
	kept = append(kept, b)
	return uintptr(unsafe.Pointer(b))
}

var kept []*byte

func mmap(prot int) error {
	b, err := unix.Mmap(-1, 0, 4096, prot, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err == nil {
		_ = unix.Munmap(b)
	}
	return err
}

// loadProgram loads a program that returns 0.
func loadProgram() error {
	instructions := [2]uint64{0xb7, 0x95} // r0 = 0; exit
	license := [4]byte{'M', 'I', 'T', 0}
	attr := struct {
		typ, count      uint32
		code, license   uint64
		logLevel, logSz uint32
		log             uint64
		pad             [80]byte
	}{unix.BPF_PROG_TYPE_SOCKET_FILTER, 2, uint64(uintptr(unsafe.Pointer(&instructions))), uint64(uintptr(unsafe.Pointer(&license))), 0, 0, 0, [80]byte{}}
	fd, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_LOAD, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	runtime.KeepAlive(&instructions)
	runtime.KeepAlive(&license)
	if errno != 0 {
		return errno
	}
	return unix.Close(int(fd))
}

// changeInterface sets the group of the loopback interface to what it is.
func changeInterface() error {
	const loopback, group = 1, 0
	body := make([]byte, unix.SizeofIfInfomsg+8)
	binary.NativeEndian.PutUint32(body[4:], loopback)
	binary.NativeEndian.PutUint16(body[unix.SizeofIfInfomsg:], 8)
	binary.NativeEndian.PutUint16(body[unix.SizeofIfInfomsg+2:], unix.IFLA_GROUP)
	binary.NativeEndian.PutUint32(body[unix.SizeofIfInfomsg+4:], group)
	return netlinkError(unix.NETLINK_ROUTE, unix.RTM_SETLINK, unix.NLM_F_ACK, body)
}

// netlinkError sends a netlink request and returns the error of its answer.
func netlinkError(protocol int, kind, flags uint16, body []byte) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
	if err == unix.EPROTONOSUPPORT {
		return unix.EPERM // the kernel lacks the protocol: as good as refused
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	b := make([]byte, unix.SizeofNlMsghdr, 128)
	binary.NativeEndian.PutUint32(b, uint32(len(b)+len(body)))
	binary.NativeEndian.PutUint16(b[4:], kind)
	binary.NativeEndian.PutUint16(b[6:], unix.NLM_F_REQUEST|flags)
	if err := unix.Sendto(fd, append(b, body...), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	answer := make([]byte, 32<<10)
	n, _, err := unix.Recvfrom(fd, answer, 0)
	if err != nil || n < unix.SizeofNlMsghdr+4 || binary.NativeEndian.Uint16(answer[4:]) != unix.NLMSG_ERROR {
		return err
	}
	if errno := -int32(binary.NativeEndian.Uint32(answer[unix.SizeofNlMsghdr:])); errno != 0 {
		return unix.Errno(errno)
	}
	return nil
}

// tunIoctl makes an ioctl on /dev/net/tun without an interface.
func tunIoctl(request uint) error {
	fd, err := unix.Open(tunDevice, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return unix.EPERM // there is no TUN device: as good as refused
	}
	defer unix.Close(fd)
	return unix.IoctlSetInt(fd, request, 1)
}

var attempts = []attempt{
	{name: "read-another-file", landlock: 1, possible: true, do: func() error { _, err := os.ReadFile("/etc/passwd"); return err }},
	{name: "read-another-folder", landlock: 1, possible: true, do: func() error { _, err := os.ReadDir(other); return err }},
	{name: "read-of-another-process", landlock: 1, possible: true, do: func() error { _, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", os.Getppid())); return err }},
	{name: "write-another-file", landlock: 1, possible: true, do: func() error { return os.WriteFile(filepath.Join(other, "file"), []byte("x"), 0) }},
	{name: "make-a-file", landlock: 1, possible: true, do: func() error { return os.WriteFile(filepath.Join(other, "new"), nil, 0o600) }},
	{name: "connect-by-tcp", landlock: 4, possible: true, do: func() error {
		c, err := net.Dial("tcp", tcpListener.Addr().String())
		if err == nil {
			c.Close()
		}
		return err
	}},
	{name: "listen-by-tcp", landlock: 4, possible: true, do: func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			defer unix.Close(fd)
			err = unix.Bind(fd, &unix.SockaddrInet4{Port: 0, Addr: [4]byte{127, 0, 0, 1}})
		}
		return err
	}},
	{name: "connect-to-an-abstract-socket", landlock: landlockScope, possible: true, do: func() error {
		c, err := net.Dial("unix", abstractListener.Addr().String())
		if err == nil {
			c.Close()
		}
		return err
	}},
	{name: "exec", do: func() error { return unix.Exec("/proc/self/exe", []string{"x"}, nil) }},
	{name: "fork", possible: true, do: func() error {
		p, err := os.StartProcess("/bin/true", []string{"true"}, &os.ProcAttr{})
		if err == nil {
			_, err = p.Wait()
		}
		return err
	}},
	{name: "packet-socket", possible: true, do: func() error { return socket(unix.AF_PACKET, unix.SOCK_RAW, 0) }},
	{name: "crypto-socket", do: func() error { return socket(unix.AF_ALG, unix.SOCK_SEQPACKET, 0) }},
	{name: "vsock", do: func() error { return socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0) }},
	{name: "raw-ipv6-socket", possible: true, do: func() error { return socket(unix.AF_INET6, unix.SOCK_RAW, 58) }},
	{name: "uevent-socket", possible: true, do: func() error { return socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_KOBJECT_UEVENT) }},
	{name: "audit-socket", possible: true, do: func() error { return socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_AUDIT) }},
	{name: "ptrace", do: func() error { return raw(unix.SYS_PTRACE, unix.PTRACE_SEIZE, uintptr(os.Getppid())) }},
	{name: "memory-of-another-process", do: call1(unix.SYS_PROCESS_VM_READV, 1, 0, 0, 0, 0, 0)},
	{name: "mount", do: func() error { return unix.Mount("none", "/mnt", "tmpfs", 0, "") }},
	{name: "mount-by-descriptor", do: call1(unix.SYS_FSOPEN, text("tmpfs"), 0)},
	{name: "umount", do: func() error { return unix.Unmount("/mnt", 0) }},
	{name: "new-namespace", do: func() error { return unix.Unshare(unix.CLONE_NEWUSER) }},
	{name: "another-namespace", do: call1(unix.SYS_SETNS, 0, 0)},
	{name: "chroot", do: func() error { return unix.Chroot("/proc") }},
	{name: "load-an-ebpf-program", possible: true, do: loadProgram},
	{name: "make-an-ebpf-map", do: call1(unix.SYS_BPF, unix.BPF_MAP_CREATE, 0, 0)},
	{name: "perf-event", do: call1(unix.SYS_PERF_EVENT_OPEN, 0, 0, 0, ^uintptr(0), 0)},
	{name: "raise-a-capability", do: func() error {
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var data [2]unix.CapUserData
		if err := unix.Capget(&header, &data[0]); err != nil {
			return err
		}
		data[0].Effective |= 1 << unix.CAP_SYS_ADMIN
		data[0].Permitted |= 1 << unix.CAP_SYS_ADMIN
		return unix.Capset(&header, &data[0])
	}},
	{name: "raise-net-admin", do: func() error {
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		data := [2]unix.CapUserData{{Effective: 1 << unix.CAP_NET_ADMIN, Permitted: 1 << unix.CAP_NET_ADMIN}}
		return unix.Capset(&header, &data[0])
	}},
	{name: "change-an-interface", capability: true, possible: true, do: changeInterface},
	{name: "list-a-packet-filter", capability: true, do: func() error {
		return netlinkError(unix.NETLINK_NETFILTER, unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETCHAIN, unix.NLM_F_DUMP, make([]byte, 4))
	}},
	{name: "raw-socket", capability: true, possible: true, do: func() error { return socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_IPIP) }},
	{name: "make-an-interface", capability: true, do: func() error {
		fd, err := unix.Open(tunDevice, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return unix.EPERM // there is no TUN device: as good as refused
		}
		defer unix.Close(fd)
		ifreq, _ := unix.NewIfreq("sandbox-test")
		ifreq.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		return unix.IoctlIfreq(fd, unix.TUNSETIFF, ifreq)
	}},
	{name: "have-an-interface-outlive-all", do: func() error { return tunIoctl(unix.TUNSETPERSIST) }},
	{name: "give-an-interface-to-a-user", do: func() error { return tunIoctl(unix.TUNSETOWNER) }},
	{name: "port-of-ike", capability: true, do: func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if first, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start"); err == nil && strings.TrimSpace(string(first)) != "1024" {
			return unix.EPERM // here the port takes no capability
		}
		if err := unix.Bind(fd, &unix.SockaddrInet4{Port: 500, Addr: [4]byte{127, 0, 0, 1}}); err != unix.EACCES {
			return err
		}
		return unix.EPERM
	}},
	{name: "become-another-user", do: call1(unix.SYS_SETRESUID, 1, 1, 1)},
	{name: "raise-an-ambient-capability", do: func() error {
		return unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, unix.CAP_NET_ADMIN, 0, 0)
	}},
	{name: "be-dumpable", possible: true, do: func() error { return unix.Prctl(unix.PR_SET_DUMPABLE, 1, 0, 0, 0) }},
	{name: "signal-another-process", possible: true, do: func() error { return unix.Kill(os.Getppid(), 0) }},
	{name: "signal-its-group", do: func() error { return unix.Kill(0, 0) }},
	{name: "raise-a-limit", possible: true, do: func() error {
		var limit unix.Rlimit
		_ = unix.Getrlimit(unix.RLIMIT_NOFILE, &limit)
		return unix.Prlimit(0, unix.RLIMIT_NOFILE, &limit, nil)
	}},
	{name: "map-code", possible: true, do: func() error { return mmap(unix.PROT_READ | unix.PROT_EXEC) }},
	{name: "make-code", do: func() error {
		b, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
		if err == nil {
			err = unix.Mprotect(b, unix.PROT_READ|unix.PROT_EXEC)
		}
		return err
	}},
	{name: "type-into-a-terminal", do: func() error { return unix.IoctlSetPointerInt(0, unix.TIOCSTI, 'x') }},
	{name: "make-a-folder", possible: true, do: func() error { return os.Mkdir(filepath.Join(other, "folder"), 0o700) }},
	{name: "rename-a-file", possible: true, do: func() error { return os.Rename(filepath.Join(other, "folder"), filepath.Join(other, "folder2")) }},
	{name: "io-uring", do: call1(unix.SYS_IO_URING_SETUP, 1, 0)},
	{name: "userfaultfd", do: call1(unix.SYS_USERFAULTFD, 0)},
	{name: "keys", do: call1(unix.SYS_KEYCTL, 0, 0)},
	{name: "load-a-module", do: call1(unix.SYS_FINIT_MODULE, 0, 0, 0)},
	{name: "open-by-handle", do: call1(unix.SYS_OPEN_BY_HANDLE_AT, 0, 0, 0)},
	{name: "open-a-process", do: call1(unix.SYS_PIDFD_OPEN, 1, 0)},
	{name: "personality", do: call1(unix.SYS_PERSONALITY, 0xffffffff)},
	{name: "set-the-clock", do: call1(unix.SYS_CLOCK_SETTIME, 0, 0)},
	{name: "another-filter", do: call1(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_STRICT, 0, 0)},
	{name: "a-number-that-no-call-has", do: call1(4000)},
}

// needs are what a confined process must be able to do.
var needs = []attempt{
	{name: "read-its-configuration", do: func() error { _, err := os.ReadFile(readable); return err }},
	{name: "read-what-replaces-its-configuration", do: func() error { _, err := os.ReadDir(filepath.Dir(readable)); return err }},
	{name: "make-and-remove-in-its-runtime-folder", do: func() error {
		file := filepath.Join(run, "new")
		return errors.Join(os.WriteFile(file, []byte("x"), 0o600), os.WriteFile(file, []byte("y"), 0o600), os.Link(file, file+"2"), os.Remove(file), os.Remove(file+"2"))
	}},
	{name: "read-its-own-state", do: func() error {
		var proc unix.Statfs_t
		if err := unix.Statfs("/proc", &proc); err != nil {
			return err
		}
		for _, file := range []string{"/proc/stat", "/proc/self/stat", "/proc/self/limits", "/proc/thread-self/status", "/proc/sys/net/ipv4/route/min_pmtu"} {
			if _, err := os.ReadFile(file); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
		_, err := os.ReadDir("/proc/self/fd")
		return err
	}},
	{name: "read-the-resolver's-files", do: func() error {
		for _, file := range resolverFiles {
			if _, err := os.ReadFile(file); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
		return nil
	}},
	{name: "memfd", do: func() error {
		fd, err := unix.MemfdCreate("state", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		_, sealErr := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK)
		err = errors.Join(unix.Ftruncate(fd, 8192), unix.Fallocate(fd, 0, 0, 8192), sealErr)
		b, mapErr := unix.Mmap(fd, 0, 8192, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err = errors.Join(err, mapErr); err != nil {
			return err
		}
		b[0] = 1
		return errors.Join(unix.Madvise(b, unix.MADV_DONTDUMP), unix.Msync(b, unix.MS_ASYNC), unix.Munmap(b))
	}},
	{name: "eventfd", do: func() error { return newFD(unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)) }},
	{name: "pass-a-descriptor", do: func() error {
		for i, fd := range pair {
			if err := unix.Sendmsg(fd, []byte("FDSTORE=1"), unix.UnixRights(pair[0]), nil, unix.MSG_NOSIGNAL); err != nil {
				return err
			}
			if _, _, _, _, err := unix.Recvmsg(pair[1-i], make([]byte, 64), make([]byte, 64), unix.MSG_CMSG_CLOEXEC); err != nil {
				return err
			}
		}
		return nil
	}},
	{name: "send-to-a-manager", do: func() error { return socket(unix.AF_UNIX, unix.SOCK_DGRAM, 0) }},
	{name: "netlink", do: func() error {
		var errs []error
		for _, protocol := range []int{unix.NETLINK_ROUTE, unix.NETLINK_NETFILTER, unix.NETLINK_XFRM} {
			if err := socket(unix.AF_NETLINK, unix.SOCK_RAW, protocol); !errors.Is(err, unix.EPROTONOSUPPORT) {
				errs = append(errs, err)
			}
		}
		_, err := net.Interfaces()
		return errors.Join(append(errs, err)...)
	}},
	{name: "udp", do: func() error {
		c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.WriteTo([]byte("x"), c.LocalAddr())
		return err
	}},
	{name: "socket-memory", do: func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		var info [9]uint32
		size := uint32(unsafe.Sizeof(info))
		return raw(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_MEMINFO, uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)))
	}},
	{name: "resolve-a-name", do: func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_, err := (&net.Resolver{PreferGo: true}).LookupHost(ctx, "localhost")
		return err
	}},
	{name: "accept-by-tcp", do: func() error { return tcpListener.(*net.TCPListener).SetDeadline(time.Now().Add(time.Second)) }},
	{name: "no-core-dump", do: func() error { return unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0) }},
	{name: "runtime-load", do: loadRuntime},
}

// loadRuntime has the runtime collect, grow and shrink the heap, preempt, profile and make and end threads.
func loadRuntime() error {
	if err := pprof.StartCPUProfile(io.Discard); err != nil {
		return err
	}
	defer pprof.StopCPUProfile()
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGUSR1)
	defer signal.Stop(signals)
	var wg sync.WaitGroup
	end := time.Now().Add(500 * time.Millisecond)
	for i := range 16 {
		wg.Go(func() {
			if i%2 == 0 {
				runtime.LockOSThread() // and ends with the goroutine
			}
			var live [][]byte
			for n := 0; time.Now().Before(end); n++ {
				live = append(live, make([]byte, 1<<(10+n%10)))
				if len(live) > 64 {
					live = nil
				}
				if n%32 == 0 {
					time.Sleep(time.Millisecond)
				}
			}
		})
	}
	wg.Go(func() {
		for n := 0; ; n++ { // to be preempted: a loop that hardly ever calls a function
			if n&0xfffff == 0 && time.Now().After(end) {
				return
			}
		}
	})
	wg.Go(func() {
		for i := 0; time.Now().Before(end); i++ {
			runtime.GC()
			debug.FreeOSMemory()
			runtime.GOMAXPROCS(4 + i%4)
		}
	})
	wg.Wait()
	if err := unix.Kill(os.Getpid(), unix.SIGUSR1); err != nil {
		return err
	}
	select {
	case <-signals:
		return nil
	case <-time.After(time.Minute):
		return errors.New("a signal to itself does not come")
	}
}
