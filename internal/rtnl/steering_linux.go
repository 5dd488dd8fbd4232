package rtnl

import (
	"crypto/rand"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/vishvananda/netlink"
)

// Steer has the kernel spread the flows that an interface receives over all
// processors (receive packet steering), or each packet stay where it came.
//
// That is set in /sys, which shows the interfaces of the network namespace that it
// was mounted in: an interface of that name there may be another one. So it is
// looked for by an alias that it has for a moment.
func Steer(ifname string, on bool) error {
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
		return fmt.Errorf("%s has no queues to steer: %w", ifname, errors.Join(err, os.ErrNotExist))
	}
	for _, q := range queues {
		if err := os.WriteFile(q, []byte(processors(on)), 0); err != nil {
			return err
		}
	}
	return nil
}

// processors is the mask of all of them, or of none, as /sys takes it: hexadecimal,
// a comma between each 32 bits.
func processors(all bool) string {
	if !all {
		return "0"
	}
	mask := new(big.Int).Lsh(big.NewInt(1), uint(runtime.NumCPU()))
	digits := mask.Sub(mask, big.NewInt(1)).Text(16)
	for i := len(digits) - 8; i > 0; i -= 8 {
		digits = digits[:i] + "," + digits[i:]
	}
	return digits
}
