package sandbox

import "golang.org/x/sys/unix"

const auditArch = unix.AUDIT_ARCH_AARCH64

// archCalls are those that other architectures have not, or by another name.
var archCalls = always(unix.SYS_FSTATAT)
