package tun

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// interfaceControl sets what is not a TUN's own but any interface's. Its socket
// stays in the network namespace it was opened in, where the interface is.
type interfaceControl struct {
	fd   int
	name string
}

func openControl(name string) (interfaceControl, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return interfaceControl{fd: -1}, os.NewSyscallError("socket", err)
	}
	return interfaceControl{fd: fd, name: name}, nil
}

func (c *interfaceControl) close() error {
	if c.fd < 0 {
		return nil
	}
	return os.NewSyscallError("close", unix.Close(c.fd))
}

func (c *interfaceControl) mtu() (int, error) {
	ifreq, err := unix.NewIfreq(c.name)
	if err != nil {
		return 0, err
	}
	if err := unix.IoctlIfreq(c.fd, unix.SIOCGIFMTU, ifreq); err != nil {
		return 0, fmt.Errorf("MTU of %s: %w", c.name, os.NewSyscallError("ioctl SIOCGIFMTU", err))
	}
	return int(ifreq.Uint32()), nil
}

func (c *interfaceControl) setMTU(mtu int) error {
	ifreq, err := unix.NewIfreq(c.name)
	if err != nil {
		return err
	}
	ifreq.SetUint32(uint32(mtu))
	err = unix.IoctlIfreq(c.fd, unix.SIOCSIFMTU, ifreq)
	if errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("MTU %d of %s is not accepted: want 68 to 65515: %w", mtu, c.name, os.NewSyscallError("ioctl SIOCSIFMTU", err))
	}
	if err != nil {
		return fmt.Errorf("set the MTU of %s to %d: %w", c.name, mtu, os.NewSyscallError("ioctl SIOCSIFMTU", err))
	}
	return nil
}

// setCarrier is about the interface that the queue fd belongs to.
func setCarrier(fd int, carrier bool) error {
	value := 0
	if carrier {
		value = 1
	}
	return os.NewSyscallError("ioctl TUNSETCARRIER", unix.IoctlSetPointerInt(fd, unix.TUNSETCARRIER, value))
}
