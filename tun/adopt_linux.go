package tun

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"ipipd/internal/fdguard"
)

// Adopt is Open for an interface that a process before has opened and left: fds are all of its
// queues (Queue.FD), in any order. Its index, addresses, routes and state stay, and so do the packets
// that are queued. o.Name may be another one: the interface keeps its own. The descriptors are the
// Device's, or after an error still the caller's.
//
// It fails if the interface is gone, or is not as Open would make it. An interface in another network
// namespace is as one that was moved after Open; see State.Moved.
func Adopt(fds []int, o Options) (_ Device, err error) {
	name, err := checkQueues(fds, max(o.Queues, 1))
	if err != nil {
		return nil, fmt.Errorf("take over a TUN interface: %w", err)
	}
	d := &device{fds: fds}
	d.guard = fdguard.New(nil, d.closeAll)
	defer func() {
		if err != nil {
			d.fds = nil
			d.Close()
		}
	}()
	for _, fd := range fds {
		unix.CloseOnExec(fd)
		if err := unix.SetNonblock(fd, true); err != nil {
			return nil, os.NewSyscallError("fcntl", err)
		}
	}
	offload, err := setOffload(fds[0])
	if err != nil {
		return nil, err
	}
	if len(fds) > 1 {
		_ = attachQueueSelector(fds[0]) // if it fails, the interface still has the earlier process's
	}
	if d.control, err = openControl(fds[0], name); err != nil {
		return nil, err
	}
	d.control.useSocketNetns()
	if where, err := netnsOf(fds[0]); err == nil && where != d.control.netns {
		o.MTU = 0 // it is set by whoever has moved the interface
	}
	if err := d.makeQueues(o, offload); err != nil {
		return nil, err
	}
	return d, nil
}

// checkQueues returns the name of the interface that all fds are queues of, as Open makes them.
func checkQueues(fds []int, want int) (name string, err error) {
	if len(fds) != want {
		return "", fmt.Errorf("it has %d queues, want %d", len(fds), want)
	}
	flags := uint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if want > 1 {
		flags |= unix.IFF_MULTI_QUEUE
	}
	var netns netnsID
	for i, fd := range fds {
		ifreq, err := unix.NewIfreq("")
		if err != nil {
			return "", err
		}
		switch err := unix.IoctlIfreq(fd, unix.TUNGETIFF, ifreq); {
		case errors.Is(err, unix.EBADFD):
			return "", fmt.Errorf("it is gone: %w", os.NewSyscallError("ioctl TUNGETIFF", err))
		case err != nil:
			return "", os.NewSyscallError("ioctl TUNGETIFF", err) // no TUN at all
		}
		// The kernel adds flags that are not of TUNSETIFF, such as IFF_NOFILTER.
		const asked = unix.IFF_TUN | unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR | unix.IFF_MULTI_QUEUE
		if got := ifreq.Uint16() & asked; got != flags {
			return "", fmt.Errorf("%s has the flags %#x, want %#x", ifreq.Name(), got, flags)
		}
		where, err := netnsOf(fd)
		if err != nil && !errors.Is(err, unix.ENOTTY) {
			return "", err
		}
		if i == 0 {
			name, netns = ifreq.Name(), where
		}
		if ifreq.Name() != name || where != netns {
			return "", fmt.Errorf("the queues are of two interfaces, %s and %s", name, ifreq.Name())
		}
	}
	return name, nil
}
