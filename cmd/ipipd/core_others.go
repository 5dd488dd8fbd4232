//go:build !linux

package main

import "errors"

func neverDumpCore() error { return errors.ErrUnsupported }
