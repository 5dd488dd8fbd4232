package handover

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"
	"time"
)

const (
	// KeeperName is the name of the socket by which a child reaches its Keeper.
	KeeperName = "ipipd-keeper"
	// BrokerName is the name of the socket by which a child reaches its broker (internal/broker).
	BrokerName = "ipipd-broker"
	// MaxRights is how many descriptors the kernel takes in a message (SCM_MAX_FD).
	MaxRights = 253
	// maxMessage is systemd's limit for a message, in bytes.
	maxMessage = 4096
	// maxName is systemd's limit for a name, in bytes.
	maxName = 255
	// maxNames bounds LISTEN_FDNAMES: execve(2) takes 128 KiB for a variable.
	maxNames = 128<<10 - len(namesEnv) - 2

	notifyEnv = "NOTIFY_SOCKET"
	countEnv  = "LISTEN_FDS"
	namesEnv  = "LISTEN_FDNAMES"
	pidEnv    = "LISTEN_PID"
	limitEnv  = "FDSTORE"
	usecEnv   = "WATCHDOG_USEC"
	ofEnv     = "WATCHDOG_PID"
	firstFD   = 3 // SD_LISTEN_FDS_START
)

// environment are the variables of the protocol: no child of the process is to have them.
var environment = []string{notifyEnv, countEnv, namesEnv, pidEnv, "LISTEN_PIDFDID", limitEnv, usecEnv, ofEnv}

// message is what a process tells its manager: sd_notify(3).
type message struct {
	store, remove, barrier, ready, alive, stopping bool
	name                                           string
	// state are the lines about the service, which a Keeper passes on to its own manager.
	state []string
}

// parseMessage reads a message as systemd does, except that it fails on a wrong name, which systemd
// ignores or replaces.
func parseMessage(b []byte) (m message, err error) {
	switch {
	case len(b) > maxMessage:
		return m, fmt.Errorf("it has %d bytes or more: want %d", len(b), maxMessage)
	case bytes.IndexByte(b, 0) >= 0:
		return m, errors.New("it has a zero byte")
	}
	named := false
	for line := range strings.Lines(string(b)) {
		line = strings.TrimSuffix(line, "\n")
		key, value, _ := strings.Cut(line, "=")
		switch key {
		case "FDNAME":
			if !named { // as systemd, the first one
				m.name, named = value, true
			}
		case "READY", "RELOADING", "STATUS", "MONOTONIC_USEC": // whether it stops is for the keeper to say
			m.ready = m.ready || line == "READY=1"
			m.state = append(m.state, line)
		default:
			m.store = m.store || line == "FDSTORE=1"
			m.remove = m.remove || line == "FDSTOREREMOVE=1"
			m.barrier = m.barrier || line == "BARRIER=1"
			m.alive = m.alive || line == "WATCHDOG=1"
			m.stopping = m.stopping || line == "STOPPING=1"
		}
	}
	if m.store || m.remove {
		err = checkName(m.name)
	}
	return m, err
}

// checkName is stricter than systemd, which without a name takes "stored", or ignores the request.
func checkName(name string) error {
	bad := func(r rune) bool { return r < ' ' || r >= 0x7f || r == ':' }
	if name == "" || len(name) > maxName || strings.ContainsFunc(name, bad) {
		return fmt.Errorf("the name %q of a descriptor: want 1 to %d characters of ASCII without colon", name[:min(len(name), 40)], maxName)
	}
	return nil
}

// watchdog returns WatchdogSec=, 0 if there is none, or if it is for another process.
func watchdog(getenv func(string) string) time.Duration {
	if pid := getenv(ofEnv); pid != "" && pid != strconv.Itoa(os.Getpid()) {
		return 0
	}
	usec, err := strconv.ParseInt(getenv(usecEnv), 10, 64)
	if err != nil || usec <= 0 || usec > math.MaxInt64/1000 {
		return 0
	}
	return time.Duration(usec) * time.Microsecond
}

// WatchdogEnvironment returns the variables that tell a child the timeout of its watchdog, none for 0.
func WatchdogEnvironment(timeout time.Duration) []string {
	if timeout <= 0 {
		return nil
	}
	return []string{usecEnv + "=" + strconv.FormatInt(timeout.Microseconds(), 10)}
}

// inherited returns the names of the descriptors from firstFD on, as the environment lists them; none
// if it is for another process.
func inherited(getenv func(string) string) (names []string, err error) {
	count := getenv(countEnv)
	// A Keeper cannot set LISTEN_PID: it would have to know the PID before the fork.
	if pid := getenv(pidEnv); count == "" || pid != "" && pid != strconv.Itoa(os.Getpid()) {
		return nil, nil
	}
	n, err := strconv.Atoi(count)
	names = strings.Split(getenv(namesEnv), ":")
	if err != nil || n < 0 || n != len(names) && n != 0 {
		return nil, fmt.Errorf("%s=%.20q with %d names in %s", countEnv, count, len(names), namesEnv)
	}
	return names[:n], nil
}
