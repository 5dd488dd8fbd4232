//go:build linux || darwin

package tun

import (
	"errors"
	"io"
	"os"
	"runtime"
	"sync"
	"syscall"

	"github.com/songgao/water"
)

// waterDevice is the portable Device: a TUN opened by water, one packet per read and write.
// Checksums and segmentation of what is written are done here.
//
// It works around water: that truncates names (so check them), attaches to an existing
// interface and removes it in the end (so refuse taken names), leaks its file when it fails
// (so probe first), and doesn't set close-on-exec.
type waterDevice struct {
	file    io.ReadWriteCloser
	control *interfaceControl
	queue   waterQueue
	// mu keeps control's socket from being closed, and its number reused, while in use.
	mu     sync.Mutex
	closed bool
}

// openWater opens a device with one queue; it ignores o.Queues.
func openWater(o Options) (_ Device, err error) {
	// No fork between open and close-on-exec.
	syscall.ForkLock.RLock()
	file, name, err := openWaterFile(o.Name)
	syscall.ForkLock.RUnlock()
	if err != nil {
		return nil, explain(err)
	}
	d := &waterDevice{file: file}
	if err := d.queue.start(file); err != nil {
		_ = file.Close()
		return nil, err
	}
	err = withFD(file, func(fd int) (err error) {
		if d.control, err = openControl(fd, name); err == nil && o.MTU != 0 {
			err = d.control.setMTU(fd, o.MTU)
		}
		return err
	})
	if err != nil {
		_ = d.Close()
		return nil, err
	}
	return d, nil
}

func openWaterFile(name string) (io.ReadWriteCloser, string, error) {
	var opened *water.Interface
	try := func(name string) (err error) {
		if err := probeName(name); err != nil {
			return err
		}
		config := water.Config{DeviceType: water.TUN}
		config.Name = name
		opened, err = water.New(config)
		return err
	}
	var err error
	if runtime.GOOS == "linux" || name != "" {
		err = tryNames(name, isTaken, try)
	} else {
		err = try("") // the system chooses utunN
	}
	if err != nil {
		return nil, "", err
	}
	err = withFD(opened.ReadWriteCloser, func(fd int) error {
		syscall.CloseOnExec(fd)
		return nil
	})
	if err != nil {
		_ = opened.Close()
		return nil, "", err
	}
	return opened.ReadWriteCloser, opened.Name(), nil
}

// withFD calls f with the file descriptor of file, or -1 if it has none.
func withFD(file io.ReadWriteCloser, f func(fd int) error) error {
	conn, ok := file.(syscall.Conn)
	if !ok {
		return f(-1)
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := raw.Control(func(fd uintptr) { inner = f(int(fd)) }); err != nil {
		return err
	}
	return inner
}

func (d *waterDevice) Queues() []Queue { return []Queue{&d.queue} }

func (d *waterDevice) Name() string { return d.control.name }

func (d *waterDevice) State() (s State, err error) {
	s.Name = d.control.name
	err = d.use(func(fd int) (err error) {
		s, err = d.control.state(fd)
		return err
	})
	return s, err
}

func (d *waterDevice) SetMTU(mtu int) error {
	return d.use(func(fd int) error { return d.control.setMTU(fd, mtu) })
}

func (d *waterDevice) SetCarrier(carrier bool) error {
	return d.use(func(fd int) error { return setCarrier(fd, carrier) })
}

// use calls f with the file descriptor, which stays open until f returns.
func (d *waterDevice) use(f func(fd int) error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return os.ErrClosed
	}
	return withFD(d.file, f)
}

func (d *waterDevice) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil
	}
	d.closed = true
	err := errors.Join(d.file.Close(), d.control.close())
	d.queue.close()
	return err
}
