//go:build !linux

package netlab

import "os/exec"

// inNewNetns makes cmd fail: without namespaces it would change the host's loopback.
func inNewNetns(cmd *exec.Cmd) { cmd.Err = exec.ErrNotFound }
