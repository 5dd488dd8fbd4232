//go:build !linux

package confine

import "errors"

// Process is not supported on this system: errors.ErrUnsupported.
func Process() error { return errors.ErrUnsupported }
