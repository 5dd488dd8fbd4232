package sandbox

import (
	"golang.org/x/sys/unix"
)

// calls returns the system calls that a process needs once it has begun; pid is its own ID. The ones made for packets
// are first, for kernels before 5.11, which go through the list at each call.
func calls(p Policy, pid int) []call {
	all := always(
		unix.SYS_READV, unix.SYS_WRITEV, unix.SYS_READ, unix.SYS_WRITE,
		unix.SYS_RECVMMSG, unix.SYS_SENDMMSG, unix.SYS_RECVMSG, unix.SYS_SENDMSG, unix.SYS_SENDTO, unix.SYS_RECVFROM,
		unix.SYS_PPOLL, unix.SYS_EPOLL_PWAIT, unix.SYS_EPOLL_PWAIT2, unix.SYS_EPOLL_CTL, unix.SYS_NANOSLEEP,
	)
	all = append(all, runtimeCalls(uint32(pid))...)
	all = append(all, archCalls...)
	all = append(all, fileCalls...)
	all = append(all, socketCalls...)
	all = append(all, deviceCalls...)
	if p.EBPF {
		all = append(all, ebpfCalls)
	}
	return all
}

func always(numbers ...uintptr) (all []call) {
	for _, n := range numbers {
		all = append(all, call{number: n})
	}
	return all
}

// runtimeCalls returns the calls of Go's runtime, of the C library's threads (under the race detector), and
// others that are about the process itself only.
func runtimeCalls(pid uint32) []call {
	const thread = unix.CLONE_VM | unix.CLONE_SIGHAND | unix.CLONE_THREAD
	const namespaces = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET
	return append(always(
		unix.SYS_FUTEX, unix.SYS_FUTEX_WAITV, unix.SYS_CLOCK_GETTIME, unix.SYS_CLOCK_GETRES, unix.SYS_CLOCK_NANOSLEEP, unix.SYS_GETTIMEOFDAY,
		unix.SYS_SCHED_YIELD, unix.SYS_SCHED_GETAFFINITY, unix.SYS_SCHED_SETAFFINITY,
		unix.SYS_MUNMAP, unix.SYS_MADVISE, unix.SYS_MINCORE, unix.SYS_BRK, unix.SYS_MREMAP, unix.SYS_MSYNC, unix.SYS_MEMBARRIER,
		unix.SYS_RT_SIGACTION, unix.SYS_RT_SIGPROCMASK, unix.SYS_RT_SIGRETURN, unix.SYS_SIGALTSTACK, unix.SYS_RESTART_SYSCALL,
		unix.SYS_TIMER_CREATE, unix.SYS_TIMER_SETTIME, unix.SYS_TIMER_DELETE, unix.SYS_SETITIMER,
		unix.SYS_GETPID, unix.SYS_GETTID, unix.SYS_GETPPID, unix.SYS_GETUID, unix.SYS_GETEUID, unix.SYS_GETGID, unix.SYS_GETEGID,
		unix.SYS_GETRANDOM, unix.SYS_UNAME, unix.SYS_SYSINFO, unix.SYS_GETRUSAGE, unix.SYS_CAPGET,
		unix.SYS_RSEQ, unix.SYS_SET_ROBUST_LIST, unix.SYS_SET_TID_ADDRESS,
		unix.SYS_EXIT, unix.SYS_EXIT_GROUP,
	), []call{
		// No executable memory.
		{unix.SYS_MMAP, [][]condition{{masked(2, unix.PROT_EXEC, 0)}}},
		{unix.SYS_MPROTECT, [][]condition{{masked(2, unix.PROT_EXEC, 0)}}},
		// New threads, no new processes.
		{unix.SYS_CLONE, [][]condition{{masked(0, thread|namespaces, thread)}}},
		{unix.SYS_TGKILL, [][]condition{{is(0, pid)}}},
		{unix.SYS_KILL, [][]condition{{is(0, pid)}}},
		// To name mappings and threads, to disable core dumps, and to ask whether they are.
		{unix.SYS_PRCTL, [][]condition{{is(0, unix.PR_SET_VMA, unix.PR_GET_DUMPABLE, unix.PR_SET_NAME)}, append(isZero(1), is(0, unix.PR_SET_DUMPABLE))}},
		{unix.SYS_PRLIMIT64, [][]condition{append(isZero(2), is(0, 0))}},
	}...)
}

