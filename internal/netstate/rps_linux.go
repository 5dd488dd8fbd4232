package netstate

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// SetRPS sets the processors that process an interface's received flows (receive packet
// steering): mask is rps_cpus of each receive queue, in hexadecimal as in /sys, or "all"
// for the affinity mask of this process. A mask that is set already, by an operator or
// net.core.rps_default_mask, is kept, and is the error.
//
// /sys may be mounted from another network namespace, which has another interface of that
// name. A temporary alias tells them apart.
func (r *requester) SetRPS(ifname, mask string) error {
	device, err := r.DeviceIndex(ifname)
	if err != nil {
		return err
	}
	l, err := r.linkAt(device)
	if err != nil {
		return err
	}
	folder := filepath.Join("/sys/class/net", ifname)
	token := "ipipd-" + rand.Text()
	if err := r.library.LinkSetAlias(l, token); err != nil {
		return fmt.Errorf("set the alias of %s: %w", ifname, permission(err))
	}
	seen, err := os.ReadFile(filepath.Join(folder, "ifalias"))
	if err := errors.Join(err, r.library.LinkSetAlias(l, l.Attrs().Alias)); err != nil {
		return err
	}
	if strings.TrimSpace(string(seen)) != token {
		return fmt.Errorf("/sys is of another network namespace than %s", ifname)
	}
	queues, err := filepath.Glob(filepath.Join(folder, "queues/rx-*/rps_cpus"))
	if err != nil || len(queues) == 0 {
		return fmt.Errorf("%s has no receive queues with rps_cpus: %w", ifname, errors.Join(err, os.ErrNotExist))
	}
	for _, q := range queues {
		set, err := os.ReadFile(q)
		if err != nil {
			return err
		}
		if set := strings.TrimSpace(string(set)); strings.Trim(set, "0,") != "" {
			return fmt.Errorf("%s is %s already", q, set)
		}
	}
	if mask == "all" {
		if mask, err = affinity(); err != nil {
			return err
		}
	}
	for _, q := range queues {
		if err := os.WriteFile(q, []byte(mask), 0); err != nil {
			return err
		}
	}
	return nil
}

// affinity is the affinity mask of this process in the format of /sys: 32-bit groups,
// separated by commas.
func affinity() (mask string, err error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return "", os.NewSyscallError("sched_getaffinity", err)
	}
	const group = 32
	groups := make([]uint32, 1)
	for cpu, left := 0, set.Count(); left > 0; cpu++ {
		for cpu/group >= len(groups) {
			groups = append(groups, 0)
		}
		if set.IsSet(cpu) {
			groups[cpu/group] |= 1 << (cpu % group)
			left--
		}
	}
	words := make([]string, 0, len(groups))
	for _, g := range slices.Backward(groups) {
		words = append(words, fmt.Sprintf("%08x", g))
	}
	return strings.Join(words, ","), nil
}
