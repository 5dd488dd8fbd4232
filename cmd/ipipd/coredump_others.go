//go:build !linux

package main

import "errors"

func disableCoreDumps() error { return errors.ErrUnsupported }
