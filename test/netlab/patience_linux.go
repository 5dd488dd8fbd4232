package netlab

import (
	"os/exec"
	"syscall"
)

// ownNetwork has cmd run in a network namespace of its own.
func ownNetwork(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
}
