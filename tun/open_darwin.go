package tun

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// Open creates a TUN interface, always a utunN on this system. It needs root. It is
// built, but not tested.
func Open(o Options) (Device, error) { return openWater(o) }

func explain(err error) error {
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		return fmt.Errorf("a TUN needs root: %w", err)
	}
	return err
}

// probeName returns EEXIST if an interface of that name exists.
func probeName(name string) error {
	if _, err := net.InterfaceByName(name); name != "" && err == nil {
		return unix.EEXIST
	}
	return nil
}

func isTaken(err error) bool { return errors.Is(err, unix.EEXIST) }

// interfaceControl reads and sets the interface's attributes by ioctl.
type interfaceControl struct {
	fd   int
	name string
}

func openControl(_ int, name string) (*interfaceControl, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	unix.CloseOnExec(fd)
	return &interfaceControl{fd: fd, name: name}, nil
}

func (c *interfaceControl) close() error {
	if c == nil {
		return nil
	}
	return os.NewSyscallError("close", unix.Close(c.fd))
}

// state reports the interface's state, with a carrier whenever it is up.
func (c *interfaceControl) state(int) (State, error) {
	i, err := net.InterfaceByName(c.name)
	if err != nil {
		return State{Name: c.name}, fmt.Errorf("look up interface %s: %w", c.name, err)
	}
	up := i.Flags&net.FlagUp != 0
	return State{Name: c.name, Index: i.Index, MTU: i.MTU, Up: up, Carrier: up}, nil
}

func (c *interfaceControl) setMTU(_, mtu int) error {
	ifreq := unix.IfreqMTU{MTU: int32(mtu)}
	copy(ifreq.Name[:], c.name)
	if err := unix.IoctlSetIfreqMTU(c.fd, &ifreq); err != nil {
		return fmt.Errorf("set the MTU of %s to %d: %w", c.name, mtu, os.NewSyscallError("ioctl SIOCSIFMTU", err))
	}
	return nil
}

// setCarrier is not supported here: the interface stays running.
func setCarrier(int, bool) error {
	return fmt.Errorf("the carrier of an interface: %w", errors.ErrUnsupported)
}
