//go:build !linux && !darwin

package tun

import (
	"errors"
	"fmt"
	"runtime"
)

// Open returns errors.ErrUnsupported.
func Open(Options) (Device, error) {
	return nil, fmt.Errorf("TUN on %s: %w", runtime.GOOS, errors.ErrUnsupported)
}
