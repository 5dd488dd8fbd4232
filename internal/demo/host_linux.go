package demo

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"ipipd/internal/control"
	"ipipd/internal/lab"
	"ipipd/internal/tunnel"
)

// host is a namespace with one `ipipd up`.
type host struct {
	name       string
	namespace  *lab.Namespace
	runtimeDir string
	up         *exec.Cmd // nil if it has not started
	log        log
	exited     chan struct{}
	err        error // of Wait, once exited is closed
	signalled  bool  // it was told to end
}

// log is the output of a process.
type log struct {
	lock  sync.Mutex
	bytes bytes.Buffer
}

func (l *log) Write(b []byte) (int, error) {
	l.lock.Lock()
	defer l.lock.Unlock()
	return l.bytes.Write(b)
}

// last returns the last line.
func (l *log) last() string {
	l.lock.Lock()
	defer l.lock.Unlock()
	lines := strings.Split(strings.TrimSpace(l.bytes.String()), "\n")
	return lines[len(lines)-1]
}

// start runs `ipipd up` on the host.
func (h *host) start(args ...string) error {
	h.up = ipipd(context.Background(), append([]string{"up", "--runtime-dir", h.runtimeDir}, args...)...)
	h.up.Stdout, h.up.Stderr = &h.log, &h.log
	// A killed demo must leave no tunnel running; and a Ctrl-C is for the demo alone, which ends them in order.
	h.up.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM, Setpgid: true}
	started := make(chan error)
	h.exited = make(chan struct{})
	go func() { // Pdeathsig is sent when the parent thread ends, so keep it
		runtime.LockOSThread()
		err := h.namespace.Start(h.up)
		started <- err
		if err == nil {
			h.err = h.up.Wait()
		}
		close(h.exited)
	}()
	err := <-started
	if err != nil {
		h.up = nil
	}
	return err
}

// status asks the process for the status of a tunnel.
func (h *host) status(name string) (s tunnel.Status, err error) {
	err = control.Status(h.runtimeDir, name, time.Second, &s)
	return s, err
}

// awaitReady waits until the tunnel is ready.
func (h *host) awaitReady(ctx context.Context, name string) error {
	for {
		if _, err := h.status(name); err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("host %s: the tunnel did not come up: %s", h.name, h.log.last())
		case <-h.exited:
			return fmt.Errorf("host %s: ipipd up: %s", h.name, h.log.last())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// signal tells the process to end, as systemd would. It does so once: a second SIGTERM kills a process that is ending.
func (h *host) signal() {
	if h.up != nil && !h.signalled {
		h.signalled = true
		_ = h.up.Process.Signal(syscall.SIGTERM)
	}
}

// stop waits for the end of the process, and kills it if that takes too long.
func (h *host) stop() error {
	if h.up == nil {
		return nil
	}
	h.signal()
	select {
	case <-h.exited:
	case <-time.After(10 * time.Second):
		_ = h.up.Process.Kill()
		<-h.exited
		return fmt.Errorf("host %s: ipipd did not end: %s", h.name, h.log.last())
	}
	if h.err != nil {
		return fmt.Errorf("host %s: ipipd did not end cleanly: %w: %s", h.name, h.err, h.log.last())
	}
	return nil
}
