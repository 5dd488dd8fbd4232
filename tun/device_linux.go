package tun

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"ipipd/internal/fdguard"
	"ipipd/internal/packet"
	"ipipd/internal/privileged"
	"ipipd/internal/vnet"
)

// The calls that an os.SyscallError names if cloneDevice cannot be opened, or the first ioctl on it fails.
const (
	openCall     = "open " + cloneDevice
	featuresCall = "ioctl TUNGETFEATURES"
)

// device is the Device with IFF_VNET_HDR. Each queue is a file descriptor of /dev/net/tun;
// closing the last one removes the interface.
type device struct {
	queues  []Queue
	fds     []int
	guard   *fdguard.Group
	control *interfaceControl
}

// Open creates a TUN interface in the network namespace of the calling thread. It needs
// /dev/net/tun and CAP_NET_ADMIN. It returns ErrNameTaken if the interface exists.
func Open(o Options) (Device, error) {
	if o.Queues < 1 {
		o.Queues = 1
	}
	if o.NoOffload {
		return openWater(o)
	}
	d, err := open(o)
	if errors.Is(err, errNoVnetHeader) {
		return openWater(o)
	}
	if err != nil {
		return nil, explain(err)
	}
	return d, nil
}

// errNoVnetHeader is returned by open if the kernel's TUN lacks IFF_VNET_HDR.
var errNoVnetHeader = errors.New("TUN without IFF_VNET_HDR")

// explain adds a remedy to an error of opening or attaching a TUN.
func explain(err error) error {
	var call *os.SyscallError
	if errors.Is(err, os.ErrPermission) && errors.As(err, &call) && call.Syscall != openCall {
		return fmt.Errorf("a TUN needs CAP_NET_ADMIN: %s: %w", privileged.Remedy, err)
	}
	if f := Missing(os.DirFS("/"), err); f != nil {
		return f
	}
	return err
}

// Probe opens /dev/net/tun and closes it. An error may be one of those that Missing explains.
func Probe() error {
	fd, err := unix.Open(cloneDevice, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return os.NewSyscallError(openCall, err)
	}
	defer unix.Close(fd)
	_, err = unix.IoctlGetUint32(fd, unix.TUNGETFEATURES)
	return os.NewSyscallError(featuresCall, err)
}

func open(o Options) (_ *device, err error) {
	d := &device{}
	d.guard = fdguard.New(nil, d.closeAll)
	defer func() {
		if err != nil {
			d.Close()
		}
	}()
	first, err := d.openQueue()
	if err != nil {
		return nil, err
	}
	features, err := unix.IoctlGetUint32(first, unix.TUNGETFEATURES)
	if err != nil {
		return nil, os.NewSyscallError(featuresCall, err)
	}
	if features&unix.IFF_VNET_HDR == 0 {
		return nil, errNoVnetHeader
	}
	flags := uint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if o.Queues > 1 {
		flags |= unix.IFF_MULTI_QUEUE
	}
	var name string
	err = tryNames(o.Name, isTaken, func(try string) error {
		name = try
		// IFF_TUN_EXCL: fail rather than attach to an existing TUN.
		return attach(first, try, flags|unix.IFF_TUN_EXCL)
	})
	if err != nil {
		return nil, err
	}
	offload, err := setOffload(first)
	if err != nil {
		return nil, err
	}
	if o.Queues > 1 {
		if err := attachQueueSelector(first); err != nil && o.OnDegraded != nil {
			o.OnDegraded(fmt.Errorf("the kernel may reorder a flow, once, when its first answer comes: %w", err))
		}
	}
	for range o.Queues - 1 {
		fd, err := d.openQueue()
		if err != nil {
			return nil, err
		}
		if err := attach(fd, name, flags); err != nil {
			return nil, err
		}
	}
	if d.control, err = openControl(first, name); err != nil {
		return nil, err
	}
	if o.QueueLength != 0 {
		if err := d.control.setQueueLength(first, o.QueueLength); err != nil {
			return nil, err
		}
	}
	if err := d.makeQueues(o, offload); err != nil {
		return nil, err
	}
	return d, nil
}

