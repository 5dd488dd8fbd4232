package netstate

import (
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"ipipd/test/netlab"
)

func TestHost_RawSockets(t *testing.T) {
	ns := netlab.New(t)
	h := openHost(t, ns)
	has := func(inode uint64) bool {
		inodes, err := h.RawSockets(unix.IPPROTO_IPIP)
		if err != nil {
			t.Fatal(err)
		}
		return slices.Contains(inodes, inode)
	}
	var s unix.Stat_t
	var fd, other int
	ns.Do(func() {
		var err error
		if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_IPIP); err != nil {
			t.Error(err)
		}
		if other, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP); err != nil {
			t.Error(err)
		}
	})
	defer unix.Close(other)
	if err := unix.Fstat(fd, &s); err != nil {
		t.Fatal(err)
	}
	if !has(s.Ino) {
		t.Error("it is not seen")
	}
	if err := unix.Fstat(other, &s); err != nil || has(s.Ino) {
		t.Errorf("%v; one of ICMP is seen", err)
	}
	_ = unix.Fstat(fd, &s)
	unix.Close(fd)
	if has(s.Ino) {
		t.Error("it is seen after it was closed")
	}
}
