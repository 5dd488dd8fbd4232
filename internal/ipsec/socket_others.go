//go:build !linux

package ipsec

import (
	"errors"
	"time"

	"ipipd/internal/ipsec/ike"
)

var errLinux = errors.New("an encrypted tunnel needs Linux")

type ports struct {
	key      portsKey
	refs     int
	receiver Receiver
	stop     func()
}

func openPorts(*Manager, portsKey) (*ports, error) { return nil, errLinux }

func openESP(*Manager) (espSocket, Receiver, error) { return nil, nil, errLinux }

func (*Manager) adopt([]int) {}

func (*Manager) closeAdopted() {}

func (p *ports) readIKE() {}

type adopted struct{}

func bootTime() time.Time { return time.Now() }

type spares struct{}

func (*spares) fill() error { return errLinux }

func (*spares) close() {}

func (p *ports) send(ike.Send, time.Time, *time.Time) error { return nil }

// Close does nothing, as openPorts always fails.
func (p *ports) Close() error { return nil }

// Used on Linux only.
var (
	_, _ = (*Manager).open, (*Manager).deliver
	_    = func(m *Manager) any { return m.adopted }
)
