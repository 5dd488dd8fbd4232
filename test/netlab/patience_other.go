//go:build !linux

package netlab

import "os/exec"

// ownNetwork makes cmd fail: elsewhere it would be the host's loopback that it sets.
func ownNetwork(cmd *exec.Cmd) { cmd.Err = exec.ErrNotFound }
