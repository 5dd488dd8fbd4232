package handover

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// sendTimeout bounds how long a send waits for a manager that does not read.
const sendTimeout = time.Second

// removeInterval is how often Remove is tried again.
const removeInterval = time.Second

// Manager is who started this process and keeps descriptors for the next: systemd, or a Keeper. Its methods are safe for
// concurrent use, and do nothing if it is nil.
type Manager struct {
	// Limit is how many descriptors it keeps at most; -1 if it does not say (systemd before 254).
	Limit int
	// Watchdog is the time without WATCHDOG=1 after which it ends the process (WatchdogSec=); 0 is never.
	Watchdog time.Duration
	// Broker is the socket to the broker (internal/broker), which the caller owns; -1: there is none.
	Broker int

	fd     int
	to     unix.Sockaddr // nil: fd is connected
	socket string        // NOTIFY_SOCKET

	mu       sync.Mutex
	names    map[string]int // how many descriptors it keeps under each name
	removals []string       // names that Remove could not send
}

// Open returns the manager of this process, nil if there is none, and the descriptors that it
// kept, which are the caller's. It takes the variables of the protocol out of the environment, so
// that a second call finds none. After an error, too, what it returns can be used.
func Open() (*Manager, Kept, error) {
	defer func() {
		for _, name := range environment {
			_ = os.Unsetenv(name)
		}
	}()
	m := &Manager{Limit: -1, Broker: -1, fd: -1, names: map[string]int{}}
	if n, err := strconv.Atoi(os.Getenv(limitEnv)); err == nil && n >= 0 {
		m.Limit = n
	}
	m.Watchdog = watchdog(os.Getenv)
	kept, err := adopt()
	if fds := kept.Take(KeeperName); len(fds) > 0 {
		m.fd = fds[0]
		closeAll(fds[1:])
	} else if socket := os.Getenv(notifyEnv); socket != "" {
		m.socket = socket
		err = errors.Join(err, m.dial(socket))
	}
	if m.fd < 0 {
		return nil, kept, err
	}
	if fds := kept.Take(BrokerName); len(fds) > 0 {
		m.Broker = fds[0]
		closeAll(fds[1:])
	}
	for name, fds := range kept {
		m.names[name] = len(fds)
	}
	timeout := unix.NsecToTimeval(sendTimeout.Nanoseconds())
	if failed := unix.SetsockoptTimeval(m.fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &timeout); failed != nil {
		err = errors.Join(err, os.NewSyscallError("setsockopt SO_SNDTIMEO", failed))
	}
	return m, kept, err
}

// adopt returns the descriptors of LISTEN_FDS.
func adopt() (Kept, error) {
	kept := Kept{}
	names, err := inherited(os.Getenv)
	if err != nil {
		return kept, err
	}
	// Descriptors that this process opened are close-on-exec, inherited ones are not. If one was not
	// inherited the variables are not for this process, and none may be closed.
	for i := range names {
		flags, err := unix.FcntlInt(uintptr(firstFD+i), unix.F_GETFD, 0)
		if err != nil || flags&unix.FD_CLOEXEC != 0 {
			return kept, fmt.Errorf("%s=%d, and descriptor %d was not given to this process", countEnv, len(names), firstFD+i)
		}
	}
	for i, name := range names {
		unix.CloseOnExec(firstFD + i)
		kept[name] = append(kept[name], firstFD+i)
	}
	return kept, nil
}

// dial opens a socket to send to the service manager's, whose address is a path or @name. It is not
// connected: the service manager may replace its socket.
func (m *Manager) dial(socket string) (err error) {
	if socket[0] != '/' && socket[0] != '@' {
		return fmt.Errorf("%s=%.60q: want a path, or @name", notifyEnv, socket)
	}
	m.to = &unix.SockaddrUnix{Name: socket}
	m.fd, err = unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	return os.NewSyscallError("socket", err)
}

// Environment returns the variables by which Open finds the service manager again in a program that this process
// executes in place of itself (execve(2)).
func (m *Manager) Environment() []string {
	if m == nil || m.socket == "" {
		return nil
	}
	return append([]string{notifyEnv + "=" + m.socket}, WatchdogEnvironment(m.Watchdog)...)
}

// Abstract reports whether it sends to a socket in the abstract namespace.
func (m *Manager) Abstract() bool {
	if m == nil {
		return false
	}
	to, ok := m.to.(*unix.SockaddrUnix)
	return ok && to != nil && to.Name[0] == '@'
}

