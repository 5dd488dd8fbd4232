package fastpath

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// The programs of all processes on one side of a device are a chain, run one after
// the other until one has a verdict.

const (
	// maxPrograms is how many the kernel takes in a chain: BPF_MPROG_MAX, 64, less the
	// mark at the end.
	maxPrograms = 63
	// spared is how many places of a chain are left to the programs of others. Each
	// process with a tunnel over a device has a program in its chain, and the last
	// of them is not to be what keeps, say, a firewall out.
	spared = 16
)

// chain is the programs on one side of a device of the thread's namespace.
func chain(device int, where ebpf.AttachType) (programs []link.AttachedProgram, err error) {
	for range 4 {
		var r *link.QueryResult
		r, err = link.QueryPrograms(link.QueryOptions{Target: device, Attach: where})
		if err == nil {
			return r.Programs, nil
		}
		if !errors.Is(err, unix.ENOSPC) { // it grew between the two system calls
			break
		}
	}
	return nil, explainAttach(device, err)
}

// room fails where one more program would take a place that is left to others.
func room(device int, where ebpf.AttachType) error {
	programs, err := chain(device, where)
	if err != nil {
		return err
	}
	if n := len(programs); n >= maxPrograms-spared {
		return &Unavailable{Why: fmt.Sprintf("%d eBPF programs hang on %s already, where the kernel takes %d and %d are left to other software; "+
			"each ipipd process has one there, however many tunnels it has", n, deviceName(device), maxPrograms, spared)}
	}
	return nil
}

// attach hangs a program on a device, in the network namespace of the thread, until the
// link is closed.
func attach(device int, program *ebpf.Program, where ebpf.AttachType) (link.Link, error) {
	if err := room(device, where); err != nil {
		return nil, err
	}
	l, err := link.AttachTCX(link.TCXOptions{Interface: device, Program: program, Attach: where})
	if err != nil {
		return nil, explainAttach(device, err)
	}
	return l, nil
}

// ForeignOnEgress says whether a program that is not the FastPath's hangs on tcx of
// the egress of a device, a tunnel's TUN: one that comes behind ours never sees what
// ours carries. It costs two system calls.
func (f *FastPath) ForeignOnEgress(device int) (bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.objects == nil {
		return false, ErrClosed
	}
	programs, err := chain(device, ebpf.AttachTCXEgress)
	if err != nil {
		return false, err
	}
	for _, p := range programs {
		if p.ID != f.sendID {
			return true, nil
		}
	}
	return false, nil
}
