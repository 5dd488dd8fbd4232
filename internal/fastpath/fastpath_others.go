//go:build !linux

package fastpath

// FastPath exists on Linux only: Open always fails.
type FastPath struct{}

// Link exists on Linux only.
type Link struct{}

// Open fails with an *Unavailable.
func Open() (*FastPath, error) { return nil, &Unavailable{Why: "the fast path needs Linux"} }

// ForeignOnEgress fails.
func (*FastPath) ForeignOnEgress(device int) (bool, error) { return false, ErrClosed }

// Close does nothing.
func (*FastPath) Close() error { return nil }

// Attach fails.
func (*FastPath) Attach(Tunnel) (*Link, error) { return nil, ErrClosed }

// Update fails.
func (*Link) Update(Tunnel) error { return ErrClosed }

// Disable does nothing.
func (*Link) Disable() {}

// Stats fails.
func (*Link) Stats() (Stats, error) { return Stats{}, ErrClosed }

// Close does nothing.
func (*Link) Close() error { return nil }
