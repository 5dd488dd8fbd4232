package tun

import (
	"fmt"
	"strings"
)

// maxNames bounds N of ipipN.
const maxNames = 1 << 16

// WantName describes the names that CheckName accepts, for error messages.
const WantName = "1 to 15 ASCII characters, none of them / : % or space, and not . .. all or default"

// CheckName reports whether name is acceptable as an interface name. Linux rejects '/', ':'
// and space (dev_valid_name) and expands '%' (dev_alloc_name); "all" and "default" are
// special in /proc/sys/net/ipv4/conf.
func CheckName(name string) bool {
	if len(name) < 1 || len(name) > 15 { // IFNAMSIZ less its NUL
		return false
	}
	for i := range len(name) {
		if c := name[i]; c <= ' ' || c >= 0x7f || strings.IndexByte("/:%", c) >= 0 {
			return false
		}
	}
	return name != "." && name != ".." && name != "all" && name != "default"
}

// tryNames calls try with name or, if that is empty, with ipip1, ipip2 and so on until a
// name is free. taken reports whether try's error means that the name is in use.
func tryNames(name string, taken func(error) bool, try func(name string) error) error {
	if name != "" {
		if !CheckName(name) {
			return fmt.Errorf("interface name %q is not accepted: want %s", name, WantName)
		}
		err := try(name)
		if taken(err) {
			return fmt.Errorf("interface %s: %w", name, ErrNameTaken)
		}
		return err
	}
	for n := 1; n <= maxNames; n++ {
		if err := try(fmt.Sprintf("ipip%d", n)); !taken(err) {
			return err
		}
	}
	return fmt.Errorf("interfaces ipip1 to ipip%d: %w", maxNames, ErrNameTaken)
}
