package netstate

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// SetRPS sets the processors that the flows which an interface receives are spread over
// (receive packet steering): mask is rps_cpus of each receive queue, in hexadecimal as
// /sys takes it, or "all" for those that this process may run on. A mask that is there
// already, an operator's or net.core.rps_default_mask, stays, and is the error.
//
// /sys shows the interfaces of the network namespace that it was mounted in: an interface
// of that name there may be another one. So it is told by an alias that it has for a
// moment.
func SetRPS(ifname, mask string) error {
	l, err := link(ifname)
	if err != nil {
		return err
	}
	folder := filepath.Join("/sys/class/net", ifname)
	token := "ipipd-" + rand.Text()
	if err := netlink.LinkSetAlias(l, token); err != nil {
		return fmt.Errorf("set the alias of %s: %w", ifname, permission(err))
	}
	seen, err := os.ReadFile(filepath.Join(folder, "ifalias"))
	if err := errors.Join(err, netlink.LinkSetAlias(l, l.Attrs().Alias)); err != nil {
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

// affinity is the mask of the processors that this process may run on, as /sys takes it:
// a comma between each 32 bits.
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
