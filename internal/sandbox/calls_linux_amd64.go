package sandbox

import "golang.org/x/sys/unix"

const auditArch = unix.AUDIT_ARCH_X86_64

// archCalls are the system calls that other architectures lack, or have by another name.
var archCalls = append(always(unix.SYS_EPOLL_WAIT, unix.SYS_NEWFSTATAT, unix.SYS_POLL), call{unix.SYS_ARCH_PRCTL, [][]condition{{is(0, archSetFS)}}})

// archSetFS is ARCH_SET_FS (asm/prctl.h): the register of thread-local storage.
const archSetFS = 0x1002
