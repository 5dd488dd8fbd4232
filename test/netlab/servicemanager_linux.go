package netlab

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// ServiceManager is a stand-in for systemd as it treats a service with NotifyAccess=main and
// FileDescriptorStoreMax=, by the rules of its src/core/service.c: who may send, what a message and
// a name may be, which descriptors are kept, for how long, and in which order they are given back.
type ServiceManager struct {
	t      testing.TB
	name   string
	socket int
	max    int
	wake   *os.File // closed at the end

	mu       sync.Mutex
	pid      int
	stored   []stored // the newest first
	state    []string
	warnings []string
}

type stored struct {
	name string
	fd   int
	poll bool
}

// NewServiceManager returns a ServiceManager that stores max descriptors, for one service.
func NewServiceManager(t testing.TB, max int) *ServiceManager {
	t.Helper()
	dir, err := os.MkdirTemp("", "manager")
	if err != nil {
		t.Fatal(err)
	}
	m := &ServiceManager{t: t, name: filepath.Join(dir, "notify"), max: max}
	if m.socket, err = unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err == nil {
		if err = unix.Bind(m.socket, &unix.SockaddrUnix{Name: m.name}); err == nil {
			err = unix.SetsockoptInt(m.socket, unix.SOL_SOCKET, unix.SO_PASSCRED, 1)
		}
	}
	end, wake, pipeErr := os.Pipe()
	if err != nil || pipeErr != nil {
		t.Fatal(err, pipeErr)
	}
	m.wake = wake
	done := make(chan struct{})
	go func() {
		defer close(done)
		for m.round(int(end.Fd())) {
		}
	}()
	t.Cleanup(func() {
		wake.Close()
		<-done
		end.Close()
		m.Release()
		unix.Close(m.socket)
		os.RemoveAll(dir)
	})
	return m
}

// Start starts the service, with what is stored. cmd must have a Path, and no ExtraFiles.
func (m *ServiceManager) Start(cmd *exec.Cmd) {
	m.t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	for m.receive() { // as systemd, before it sees the end of the process before
	}
	var names []string
	for _, s := range m.stored {
		fd, err := unix.FcntlInt(uintptr(s.fd), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			m.t.Fatal(err)
		}
		cmd.ExtraFiles = append(cmd.ExtraFiles, os.NewFile(uintptr(fd), s.name))
		names = append(names, s.name)
	}
	if cmd.Env == nil {
		cmd.Env = os.Environ()
	}
	cmd.Env = append(cmd.Env, "NOTIFY_SOCKET="+m.name, "FDSTORE="+strconv.Itoa(m.max))
	if len(names) > 0 { // LISTEN_PID must be the service's PID, which is that of sh before exec
		cmd.Env = append(cmd.Env, "LISTEN_FDS="+strconv.Itoa(len(names)), "LISTEN_FDNAMES="+strings.Join(names, ":"))
		cmd.Args = append([]string{"sh", "-c", `LISTEN_PID=$$ exec "$0" "$@"`, cmd.Path}, cmd.Args[1:]...)
		cmd.Path = "/bin/sh"
	}
	if err := cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	m.pid = cmd.Process.Pid
	for _, f := range cmd.ExtraFiles {
		f.Close()
	}
}

// Release closes what is stored, as when the service is stopped, or has failed for good.
func (m *ServiceManager) Release() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.keepOnly(func(stored) bool { return false })
}

// Stored returns the names of the stored descriptors, sorted.
func (m *ServiceManager) Stored() (names []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range m.stored {
		names = append(names, s.name)
	}
	slices.Sort(names)
	return names
}

// Said reports whether the service has sent this line.
func (m *ServiceManager) Said(line string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Contains(m.state, line)
}

// Forget forgets what the service has said.
func (m *ServiceManager) Forget() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.state = nil
}

// Warnings returns what systemd would have logged.
func (m *ServiceManager) Warnings() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.warnings)
}

func (m *ServiceManager) keepOnly(keep func(stored) bool) {
	m.stored = slices.DeleteFunc(m.stored, func(s stored) bool {
		if keep(s) {
			return false
		}
		unix.Close(s.fd)
		return true
	})
}

