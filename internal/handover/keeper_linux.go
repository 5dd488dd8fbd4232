package handover

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"ipipd/internal/privileged"
)

// Keeper keeps the descriptors of its child while one child takes the place of another. One
// goroutine at a time uses it. It trusts no child: what one sends is bounded, and what is refused
// is closed.
type Keeper struct {
	limit  int
	socket int // the Keeper's end of the pair with the child; -1: there is none
	kept   []descriptor
	files  map[string][]int // the descriptors of kept by name, in the order of compare
	names  int              // the bytes of their names in LISTEN_FDNAMES

	compare func(a, b int) int // compareFiles except in a test

	buf, control []byte
}

type descriptor struct {
	name string
	fd   int
}

// Event is what a message of the child says.
type Event struct {
	// Ready: it has started (READY=1).
	Ready bool
	// Alive: it resets its watchdog (WATCHDOG=1).
	Alive bool
	// Stopping: it is ending, and sends no WATCHDOG=1 any more (STOPPING=1).
	Stopping bool
	// State is for a manager of the keeper: "" or lines of sd_notify(3) such as STATUS=text.
	State string
}

// RefusedError means that a message of the child, or a part of it, is not accepted. Receive can be called again.
type RefusedError struct{ err error }

func (e *RefusedError) Error() string {
	return "what the process has sent is not kept: " + e.err.Error()
}
func (e *RefusedError) Unwrap() error { return e.err }

// NewKeeper returns a Keeper for at most limit descriptors.
func NewKeeper(limit int) *Keeper {
	return &Keeper{limit: limit, socket: -1, files: map[string][]int{}, compare: compareFiles,
		buf: make([]byte, maxMessage+1), control: make([]byte, unix.CmsgSpace(MaxRights*4))}
}

// Begin makes the socket pair with the next child. It returns the child's descriptors, to be given
// to it from 3 on, in this order, and the variables of its environment. The caller closes the first
// descriptor, the child's end of the pair, once the child has it; the others stay the Keeper's, but for the last,
// broker, which stays the caller's: the child gets it under BrokerName, unless it is -1.
func (k *Keeper) Begin(broker int) (fds []int, environment []string, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	k.socket, fds = pair[0], []int{pair[1]}
	names := []string{KeeperName}
	for _, d := range k.kept {
		fds, names = append(fds, d.fd), append(names, d.name)
	}
	if broker >= 0 {
		fds, names = append(fds, broker), append(names, BrokerName)
	}
	return fds, []string{
		countEnv + "=" + strconv.Itoa(len(fds)),
		namesEnv + "=" + strings.Join(names, ":"),
		limitEnv + "=" + strconv.Itoa(k.limit),
	}, nil
}

// Environment returns all without the variables of the protocol.
func Environment(all []string) (rest []string) {
next:
	for _, variable := range all {
		for _, name := range environment {
			if strings.HasPrefix(variable, name+"=") {
				continue next
			}
		}
		rest = append(rest, variable)
	}
	return rest
}

// Receive waits for a message of the child. It fails with io.EOF when the child has closed its end
// or after Interrupt, or with *RefusedError; after any other error it must not be called again.
func (k *Keeper) Receive() (e Event, err error) {
	n, controlLen, flags, err := k.recvmsg()
	if err != nil {
		return e, err
	}
	fds := privileged.Rights(k.control[:controlLen])
	defer func() { closeAll(fds) }()
	switch {
	case flags&unix.MSG_CTRUNC != 0:
		return e, &RefusedError{errors.New("there is no descriptor left for those that it has sent (EMFILE)")}
	case n == 0 && len(fds) == 0:
		return e, io.EOF
	}
	m, err := parseMessage(k.buf[:n])
	if err != nil {
		return e, &RefusedError{err}
	}
	if m.remove {
		k.remove(m.name)
	}
	for m.store && len(fds) > 0 && err == nil {
		var kept bool
		if kept, err = k.keep(m.name, fds[0]); kept {
			fds = fds[1:]
		} else if err == nil {
			closeAll(fds[:1])
			fds = fds[1:]
		}
	}
	if err != nil {
		err = &RefusedError{err}
	}
	return Event{Ready: m.ready, Alive: m.alive, Stopping: m.stopping, State: strings.Join(m.state, "\n")}, err
}

func (k *Keeper) recvmsg() (n, controlLen, flags int, err error) {
	for {
		n, controlLen, flags, _, err = unix.Recvmsg(k.socket, k.buf, k.control, unix.MSG_CMSG_CLOEXEC)
		switch err {
		case unix.EINTR, unix.ECONNRESET: // the latter comes once, before messages that are still to be read
		default:
			return n, controlLen, flags, os.NewSyscallError("recvmsg", err)
		}
	}
}

// keep keeps fd, unless the Keeper has that descriptor under that name already.
func (k *Keeper) keep(name string, fd int) (kept bool, err error) {
	at, have := slices.BinarySearchFunc(k.files[name], fd, k.compare)
	switch {
	case have:
		return false, nil
	case name == KeeperName, name == BrokerName:
		return false, fmt.Errorf("the name %s is taken", name)
	case len(k.kept) >= k.limit:
		return false, fmt.Errorf("it has %d descriptors kept, and no more are: raise the limit of open files (ulimit -n)", len(k.kept))
	case k.names+len(name)+1 > maxNames-len(KeeperName)-len(BrokerName)-2:
		return false, fmt.Errorf("it has %d descriptors kept, and no more have room in %s", len(k.kept), namesEnv)
	}
	k.kept, k.names = append(k.kept, descriptor{name, fd}), k.names+len(name)+1
	k.files[name] = slices.Insert(k.files[name], at, fd)
	return true, nil
}

// compareFiles orders descriptors by their open files, as kcmp(2) does: 0 means one open file. If kcmp fails, a counts
// as less than b.
func compareFiles(a, b int) int {
	const kcmpFile, less = 0, 1
	pid := uintptr(unix.Getpid())
	switch r, _, errno := unix.Syscall6(unix.SYS_KCMP, pid, pid, kcmpFile, uintptr(a), uintptr(b), 0); {
	case errno != 0 || r == less:
		return -1
	default:
		return min(int(r), 1)
	}
}

func (k *Keeper) remove(name string) {
	delete(k.files, name)
	rest := k.kept[:0]
	for _, d := range k.kept {
		if d.name == name {
			k.names -= len(name) + 1
			_ = unix.Close(d.fd)
		} else {
			rest = append(rest, d)
		}
	}
	k.kept = rest
}

// Len returns how many descriptors are kept.
func (k *Keeper) Len() int { return len(k.kept) }

// Interrupt makes Receive return io.EOF after the messages that are queued: the child has ended, and a
// process that has inherited its end of the pair can send no more. It may be called during Receive.
func (k *Keeper) Interrupt() { _ = unix.Shutdown(k.socket, unix.SHUT_RD) }

// End closes the pair with a child.
func (k *Keeper) End() {
	if k.socket >= 0 {
		_ = unix.Close(k.socket)
	}
	k.socket = -1
}

// Close closes the pair, and all descriptors that are kept.
func (k *Keeper) Close() {
	k.End()
	for _, d := range k.kept {
		_ = unix.Close(d.fd)
	}
	k.kept, k.names = nil, 0
	clear(k.files)
}
