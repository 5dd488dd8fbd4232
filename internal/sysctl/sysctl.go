// Package sysctl has what the real server of a load balancer needs of net.ipv4.conf, and sets it and
// sets it back.
//
// A Need is a function of what Read returns. A Manager sets what is needed, and records the values before in a
// file, so that the last of the processes that need it sets them back, and after a crash the next one.
// It works in the network namespace of the calling thread.
package sysctl

import (
	"bytes"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
)

// Setting is a sysctl and the value that is needed.
type Setting struct {
	// File is below /proc/sys: net/ipv4/conf/eth0/arp_ignore.
	File  string
	Value int
	// Ours: it goes with the tunnel's interface, so that nothing has to be set back.
	Ours bool
}

// String returns the argument of `sysctl -w`.
func (s Setting) String() string { return fmt.Sprintf("%s=%d", name(s.File), s.Value) }

// name returns sysctl(8)'s name of a file: a dot in an interface's name is a slash there.
func name(file string) string {
	return strings.NewReplacer("/", ".", ".", "/").Replace(file)
}

// Read returns the value of a sysctl below /proc/sys, the root of the file system.
func Read(root fs.FS, file string) (int, error) {
	b, err := fs.ReadFile(root, "proc/sys/"+file)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(string(bytes.TrimSpace(b)))
}

// conf returns the file of a sysctl of net.ipv4.conf. For the three that are used here the kernel takes the
// larger of the values of all and of the interface.
func conf(ifname, key string) string { return "net/ipv4/conf/" + ifname + "/" + key }
