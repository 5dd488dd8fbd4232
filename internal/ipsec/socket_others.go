//go:build !linux

package ipsec

import (
	"errors"

	"ipipd/internal/ipsec/ike"
)

var errLinux = errors.New("an encrypted tunnel needs Linux")

type ports struct {
	key      portsKey
	refs     int
	receiver Receiver
}

func openPorts(*Manager, portsKey) (*ports, error) { return nil, errLinux }

func openESP(*Manager) (espSocket, Receiver, error) { return nil, nil, errLinux }

func (p *ports) send(ike.Send) {}

// Close does nothing: none has been opened.
func (p *ports) Close() error { return nil }

// What is received goes through these on Linux.
var _, _ = (*Manager).open, (*Manager).deliver
