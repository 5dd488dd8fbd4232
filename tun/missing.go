package tun

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"syscall"

	"ipipd/internal/warning"
)

// cloneDevice is the device file with which TUN interfaces are made.
const cloneDevice = "/dev/net/tun"

// Missing explains an error of opening /dev/net/tun. It returns nil for an error with another cause, as EMFILE. files
// is the root of the file system, in which it looks for what the kernel has.
func Missing(files fs.FS, err error) *warning.Fault {
	const container = "in a container: --device " + cloneDevice + ", a volume is not enough (Kubernetes: a device plugin, or a hostPath of it and privileged)"
	f := &warning.Fault{Code: "no-tun", Why: "a tunnel needs a TUN interface", Err: err}
	switch {
	case errors.Is(err, syscall.EPERM):
		f.Code, f.What = "tun-forbidden", "the device list of this container's cgroup does not have "+cloneDevice
		f.Do = container + "; with runc 1.2.0 to 1.2.3 also where it was there before"
	case errors.Is(err, syscall.EACCES):
		f.Code, f.What = "tun-forbidden", cloneDevice+" may not be opened"
		f.Do = "chmod 0666 " + cloneDevice + ", or run it as root; as root: its file system is mounted nodev"
	case errors.Is(err, syscall.ENOENT):
		f.What, f.Do = cloneDevice+" does not exist", "modprobe tun; "+container
		if misc, _ := fs.ReadFile(files, "proc/misc"); strings.Contains("\n"+string(misc), " tun\n") {
			f.Do = fmt.Sprintf("mkdir -p /dev/net && mknod %s c 10 200; %s", cloneDevice, container)
		}
	case errors.Is(err, syscall.ENODEV), errors.Is(err, syscall.ENXIO):
		f.What, f.Do = "the kernel has no TUN", "modprobe tun; "+container
	case errors.Is(err, syscall.ENOTTY): // as in some containers
		f.What, f.Do = cloneDevice+" is another kind of file", fmt.Sprintf("rm %s && mknod %[1]s c 10 200; %s", cloneDevice, container)
	default:
		return nil
	}
	return f
}
