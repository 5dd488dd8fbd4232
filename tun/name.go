package tun

import (
	"fmt"
	"strings"
)

// maxName is the longest name of an interface in bytes: IFNAMSIZ less its NUL.
const maxName = 15

// mostNames is how many names of the kind ipipN are tried.
const mostNames = 1 << 16

// checkName refuses what the kernel would refuse (dev_valid_name), truncate, or
// take for a pattern.
func checkName(name string) error {
	switch {
	case name == "", len(name) > maxName, name == ".", name == "..", strings.ContainsAny(name, "/:% \t\n\v\f\r\x00"):
		return fmt.Errorf("interface name %q is not accepted: want 1 to %d bytes without '/', ':', '%%' and space", name, maxName)
	}
	return nil
}

// eachName calls try with the names that an interface may get, until one is
// not taken: with name, or, if that is empty, with ipip1, ipip2 and so on.
// taken says of an error that the name was.
func eachName(name string, taken func(error) bool, try func(name string) error) error {
	if name != "" {
		if err := checkName(name); err != nil {
			return err
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
