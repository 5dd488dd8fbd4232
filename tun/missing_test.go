package tun

import (
	"errors"
	"strings"
	"syscall"
	"testing"
	"testing/fstest"
)

// Each cause is explained with a command of its own; an error with another cause is not explained.
func TestMissing(t *testing.T) {
	without := fstest.MapFS{"proc/misc": {Data: []byte("200 tun2\n 60 x\n")}}
	with := fstest.MapFS{"proc/misc": {Data: []byte("235 autofs\n200 tun\n 60 x\n")}}
	for _, c := range []struct {
		err        syscall.Errno
		files      fstest.MapFS
		code, does string
	}{
		{syscall.ENOENT, nil, "no-tun", "modprobe tun; in a container: --device /dev/net/tun"},
		{syscall.ENOENT, without, "no-tun", "modprobe tun; "},
		{syscall.ENOENT, with, "no-tun", "mkdir -p /dev/net && mknod /dev/net/tun c 10 200; "},
		{syscall.ENODEV, with, "no-tun", "modprobe tun; "},
		{syscall.ENXIO, with, "no-tun", "modprobe tun; "},
		{syscall.ENOTTY, with, "no-tun", "rm /dev/net/tun && mknod /dev/net/tun c 10 200; "},
		{syscall.EPERM, with, "tun-forbidden", "in a container: --device /dev/net/tun, a volume is not enough"},
		{syscall.EACCES, with, "tun-forbidden", "chmod 0666 /dev/net/tun, or run it as root"},
	} {
		f := Missing(c.files, c.err)
		if f == nil || f.Code != c.code || !strings.HasPrefix(f.Do, c.does) || f.What == "" || f.Why == "" || !errors.Is(f, c.err) {
			t.Errorf("%v: %+v, want %s and %q", c.err, f, c.code, c.does)
		} else if want := f.What + ": " + f.Do + ": " + c.err.Error(); f.Error() != want {
			t.Errorf("the error is %q, want %q", f.Error(), want)
		}
	}
	for _, err := range []error{nil, syscall.EMFILE, syscall.EINTR} {
		if f := Missing(with, err); f != nil {
			t.Errorf("%v: %+v", err, f)
		}
	}
}
