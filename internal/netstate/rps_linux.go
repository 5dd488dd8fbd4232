package netstate

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"ipipd/internal/privileged"
)

// SetRPS sets the processors that process an interface's received flows (receive packet
// steering): mask is rps_cpus of each receive queue, in hexadecimal as in /sys, or "all"
// for the affinity mask of this process. A mask that is set already, by an operator or
// net.core.rps_default_mask, is kept, and is the error.
func (r *requester) SetRPS(ifname, mask string) error {
	if privileged.Brokered() {
		return privileged.RPS(true, ifname, mask)
	}
	files, mask, err := r.rps(ifname, mask)
	if err != nil {
		return err
	}
	for _, f := range files {
		set, err := os.ReadFile(f)
		if err != nil {
			return err
		}
		if digits(string(set)) != "" {
			return fmt.Errorf("%s is %s already", f, strings.TrimSpace(string(set)))
		}
	}
	for _, f := range files {
		if err := os.WriteFile(f, []byte(mask), 0); err != nil {
			return err
		}
	}
	return nil
}

// ClearRPS clears the mask that SetRPS has set. Another mask, an operator's, stays.
func (r *requester) ClearRPS(ifname, mask string) error {
	if privileged.Brokered() {
		return privileged.RPS(false, ifname, mask)
	}
	files, mask, err := r.rps(ifname, mask)
	if err != nil {
		return err
	}
	for _, f := range files {
		set, err := os.ReadFile(f)
		if err == nil && digits(string(set)) == digits(mask) {
			err = os.WriteFile(f, []byte("0"), 0)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// rps returns the files rps_cpus of an interface, and the mask that mask stands for.
//
// /sys may be mounted from another network namespace, which has another interface of that
// name. A temporary alias tells them apart.
func (r *requester) rps(ifname, mask string) (files []string, _ string, err error) {
	device, err := r.DeviceIndex(ifname)
	if err != nil {
		return nil, "", err
	}
	folder := filepath.Join("/sys/class/net", ifname)
	token := "ipipd-" + rand.Text()
	alias, err := r.alias(device)
	if err != nil {
		return nil, "", err
	}
	if err := r.setAlias(device, []byte(token)); err != nil {
		return nil, "", err
	}
	seen, err := os.ReadFile(filepath.Join(folder, "ifalias"))
	if err := errors.Join(err, r.setAlias(device, alias)); err != nil {
		return nil, "", err
	}
	if strings.TrimSpace(string(seen)) != token {
		return nil, "", fmt.Errorf("/sys is of another network namespace than %s", ifname)
	}
	files, err = filepath.Glob(filepath.Join(folder, "queues/rx-*/rps_cpus"))
	if err != nil || len(files) == 0 {
		return nil, "", fmt.Errorf("%s has no receive queues with rps_cpus: %w", ifname, errors.Join(err, os.ErrNotExist))
	}
	if mask == "all" {
		mask, err = affinity()
	}
	return files, mask, err
}

// digits returns the hexadecimal digits of a processor mask as one number: no commas, no leading zeros.
func digits(mask string) string {
	var b strings.Builder
	for group := range strings.SplitSeq(strings.TrimSpace(mask), ",") {
		b.WriteString(strings.Repeat("0", max(8-len(group), 0)) + group)
	}
	return strings.ToLower(strings.TrimLeft(b.String(), "0"))
}

// alias returns IFLA_IFALIAS of an interface, without the terminating zero; empty if it has none.
func (r *requester) alias(device int) (alias []byte, err error) {
	messages, err := r.getLinkMessages(device, "")
	if err != nil {
		return nil, lookupError(device, err)
	}
	for _, m := range messages {
		err = eachAttr(m[min(len(m), unix.SizeofIfInfomsg):], func(kind uint16, value []byte) error {
			if kind == unix.IFLA_IFALIAS {
				alias = bytes.TrimRight(value, "\x00")
			}
			return nil
		})
	}
	return alias, err
}

func (r *requester) setAlias(device int, alias []byte) error {
	req := linkRequest(unix.RTM_SETLINK, device, 0, nl.NewRtAttr(unix.IFLA_IFALIAS, alias))
	_, err := r.change([]change{{NetlinkRequest: req, device: device, what: "set the alias of %[2]v"}})
	return err
}

// affinity returns the affinity mask of this process in the format of /sys: 32-bit groups,
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

// SetRPS does what Host.SetRPS does, in the calling thread's network namespace.
func SetRPS(ifname, mask string) error { return fresh.SetRPS(ifname, mask) }

// ClearRPS does what Host.ClearRPS does, in the calling thread's network namespace.
func ClearRPS(ifname, mask string) error { return fresh.ClearRPS(ifname, mask) }