// Notify sends a message without descriptors: READY=1, STATUS=text and the like.
func (m *Manager) Notify(text string) error {
	if m == nil {
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.sendLocked(text)
}

// sendLocked sends a message, after the removals that could not be sent.
func (m *Manager) sendLocked(text string, fds ...int) error {
	if err := m.sendRemovals(); err != nil {
		return err
	}
	return m.sendmsg(text, fds...)
}

func (m *Manager) sendRemovals() error {
	for len(m.removals) > 0 {
		if err := m.sendmsg("FDSTOREREMOVE=1\nFDNAME=" + m.removals[0]); err != nil {
			return err
		}
		m.removals = m.removals[1:]
	}
	return nil
}

func (m *Manager) sendmsg(text string, fds ...int) error {
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	for end := time.Now().Add(sendTimeout); ; {
		switch err := unix.Sendmsg(m.fd, []byte(text), rights, m.to, unix.MSG_NOSIGNAL); {
		case err == unix.EINTR:
		case err == unix.ETOOMANYREFS && time.Now().Before(end):
			// Without CAP_SYS_RESOURCE only RLIMIT_NOFILE descriptors may be in flight: wait for
			// the manager to read some.
			time.Sleep(time.Millisecond)
		default:
			return os.NewSyscallError("sendmsg", err)
		}
	}
}

// Store gives the manager descriptors to keep under a name, beside those that it has under it. They
// stay the caller's. The manager must not poll them (FDPOLL=0): systemd closes a socket on POLLERR,
// which any ICMP error for it raises.
func (m *Manager) Store(name string, fds ...int) error {
	if m == nil {
		return nil
	}
	if err := checkName(name); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if total, bytes := m.size(); m.Limit >= 0 && total+len(fds) > m.Limit {
		if m.to == nil {
			return fmt.Errorf("ipipd keep keeps %d descriptors, which are %d too few: raise the limit of open files (ulimit -n) that it is started with", m.Limit, total+len(fds)-m.Limit)
		}
		return fmt.Errorf("the service manager keeps %d descriptors, which are too few: want FileDescriptorStoreMax=%d or more", m.Limit, total+len(fds))
	} else if bytes+len(fds)*(len(name)+1) > maxNames {
		return fmt.Errorf("%d descriptors are kept, and no more have room in %s", total, namesEnv)
	}
	for len(fds) > 0 {
		n := min(len(fds), MaxRights)
		if err := m.sendLocked("FDSTORE=1\nFDPOLL=0\nFDNAME="+name, fds[:n]...); err != nil {
			return err
		}
		m.names[name] += n
		fds = fds[n:]
	}
	return nil
}

// size returns how many descriptors the manager keeps, and how many bytes their names take in LISTEN_FDNAMES.
func (m *Manager) size() (total, bytes int) {
	for name, n := range m.names {
		total, bytes = total+n, bytes+n*(len(name)+1)
	}
	return total, bytes
}

// Remove has the manager close what it keeps under a name. After an error it is tried again, each second and before any
// other message: a socket that stays open would keep its port.
func (m *Manager) Remove(name string) error {
	if m == nil || checkName(name) != nil {
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.names, name)
	tried := len(m.removals) > 0
	m.removals = append(m.removals, name)
	err := m.sendRemovals()
	if err != nil && !tried {
		time.AfterFunc(removeInterval, m.removeAgain)
	}
	return err
}

func (m *Manager) removeAgain() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.sendRemovals() != nil {
		time.AfterFunc(removeInterval, m.removeAgain)
	}
}

// Discard closes the descriptors that nobody has taken of kept, here and at the manager.
func (m *Manager) Discard(kept Kept) (err error) {
	for _, name := range kept.Names() {
		err = errors.Join(err, m.Remove(name))
		closeAll(kept.Take(name))
	}
	return err
}

// Sync waits until the manager has read all that was sent, or until the timeout.
func (m *Manager) Sync(timeout time.Duration) error {
	if m == nil {
		return nil
	}
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		return os.NewSyscallError("pipe2", err)
	}
	defer unix.Close(pipe[0])
	m.mu.Lock()
	err := m.sendLocked("BARRIER=1", pipe[1])
	m.mu.Unlock()
	unix.Close(pipe[1])
	if err != nil {
		return err
	}
	// The manager closes its end when it comes to the message, which raises POLLHUP here.
	fds := []unix.PollFd{{Fd: int32(pipe[0])}}
	for end := time.Now().Add(timeout); ; {
		left := time.Until(end)
		if left <= 0 {
			return fmt.Errorf("the service manager has not read what it was sent: %w", os.ErrDeadlineExceeded)
		}
		if n, err := unix.Poll(fds, int(left.Milliseconds())+1); n > 0 {
			return nil
		} else if err != nil && err != unix.EINTR {
			return os.NewSyscallError("poll", err)
		}
	}
}

func closeAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
}
