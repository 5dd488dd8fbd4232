package main

import (
	"os"

	"golang.org/x/sys/unix"
)

// disableCoreDumps disables core dumps of this process, and ptrace by other processes of the
// same user, to protect the IPsec secret.
func disableCoreDumps() error {
	return os.NewSyscallError("prctl PR_SET_DUMPABLE", unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0))
}
