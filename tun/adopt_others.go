//go:build !linux

package tun

import "errors"

// Adopt returns errors.ErrUnsupported.
func Adopt([]int, Options) (Device, error) { return nil, errors.ErrUnsupported }

// LoadQueueSelector does nothing.
func LoadQueueSelector() {}
