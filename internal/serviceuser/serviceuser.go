// Package serviceuser knows the user and the group that the packages run ipipd as. Both are named
// ipipd, and only in their group is that user.
package serviceuser

import (
	"os/user"
	"strconv"
	"sync"
)

// Name is that of the user, and of the group.
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

func number(text string) int {
	n, err := strconv.Atoi(text)
	if err != nil {
		return -1
	}
	return n
}
