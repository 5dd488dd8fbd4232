// Package serviceuser knows the user and the group that the packages run ipipd as. Both are named
// ipipd, and the user is the only member that the packages give the group.
//
// It reads /etc/passwd and /etc/group once, when it is first asked: a process asks before it is confined, which
// keeps it from reading them. A user or group of that name with root's number, 0, does not count.
package serviceuser

import (
	"os/user"
	"strconv"
	"sync"
)

// Name is the name of the user, and of the group.
const Name = "ipipd"

// UID returns the user's number, -1 on a host without the user.
var UID = sync.OnceValue(func() int {
	u, err := user.Lookup(Name)
	if err != nil {
		return -1
	}
	return number(u.Uid)
})

// GID returns the group's number, -1 on a host without the group.
var GID = sync.OnceValue(func() int {
	g, err := user.LookupGroup(Name)
	if err != nil {
		return -1
	}
	return number(g.Gid)
})

// number parses a uid or gid; it is -1 if text is none, or is root's.
func number(text string) int {
	const none = 1<<32 - 1 // (uid_t)-1
	n, err := strconv.ParseUint(text, 10, 32)
	if err != nil || n == 0 || n == none {
		return -1
	}
	return int(n)
}
