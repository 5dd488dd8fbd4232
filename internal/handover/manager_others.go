//go:build !linux

package handover

import "time"

// Manager is who started this process and keeps descriptors for the next: systemd, or a Keeper. Other
// systems have neither: it is always nil.
type Manager struct{ Watchdog time.Duration }

// Open returns nil.
func Open() (*Manager, Kept, error) { return nil, nil, nil }

// Notify does nothing.
func (m *Manager) Notify(string) error { return nil }

// Abstract returns false.
func (m *Manager) Abstract() bool { return false }

// Store does nothing.
func (m *Manager) Store(string, ...int) error { return nil }

// Remove does nothing.
func (m *Manager) Remove(string) error { return nil }

// Sync does nothing.
func (m *Manager) Sync(time.Duration) error { return nil }

// Discard does nothing.
func (m *Manager) Discard(Kept) error { return nil }
