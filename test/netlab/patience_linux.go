package netlab

import (
	"os/exec"
	"syscall"
)

// inNewNetns has cmd run in a network namespace of its own.
func inNewNetns(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
}
