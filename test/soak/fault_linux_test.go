//go:build linux && soak

package soak

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// faults are the system calls that fail, and how. Calls of the Go runtime are left out, epoll_pwait too: strace may detach
// between the entry and the exit of a call, which then fails as call -1 does (ENOSYS): an error that the runtime does not
// handle. The event signals interrupts them.
var faults = []struct {
	call   string
	path   string // only on this file
	errors []string
}{
	{"sendmmsg", "", []string{"ENOBUFS", "EMSGSIZE", "ENOMEM", "EINTR", "EPERM", "ENETUNREACH"}},
	{"recvmmsg", "", []string{"ENOMEM", "EINTR", "ENOBUFS"}},
	{"recvmsg,recvfrom", "", []string{"ENOMEM", "EINTR", "ENOBUFS"}},
	{"sendmsg,sendto", "", []string{"ENOBUFS", "EMSGSIZE", "ENOMEM", "EINTR"}},
	{"write,writev,read,readv", "/dev/net/tun", []string{"ENOMEM", "EINTR", "ENOBUFS"}},
	{"ioctl", "", []string{"ENOMEM", "EINTR"}},
	{"setsockopt,getsockopt", "", []string{"ENOMEM", "ENOBUFS"}},
	{"socket", "", []string{"ENOBUFS", "EMFILE", "ENOMEM"}},
	{"openat", "", []string{"ENFILE", "ENOMEM", "EINTR"}},
	{"bpf", "", []string{"ENOMEM", "EPERM"}},
}

// fault makes system calls of the process fail for some seconds, by strace.
func fault(e *end, random *rand.Rand) string {
	f := faults[random.IntN(len(faults))]
	failure := f.errors[random.IntN(len(f.errors))]
	first, step := 1+random.IntN(20), 1+random.IntN(20)
	pause := time.Duration(500+random.IntN(3000)) * time.Millisecond
	pid := e.pid()
	if pid == 0 {
		return "not there"
	}
	starting := ""
	if !e.ready() { // then it may end, with an error, and keep starts the next one
		starting = " at its start"
		e.lock.Lock()
		e.faulty = true
		e.lock.Unlock()
	}
	if !e.traced.CompareAndSwap(false, true) {
		return "another one is not over"
	}
	args := []string{"-f", "-qq", "-p", strconv.Itoa(pid), "-e", "trace=" + f.call, "-e", fmt.Sprintf("inject=%s:error=%s:when=%d+%d", f.call, failure, first, step)}
	if f.path != "" {
		args = append(args, "-P", f.path)
	}
	cmd := exec.Command("strace", args...)
	output, err := cmd.StderrPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		e.s.failf("strace: %v", err)
		e.traced.Store(false)
		return err.Error()
	}
	done := make(chan struct{})
	last := "" // line
	go func() {
		for lines := bufio.NewScanner(output); lines.Scan(); {
			if last = lines.Text(); strings.Contains(last, "(INJECTED)") {
				e.s.injected.Add(1)
			}
		}
		_ = cmd.Wait()
		close(done)
	}()
	e.s.background.Go(func() {
		defer e.traced.Store(false)
		select {
		case <-done:
			if e.pid() == pid {
				e.s.failf("strace has ended: %s", last)
			}
			return
		case <-time.After(pause):
		}
		_ = cmd.Process.Signal(unix.SIGINT) // it detaches
		select {
		case <-done:
		case <-time.After(5 * time.Second):
			// If the process was killed, strace waits for its first thread, that for the others, and these for strace.
			e.s.logf("%s strace of process %d is killed", e.name, pid)
			_ = cmd.Process.Kill()
			<-done
		}
	})
	return fmt.Sprintf("%s of %s, each %dth, for %v%s", failure, f.call, step, pause, starting)
}