// makeQueues sets the MTU, and makes the queues of the descriptors.
func (d *device) makeQueues(o Options, offload offload) error {
	if o.MTU != 0 {
		if err := d.control.setMTU(d.fds[0], o.MTU); err != nil {
			return err
		}
	}
	state, err := d.control.state(d.fds[0])
	if state.Moved { // adopted from another network namespace: its MTU is unknown
		state.MTU, err = packet.MaxSize, nil
	}
	for _, fd := range d.fds {
		d.queues = append(d.queues, &queue{device: d, fd: fd, uso: offload.uso, direct: min(state.MTU, packet.MaxSize)})
	}
	return err
}

// openQueue opens /dev/net/tun and adds the descriptor to d.fds. attach makes it a queue.
func (d *device) openQueue() (fd int, err error) {
	fd, err = unix.Open(cloneDevice, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return -1, os.NewSyscallError(openCall, err)
	}
	d.fds = append(d.fds, fd)
	return fd, nil
}

func attach(fd int, name string, flags uint16) error {
	return os.NewSyscallError("ioctl TUNSETIFF "+name, privileged.TUNSetIff(fd, name, flags))
}

// probeName creates an interface of that name and removes it again, to see if that works.
func probeName(name string) error {
	fd, err := unix.Open(cloneDevice, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError(openCall, err)
	}
	defer unix.Close(fd)
	return attach(fd, name, unix.IFF_TUN|unix.IFF_NO_PI|unix.IFF_TUN_EXCL)
}

// isTaken reports whether an error of attach with IFF_TUN_EXCL means that an interface of
// that name exists: EBUSY, or EEXIST in a race with its creation.
func isTaken(err error) bool { return errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EEXIST) }

// offload is the optional offloads of a device.
type offload struct {
	uso bool // the kernel accepts UDP superpackets
}

// setOffload enables the offloads that the kernel supports for packets it passes to us:
// partial checksums, TSO and USO. Without any the kernel segments before the TUN.
func setOffload(fd int) (o offload, err error) {
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, vnet.HeaderLen); err != nil {
		return o, os.NewSyscallError("ioctl TUNSETVNETHDRSZ", err)
	}
	const tcp = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6 | unix.TUN_F_TSO_ECN
	// Linux 6.2 and later; accepted only together.
	const udp = unix.TUN_F_USO4 | unix.TUN_F_USO6
	if unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, tcp|udp) == nil {
		return offload{uso: usoWorks()}, nil
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, tcp); err != nil && !errors.Is(err, unix.EINVAL) {
		return o, os.NewSyscallError("ioctl TUNSETOFFLOAD", err)
	}
	return o, nil
}

// usoWorks reports whether the kernel handles UDP superpackets written to a TUN. Before
// 6.8.5 it dropped or corrupted some.
var usoWorks = sync.OnceValue(func() bool {
	var uname unix.Utsname
	if unix.Uname(&uname) != nil {
		return false
	}
	return releaseAtLeast(unix.ByteSliceToString(uname.Release[:]), 6, 8, 5)
})

// releaseAtLeast reports whether a kernel release, such as 6.8.0-31-generic, is want or later.
func releaseAtLeast(release string, want ...int) bool {
	for _, w := range want {
		n := 0
		for release != "" && release[0] >= '0' && release[0] <= '9' {
			n, release = n*10+int(release[0]-'0'), release[1:]
		}
		if n != w {
			return n > w
		}
		if release == "" || release[0] != '.' {
			release = "" // missing numbers count as 0
		} else {
			release = release[1:]
		}
	}
	return true
}

func (d *device) Queues() []Queue { return d.queues }

func (d *device) Name() string { return d.control.name }

func (d *device) State() (State, error) {
	defer d.guard.Release()
	if !d.guard.Acquire() {
		return State{Name: d.control.name}, os.ErrClosed
	}
	return d.control.state(d.fds[0])
}

func (d *device) SetMTU(mtu int) error {
	defer d.guard.Release()
	if !d.guard.Acquire() {
		return os.ErrClosed
	}
	return d.control.setMTU(d.fds[0], mtu)
}

func (d *device) SetCarrier(carrier bool) error {
	defer d.guard.Release()
	if !d.guard.Acquire() {
		return os.ErrClosed
	}
	return setCarrier(d.fds[0], carrier)
}

func (d *device) Close() error {
	d.guard.Close()
	return nil
}

func (d *device) closeAll() {
	for _, fd := range d.fds {
		_ = unix.Close(fd)
	}
	_ = d.control.close()
}
