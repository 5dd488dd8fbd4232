//go:build !linux

package confine

import "errors"

// Process returns errors.ErrUnsupported.
func Process() error { return errors.ErrUnsupported }
