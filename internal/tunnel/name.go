package tunnel

import (
	"crypto/sha256"
	"encoding/hex"
	"strings"
	"unicode"
	"unicode/utf8"

	"ipipd/tun"
)

const wantName = "1 to 127 bytes of text on one line, without / and not . .. all or default"

// checkName returns "" for a name that Config.Name may have, or else a description of those.
func checkName(name string) (want string) {
	const altIfnameSize = 128 // ALTIFNAMSIZ, with its NUL
	switch {
	case name == "" || len(name) >= altIfnameSize || !utf8.ValidString(name),
		name == "." || name == ".." || name == "all" || name == "default", // see tun.CheckName
		strings.ContainsFunc(name, func(r rune) bool { return r == '/' || !unicode.IsPrint(r) }):
		return wantName
	}
	return ""
}

// CheckName checks a tunnel's name. Its error is a *ValueError about the property "name".
func CheckName(name string) error {
	if want := checkName(name); want != "" {
		return &ValueError{Property: "name", Value: name, Want: want}
	}
	return nil
}

// A short name is shortPrefix and the first shortBytes of a hash, in hexadecimal.
const (
	shortPrefix = "ipip-"
	shortBytes  = 5
)

// InterfaceName is the name of the interface of a tunnel with that Config.Name: the same if Linux takes
// it, or else a short one, always the same for that name. The tunnel's name is then the interface's
// alternative name (IFLA_ALT_IFNAME).
func InterfaceName(name string) string {
	if name == "" || tun.CheckName(name) {
		return name
	}
	sum := sha256.Sum256([]byte(name))
	return shortPrefix + hex.EncodeToString(sum[:shortBytes])
}

// IsShortName reports whether name looks like a short one of InterfaceName.
func IsShortName(name string) bool {
	digits, short := strings.CutPrefix(name, shortPrefix)
	return short && len(digits) == 2*shortBytes
}

// altName returns the alternative name of a tunnel's interface; "" if it needs none.
func altName(name string) string {
	if InterfaceName(name) == name {
		return ""
	}
	return name
}

// shownName is what a tunnel with that Config.Name is called while its interface has the name ifname,
// which may have been renamed.
func shownName(name, ifname string) string {
	if ifname == InterfaceName(name) {
		return name
	}
	return ifname
}