// fileCalls are about files, which Landlock restricts, and other descriptors.
var fileCalls = append(always(
	unix.SYS_OPENAT, unix.SYS_CLOSE, unix.SYS_FSTAT, unix.SYS_STATX, unix.SYS_STATFS, unix.SYS_FSTATFS, unix.SYS_LSEEK, unix.SYS_GETDENTS64, unix.SYS_READLINKAT, unix.SYS_FACCESSAT, unix.SYS_FACCESSAT2, unix.SYS_GETCWD,
	unix.SYS_PREAD64, unix.SYS_PWRITE64, unix.SYS_FSYNC, unix.SYS_FDATASYNC, unix.SYS_FTRUNCATE, unix.SYS_FALLOCATE, unix.SYS_FLOCK, unix.SYS_FCHMOD,
	unix.SYS_UNLINKAT, unix.SYS_LINKAT, unix.SYS_MEMFD_CREATE,
	unix.SYS_EPOLL_CREATE1, unix.SYS_EVENTFD2, unix.SYS_PIPE2, unix.SYS_DUP3,
), call{unix.SYS_FCNTL, [][]condition{{is(1,
	unix.F_GETFD, unix.F_SETFD, unix.F_GETFL, unix.F_SETFL, unix.F_DUPFD_CLOEXEC, unix.F_ADD_SEALS, unix.F_GET_SEALS,
	unix.F_SETLK, unix.F_OFD_SETLK, unix.F_OFD_SETLKW,
)}}})

// socketCalls are about sockets. New ones are of UDP, TCP (DNS), raw, netlink (routes, packet filters and IPsec
// policies) or local. Packet sockets are open before.
var socketCalls = append(always(
	unix.SYS_ACCEPT4, unix.SYS_BIND, unix.SYS_CONNECT, unix.SYS_LISTEN, unix.SYS_SHUTDOWN,
	unix.SYS_GETSOCKNAME, unix.SYS_GETPEERNAME, unix.SYS_GETSOCKOPT, unix.SYS_SETSOCKOPT,
), call{unix.SYS_SOCKET, [][]condition{
	{is(0, unix.AF_UNIX), masked(2, ^uint32(0), 0)},
	{is(0, unix.AF_INET), {argument: 1, mask: typeMask, values: []uint32{unix.SOCK_DGRAM, unix.SOCK_STREAM, unix.SOCK_RAW}}},
	{is(0, unix.AF_INET6), {argument: 1, mask: typeMask, values: []uint32{unix.SOCK_DGRAM, unix.SOCK_STREAM}}},
	{is(0, unix.AF_NETLINK), is(2, unix.NETLINK_ROUTE, unix.NETLINK_NETFILTER, unix.NETLINK_XFRM)},
}})

// typeMask is the type of a socket, without SOCK_CLOEXEC and SOCK_NONBLOCK: SOCK_TYPE_MASK.
const typeMask = 0xf

// deviceCalls are the ioctls of TUN devices, but not those that make an interface outlive its descriptors (TUNSETPERSIST)
// or open it to other users (TUNSETOWNER, TUNSETGROUP).
var deviceCalls = []call{{unix.SYS_IOCTL, [][]condition{{is(1,
	unix.TUNSETIFF, unix.TUNGETIFF, unix.TUNGETFEATURES, unix.TUNSETOFFLOAD, unix.TUNSETVNETHDRSZ, unix.TUNSETSTEERINGEBPF, unix.TUNSETCARRIER,
	unix.TUNGETDEVNETNS, unix.SIOCGSKNS,
)}}}}

// ebpfCalls are the commands of bpf(2), but not those that open programs of others, or pin any.
var ebpfCalls = call{unix.SYS_BPF, [][]condition{{is(0,
	unix.BPF_MAP_CREATE, unix.BPF_MAP_LOOKUP_ELEM, unix.BPF_MAP_UPDATE_ELEM, unix.BPF_MAP_DELETE_ELEM, unix.BPF_MAP_GET_NEXT_KEY,
	unix.BPF_MAP_LOOKUP_BATCH, unix.BPF_MAP_UPDATE_BATCH, unix.BPF_MAP_DELETE_BATCH, unix.BPF_MAP_FREEZE,
	unix.BPF_PROG_LOAD, unix.BPF_PROG_QUERY, unix.BPF_OBJ_GET_INFO_BY_FD, unix.BPF_BTF_LOAD,
	unix.BPF_LINK_CREATE, unix.BPF_LINK_UPDATE, unix.BPF_LINK_DETACH,
)}}}
