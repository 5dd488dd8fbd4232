//go:build !linux

package ipsec

import (
	"errors"

	"ipipd/ipsec/ike"
)

var errLinux = errors.New("an encrypted tunnel needs Linux")

type door struct {
	key      doorKey
	users    int
	receiver Receiver
}

func openDoor(*Manager, doorKey) (*door, error) { return nil, errLinux }

func openESP(*Manager) (Closer, Receiver, error) { return nil, nil, errLinux }

func (d *door) send(ike.Send) {}

// Close does nothing: no door has been opened.
func (d *door) Close() error { return nil }

// What is received goes through these on Linux.
var _, _ = (*Manager).open, (*Manager).deliver
