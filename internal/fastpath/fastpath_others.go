//go:build !linux

package fastpath

// FastPath exists on Linux only: Open always fails.
type FastPath struct{}

// Link exists on Linux only.
type Link struct{}

// Open fails with an *Unavailable.
func Open() (*FastPath, error) { return nil, &Unavailable{Why: "the fast path needs Linux"} }

// Encap returns none.
func (*FastPath) Encap() (fd int, id uint32, name string) { return -1, 0, "" }

// Close does nothing.
func (*FastPath) Close() {}

// Attach fails.
func (*FastPath) Attach(Tunnel) (*Link, error) { return nil, ErrClosed }

// Update fails.
func (*Link) Update(Tunnel) error { return ErrClosed }

// Disable does nothing.
func (*Link) Disable() {}

// Stats fails.
func (*Link) Stats() (Stats, error) { return Stats{}, ErrClosed }

// Close does nothing.
func (*Link) Close() {}
