//go:build !linux

package sysctl

// Manager is for Linux: elsewhere it does nothing.
type Manager struct{ Root, Dir string }

// Set does nothing.
func (m *Manager) Set([]Setting) (done []Setting, err error) { return nil, nil }

// Restore does nothing.
func (m *Manager) Restore() (back []Setting, err error) { return nil, nil }

// Leave does nothing.
func (m *Manager) Leave() {}
