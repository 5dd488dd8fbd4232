package tun

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ipipd/test/netlab"
)

// onNewThread calls f on a thread that ends with f, so that f may drop capabilities or unshare
// namespaces.
func onNewThread(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		f()
	}()
	<-done
}

// checkOpenError checks that an Open failed with an error of one line that has words.
func checkOpenError(t *testing.T, d Device, err error, words ...string) {
	t.Helper()
	if err == nil {
		d.Close()
		t.Error("opened")
		return
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("%q does not say %q", err, word)
		}
	}
	if strings.Contains(err.Error(), "\n") {
		t.Errorf("more than one line: %q", err)
	}
}

func TestOpen_withoutCapNetAdmin(t *testing.T) {
	if _, err := os.Stat(cloneDevice); err != nil {
		t.Skipf("needs %s", cloneDevice)
	}
	eachBackend(t, func(t *testing.T, o Options) {
		onNewThread(func() {
			header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
			var none [2]unix.CapUserData
			if err := unix.Capset(&header, &none[0]); err != nil {
				t.Error(err)
				return
			}
			d, err := Open(o)
			checkOpenError(t, d, err, "CAP_NET_ADMIN", "run it as root", "--cap-add NET_ADMIN")
			if !errors.Is(err, unix.EPERM) {
				t.Errorf("%v is not EPERM", err)
			}
		})
	})
}

func TestOpen_withoutCloneDevice(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		skip := ""
		onNewThread(func() {
			if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
				skip = "needs root to make a mount namespace"
				return
			}
			// Keep the mounts below private to this namespace.
			if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
				t.Error(err)
				return
			}
			if err := unix.Mount("none", "/dev/net", "tmpfs", 0, ""); err != nil {
				skip = "cannot hide /dev/net: " + err.Error()
				return
			}
			d, err := Open(o)
			checkOpenError(t, d, err, cloneDevice+" does not exist: ", "--device /dev/net/tun")
			// A container may have anything at that path.
			if err := os.WriteFile(cloneDevice, nil, 0o600); err != nil {
				t.Error(err)
				return
			}
			d, err = Open(o)
			checkOpenError(t, d, err, cloneDevice+" is another kind of file: ", "--device /dev/net/tun")
		})
		if skip != "" {
			t.Skip(skip)
		}
	})
}

// The device list of a container is its control group's. Only version 1 has one for a single thread.
func TestOpen_deviceList(t *testing.T) {
	dir := fmt.Sprintf("/sys/fs/cgroup/devices/ipipd-test-%d", os.Getpid())
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Skipf("needs the devices of control groups of version 1: %v", err)
	}
	t.Cleanup(func() {
		netlab.Eventually(t, "the thread has left the control group", func() bool { return os.Remove(dir) == nil })
	})
	if err := os.WriteFile(dir+"/devices.deny", []byte("c 10:200 rwm"), 0); err != nil {
		t.Skipf("the device list cannot be changed: %v", err)
	}
	eachBackend(t, func(t *testing.T, o Options) {
		onNewThread(func() {
			if err := os.WriteFile(dir+"/tasks", []byte(strconv.Itoa(unix.Gettid())), 0); err != nil {
				t.Error(err)
				return
			}
			d, err := Open(o)
			checkOpenError(t, d, err, "the device list of this container's cgroup does not have "+cloneDevice, "--device /dev/net/tun")
			if f := Missing(os.DirFS("/"), Probe()); f == nil || err == nil || f.Error() != err.Error() {
				t.Errorf("doctor says %v, and up %v", f, err)
			}
		})
	})
}

func TestOpen_failureLeaksNoDescriptor(t *testing.T) {
	count := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Skipf("needs /proc: %v", err)
		}
		return len(entries)
	}
	ns := netlab.New(t)
	before := count()
	for _, o := range []Options{{Name: "lo"}, {Name: "lo", NoOffload: true}, {Name: "a/b"}, {MTU: 7}, {MTU: 7, NoOffload: true}, {Queues: 1000}} {
		ns.Do(func() {
			if d, err := Open(o); err == nil {
				d.Close()
				t.Errorf("Open(%+v): %s", o, d.Name())
			}
		})
	}
	if after := count(); after != before {
		t.Errorf("%d descriptors, before %d", after, before)
	}
}

func TestReleaseAtLeast(t *testing.T) {
	for release, want := range map[string]bool{
		"6.8.5": true, "6.8.12-amd64": true, "6.9": true, "7.0.0-rc1": true, "10.1": true, "6.18.44-fc-v769": true,
		"6.8.4": false, "6.8": false, "6.8.0-31-generic": false, "6.1.0-13-amd64": false, "5.15.0": false, "": false, "x": false,
	} {
		if got := releaseAtLeast(release, 6, 8, 5); got != want {
			t.Errorf("%q: %v", release, got)
		}
	}
}
