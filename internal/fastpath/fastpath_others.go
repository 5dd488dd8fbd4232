//go:build !linux

package fastpath

import (
	"net/netip"
	"time"

	"ipipd/internal/fib"
)

// FastPath exists on Linux only: Open always fails.
type FastPath struct{}

// Link exists on Linux only.
type Link struct{}

// Open fails with an *Unavailable.
func Open(Options) (*FastPath, error) { return nil, &Unavailable{Why: "the fast path needs Linux"} }

// Encap returns none.
func (*FastPath) Encap() (fd int, id uint32, name string) { return -1, 0, "" }

// Close does nothing.
func (*FastPath) Close() {}

// Leave does nothing.
func (*FastPath) Leave() {}

// Switch does nothing.
func (*FastPath) Switch() {}

// Switched is true.
func (*FastPath) Switched() bool { return true }

// Adopted is false.
func (*Link) Adopted() (adopted bool, orphaned uint64) { return false, 0 }

// Reserve does nothing.
func (*FastPath) Reserve([]Pair) {}

// SetLocalAddresses fails.
func (*FastPath) SetLocalAddresses([][4]byte) error { return ErrClosed }

// Routes exist on Linux only.
type Routes struct{}

// NewRoutes returns none.
func (*FastPath) NewRoutes(int) *Routes { return nil }

// Follow fails.
func (*Routes) Follow(*fib.Table, []netip.Prefix, [][4]byte, [][4]byte) error { return ErrClosed }

// Sync fails.
func (*Routes) Sync(*fib.Table) error { return ErrClosed }

// Lacking returns nil.
func (*Routes) Lacking() error { return nil }

// SetRemote fails.
func (*Routes) SetRemote([4]byte, Remote) error { return ErrClosed }

// LastReceived is zero.
func (*Routes) LastReceived([4]byte) time.Time { return time.Time{} }

// Accept fails.
func (*Routes) Accept([]Sender, []netip.Prefix) error { return ErrClosed }

// Close does nothing.
func (*Routes) Close() {}

// Attach fails.
func (*FastPath) Attach(Tunnel) (*Link, error) { return nil, ErrClosed }

// Update fails.
func (*Link) Update(Tunnel) error { return ErrClosed }

// Enabled is false.
func (*Link) Enabled() bool { return false }

// Disable does nothing.
func (*Link) Disable() {}

// OpenCapture fails.
func (*Link) OpenCapture() error { return ErrClosed }

// CloseCapture does nothing.
func (*Link) CloseCapture() {}

// Captured returns none.
func (*Link) Captured(func() bool, func(*Captured)) (int, error) { return 0, nil }

// NotCaptured returns none.
func (*Link) NotCaptured() (n, drops uint64, err error) { return 0, 0, nil }

// Stats fails.
func (*Link) Stats() (Stats, error) { return Stats{}, ErrClosed }

// Close does nothing.
func (*Link) Close() {}
