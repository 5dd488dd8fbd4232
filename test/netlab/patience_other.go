//go:build !linux

package netlab

import "os/exec"

// inNewNetns makes cmd fail: elsewhere it would be the host's loopback that it sets.
func inNewNetns(cmd *exec.Cmd) { cmd.Err = exec.ErrNotFound }
