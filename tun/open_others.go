//go:build !linux && !darwin

package tun

import (
	"errors"
	"fmt"
	"runtime"
)

// Open fails: this system has no TUN that is known here.
func Open(Options) (Device, error) {
	return nil, fmt.Errorf("TUN on %s: %w", runtime.GOOS, errors.ErrUnsupported)
}