// round waits for a message, or for a descriptor to hang up. It returns false at the end.
func (m *ServiceManager) round(end int) bool {
	fds := []unix.PollFd{{Fd: int32(m.socket), Events: unix.POLLIN}, {Fd: int32(end)}}
	m.mu.Lock()
	for _, s := range m.stored {
		if s.poll {
			fds = append(fds, unix.PollFd{Fd: int32(s.fd)})
		}
	}
	m.mu.Unlock()
	if _, err := unix.Poll(fds, -1); err != nil {
		return err == unix.EINTR
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, p := range fds[2:] {
		if p.Revents&(unix.POLLHUP|unix.POLLERR) != 0 {
			m.warnings = append(m.warnings, "received EPOLLERR or EPOLLHUP, closing")
			m.keepOnly(func(s stored) bool { return s.fd != int(p.Fd) })
		}
	}
	if fds[0].Revents != 0 {
		m.receive()
	}
	return fds[1].Revents == 0
}

// receive handles one message, and reports whether there was any.
func (m *ServiceManager) receive() bool {
	const bufferMax, fdMax = 4096, 768 // NOTIFY_BUFFER_MAX, NOTIFY_FD_MAX
	b, control := make([]byte, bufferMax), make([]byte, unix.CmsgSpace(unix.SizeofUcred)+unix.CmsgSpace(4*fdMax))
	n, controlLen, flags, _, err := unix.Recvmsg(m.socket, b, control, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return false
	}
	var fds []int
	sender := 0
	messages, _ := unix.ParseSocketControlMessage(control[:controlLen])
	for i := range messages {
		if got, err := unix.ParseUnixRights(&messages[i]); err == nil {
			fds = append(fds, got...)
		} else if c, err := unix.ParseUnixCredentials(&messages[i]); err == nil {
			sender = int(c.Pid)
		}
	}
	defer func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}()
	text := string(b[:n])
	switch {
	case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0:
		m.warn("the message is too long")
		return true
	case n == 0 || strings.ContainsRune(text[:n-1], 0):
		m.warn("the message has a zero byte")
		return true
	case sender != m.pid:
		m.warn("the sender is not the main process")
		return true
	}
	tags := strings.Split(strings.TrimSuffix(text, "\x00"), "\n")
	if slices.Contains(tags, "BARRIER=1") {
		if len(tags) != 1 || len(fds) != 1 {
			m.warn("BARRIER=1 is not alone, or without its descriptor")
		}
		return true
	}
	name, named := "", false
	for _, tag := range tags {
		if value, ok := strings.CutPrefix(tag, "FDNAME="); ok && !named {
			name, named = value, true
		}
	}
	valid := named && len(name) <= 255 && !strings.ContainsFunc(name, func(r rune) bool { return r < ' ' || r >= 127 || r == ':' })
	if slices.Contains(tags, "FDSTOREREMOVE=1") {
		if !valid {
			m.warn("FDSTOREREMOVE=1 without a name")
		} else {
			m.keepOnly(func(s stored) bool { return s.name != name })
		}
	}
	if slices.Contains(tags, "FDSTORE=1") {
		if named && !valid {
			m.warn("the name is not valid")
		}
		if !valid {
			name = "stored"
		}
		for len(fds) > 0 && m.store(name, fds[0], !slices.Contains(tags, "FDPOLL=0")) {
			fds = fds[1:]
		}
	}
	for _, tag := range tags {
		if !strings.HasPrefix(tag, "FD") {
			m.state = append(m.state, tag)
		}
	}
	return true
}

func (m *ServiceManager) warn(text string) { m.warnings = append(m.warnings, text) }

// store takes fd unless the store is full.
func (m *ServiceManager) store(name string, fd int, poll bool) bool {
	if len(m.stored) >= m.max {
		m.warn("cannot store more fds than FileDescriptorStoreMax, closing remaining")
		return false
	}
	self := uintptr(os.Getpid())
	for _, s := range m.stored {
		if r, _, errno := unix.Syscall6(unix.SYS_KCMP, self, self, 0, uintptr(s.fd), uintptr(fd), 0); errno == 0 && r == 0 {
			unix.Close(fd) // whatever its name
			return true
		}
	}
	m.stored = append([]stored{{name, fd, poll}}, m.stored...)
	return true
}
