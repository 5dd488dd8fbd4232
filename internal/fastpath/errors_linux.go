package fastpath

import (
	"errors"
	"fmt"
	"net"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"ipipd/internal/privileged"
)

// The same errno means different things for loading, attaching and map updates, so each
// has its own explain function.

const notPermitted = "eBPF is not permitted: " + privileged.Remedy + "; and see that kernel lockdown or seccomp is not in the way"

// explainLoad explains an error of loading the programs and creating the maps.
func explainLoad(err error) error {
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES) && !isVerifierError(err):
		return &Unavailable{notPermitted, err}
	case errors.Is(err, unix.ENOSYS):
		return &Unavailable{"this kernel has no eBPF: it needs CONFIG_BPF_SYSCALL", err}
	// E2BIG: an older kernel knows fewer fields of union bpf_attr.
	case errors.Is(err, ebpf.ErrNotSupported), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.E2BIG):
		return &Unavailable{"this kernel lacks an eBPF feature: Linux 6.6 has them", err}
	case errors.Is(err, unix.ENOMEM):
		return &Unavailable{"the kernel has no memory for the eBPF programs and maps: see the memory limit of the control group", err}
	}
	return &Unavailable{"the kernel refuses the eBPF programs", err}
}

// explainAttach explains an error of attaching a program to a device.
func explainAttach(device int, err error) error {
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return &Unavailable{notPermitted, err}
	case errors.Is(err, ebpf.ErrNotSupported), errors.Is(err, unix.ENOSYS):
		return &Unavailable{"this kernel has no tcx: Linux 6.6 with CONFIG_NET_XGRESS has it", err}
	case errors.Is(err, unix.ENODEV):
		return &Unavailable{"the device is gone", err}
	case errors.Is(err, unix.ERANGE): // others attached after checkChainSpace
		return &Unavailable{fmt.Sprintf("as many eBPF programs are attached to %s as the kernel allows (%d)", deviceName(device), maxPrograms), err}
	case errors.Is(err, unix.EEXIST):
		return &Unavailable{fmt.Sprintf("the eBPF program of this process is attached to %s already", deviceName(device)), err}
	case errors.Is(err, unix.EBUSY), errors.Is(err, unix.ESTALE):
		return &Unavailable{fmt.Sprintf("the eBPF programs on %s are being changed by another process; retrying", deviceName(device)), err}
	}
	return &Unavailable{fmt.Sprintf("the kernel does not attach an eBPF program to %s", deviceName(device)), err}
}

// explainMap explains an error of a map update; what names the value.
func (f *FastPath) explainMap(what string, err error) error {
	switch {
	case errors.Is(err, unix.E2BIG): // max_entries of ipip.c
		return &Unavailable{fmt.Sprintf("this process has %d tunnels on the fast path already, the maximum", f.objects.Counters.MaxEntries()), err}
	case errors.Is(err, unix.EEXIST):
		return &Unavailable{"another tunnel of this process has the same local and remote address", err}
	case errors.Is(err, unix.ENOMEM):
		return &Unavailable{"the kernel has no memory for one more tunnel: see the memory limit of the control group", err}
	case errors.Is(err, unix.EPERM):
		return &Unavailable{notPermitted, err}
	case errors.Is(err, unix.EBUSY):
		return &Unavailable{"the map was busy; retrying", err}
	}
	return &Unavailable{"the kernel refuses " + what, err}
}

// isVerifierError reports whether the verifier rejected a program.
func isVerifierError(err error) bool {
	var v *ebpf.VerifierError
	return errors.As(err, &v)
}

// deviceName returns the name of a device in the calling thread's namespace, for messages.
func deviceName(device int) string {
	if i, err := net.InterfaceByIndex(device); err == nil {
		return i.Name
	}
	return fmt.Sprintf("the device of index %d", device)
}
