package lab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"

	"golang.org/x/sys/unix"
)

// Namespace is a network namespace. It exists while its file is open, or a process is in it.
type Namespace struct{ file *os.File }

// NewNamespace makes a network namespace. Errors say what the host lacks for it; without CAP_SYS_ADMIN it
// is EPERM.
func NewNamespace() (n *Namespace, err error) {
	err = onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("cannot make a network namespace: %w%s", os.NewSyscallError("unshare", err), remedy(err))
		}
		file, err := os.Open("/proc/thread-self/ns/net")
		if err == nil {
			n = &Namespace{file}
		}
		return err
	})
	return n, err
}

// remedy returns what to do about an error of unshare, with a colon before it; "" if that is unknown.
func remedy(err error) string {
	switch {
	case errors.Is(err, unix.EPERM):
		return ": it takes root, or in a container --privileged"
	case errors.Is(err, unix.ENOSPC):
		return ": there are as many as may be (sysctl user.max_net_namespaces)"
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS):
		return ": this kernel has none (CONFIG_NET_NS)"
	}
	return ""
}

// onThread calls f on a locked thread, which returns to the network namespace that it was in. If it cannot,
// it stays locked, so that no other goroutine runs in the wrong one.
func onThread(f func() error) (err error) {
	runtime.LockOSThread()
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer func() { // also if f ends its goroutine
		back := os.NewSyscallError("setns", unix.Setns(int(home.Fd()), unix.CLONE_NEWNET))
		if back == nil {
			runtime.UnlockOSThread()
		} else {
			err = errors.Join(err, back)
		}
		home.Close()
	}()
	return f()
}

// Do calls f on a thread in the namespace. Sockets that f opens and processes that f starts belong to the
// namespace; goroutines that f starts do not. f may call runtime.Goexit, and Do of another Namespace.
//
// In f /proc/thread-self/net is the namespace's, /proc/net the main thread's.
func (n *Namespace) Do(f func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
			return os.NewSyscallError("setns", err)
		}
		return f()
	})
}

// Start starts a process in the namespace.
func (n *Namespace) Start(cmd *exec.Cmd) error { return n.Do(cmd.Start) }

// Path returns a path of the namespace, for `ip link set … netns PATH` and nsenter --net=PATH. It is valid while
// this process runs and the Namespace is open.
func (n *Namespace) Path() string {
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.file.Fd())
}

// Close closes the namespace's file. The kernel removes the namespace when no process is in it.
func (n *Namespace) Close() error { return n.file.Close() }
