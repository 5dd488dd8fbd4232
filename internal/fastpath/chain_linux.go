package fastpath

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"ipipd/internal/privileged"
)

const (
	// maxPrograms is how many tcx programs the kernel accepts on the ingress of a device:
	// BPF_MPROG_MAX, 64, less the end marker.
	maxPrograms = 63
	// reservedPrograms is how many of them ipipd leaves to other software. Each ipipd
	// process attaches one, and must not keep, say, a firewall from attaching.
	reservedPrograms = 16
)

// checkChainSpace fails if one more program on the ingress of a device would leave fewer than
// reservedPrograms.
func checkChainSpace(device int) error {
	n, err := privileged.CountPrograms(device, CountPrograms)
	if err != nil {
		return explainAttach(device, err)
	}
	if n >= maxPrograms-reservedPrograms {
		return &Unavailable{Why: fmt.Sprintf("%d eBPF programs are attached to %s already, where the kernel allows %d and %d are left to other software; "+
			"each ipipd process has one there, however many tunnels it has", n, deviceName(device), maxPrograms, reservedPrograms)}
	}
	return nil
}

// CountPrograms returns how many programs are on the ingress of a device (tcx) in the calling thread's namespace. It
// needs CAP_NET_ADMIN.
func CountPrograms(device int) (n int, err error) {
	for range 4 {
		var r *link.QueryResult
		r, err = link.QueryPrograms(link.QueryOptions{Target: device, Attach: ebpf.AttachTCXIngress})
		if err == nil {
			return len(r.Programs), nil
		}
		if !errors.Is(err, unix.ENOSPC) { // the chain grew between the two system calls of the query
			break
		}
	}
	return 0, err
}

// attach attaches a program to the ingress of a device in the calling thread's namespace. Closing
// the link detaches it.
func attach(device int, program *ebpf.Program) (link.Link, error) {
	if err := checkChainSpace(device); err != nil {
		return nil, err
	}
	// AttachTCX would mistake a lack of descriptors for a kernel without tcx, and remember that.
	spare, err := unix.FcntlInt(uintptr(program.FD()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, &Unavailable{"no file descriptor is left to attach the eBPF program: raise the limit (LimitNOFILE=, ulimit -n)", err}
	}
	_ = unix.Close(spare)
	l, err := link.AttachTCX(link.TCXOptions{Interface: device, Program: program, Attach: ebpf.AttachTCXIngress})
	if err != nil {
		return nil, explainAttach(device, err)
	}
	return l, nil
}

// isAttached reports whether the program of a link is still attached to its device.
func isAttached(l link.Link) bool {
	info, err := l.Info()
	if err != nil {
		return false
	}
	tcx := info.TCX()
	return tcx != nil && tcx.Ifindex != 0
}
