package tun

import (
	"fmt"
	"strings"
)

// mostNames is how many names of the kind ipipN are tried.
const mostNames = 1 << 16

// WantName is what CheckName takes.
const WantName = "1 to 15 ASCII characters, none of them / : % or space, and not . .. all or default"

// CheckName reports whether name can be, and should be, the name of an interface.
// Linux refuses '/', ':' and space (dev_valid_name), and takes '%' for a pattern; "all"
// and "default" stand for something else below /proc/sys/net/ipv4/conf.
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

// eachName calls try with the names that an interface may get, until one is
// not taken: with name, or, if that is empty, with ipip1, ipip2 and so on.
// taken says of an error that the name was.
func eachName(name string, taken func(error) bool, try func(name string) error) error {
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
	for n := 1; n <= mostNames; n++ {
		if err := try(fmt.Sprintf("ipip%d", n)); !taken(err) {
			return err
		}
	}
	return fmt.Errorf("interfaces ipip1 to ipip%d: %w", mostNames, ErrNameTaken)
}
