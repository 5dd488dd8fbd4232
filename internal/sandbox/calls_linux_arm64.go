package sandbox

import "golang.org/x/sys/unix"

const auditArch = unix.AUDIT_ARCH_AARCH64

// archCalls are the system calls that other architectures lack, or have by another name.
var archCalls = always(unix.SYS_FSTATAT)
