//go:build !linux

package main

// useBroker returns false.
func (n *notifier) useBroker() bool { return false }
