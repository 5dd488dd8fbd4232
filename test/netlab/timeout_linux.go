package netlab

import (
	"os/exec"
	"syscall"
)

// inNewNetns makes cmd run in a new network namespace.
func inNewNetns(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
}
