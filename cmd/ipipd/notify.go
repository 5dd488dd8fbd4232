package main

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/internal/handover"
)

// beatsPerTimeout is how often a watchdog is reset within its timeout: two resets may be late.
const beatsPerTimeout = 3

// notifier tells the service manager about the process.
type notifier struct {
	manager *handover.Manager // nil: nobody is told
	kept    handover.Kept     // descriptors of the process before
	log     *slog.Logger

	mu     sync.Mutex // guards status
	status string     // the last one
}

// newNotifier finds the service manager, if it has started the process. It unsets its environment
// variables, so that no child notifies it in place of this process.
func newNotifier(log *slog.Logger) *notifier {
	manager, kept, err := handover.Open()
	if err != nil {
		log.Warn("what the service manager has passed cannot be used", "err", err)
	}
	return &notifier{manager: manager, kept: kept, log: log}
}

// keeps reports whether the process before has left something under that name.
func (n *notifier) keeps(name string) bool { return n != nil && len(n.kept[name]) > 0 }

// abstract reports whether the service manager's socket is in the abstract namespace.
func (n *notifier) abstract() bool { return n != nil && n.manager.Abstract() }

// discard closes the descriptors of the process before that are not used, here and at the service manager.
func (n *notifier) discard() {
	if n == nil {
		return
	}
	if err := n.manager.Discard(n.kept); err != nil {
		n.log.Warn("the service manager keeps descriptors of the process before, which are not used", "err", err)
	}
}

// ready reports the end of the start, or of a reload, also of one that has failed.
func (n *notifier) ready() { n.send("READY=1") }

// reloading reports the beginning of a reload; ready has to follow.
func (n *notifier) reloading() {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return
	}
	n.send(fmt.Sprintf("RELOADING=1\nMONOTONIC_USEC=%d", now.Nano()/1000))
}

// watchdog returns the time without WATCHDOG=1 after which the service manager ends this process; 0 is never.
func (n *notifier) watchdog() time.Duration {
	if n == nil || n.manager == nil {
		return 0
	}
	return n.manager.Watchdog
}

// watch resets the service manager's watchdog until ctx is done, as long as alive returns nil.
func (n *notifier) watch(ctx context.Context, alive func(within time.Duration) error) {
	timeout := n.watchdog()
	if timeout <= 0 {
		return
	}
	interval := timeout / beatsPerTimeout
	beat := time.NewTicker(interval)
	defer beat.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-beat.C:
		}
		if err := alive(interval); err != nil {
			n.log.Error("the service manager's watchdog is not told that this process lives", "err", err)
		} else {
			n.send("WATCHDOG=1")
		}
	}
}

func (n *notifier) stopping() { n.send("STOPPING=1") }

// say sets the line that `systemctl status` shows.
func (n *notifier) say(line string) { n.send("STATUS=" + strings.ReplaceAll(line, "\n", "; ")) }

func (n *notifier) send(message string) {
	if n == nil {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if strings.HasPrefix(message, "STATUS=") {
		if message == n.status {
			return
		}
		n.status = message
	}
	if err := n.manager.Notify(message); err != nil {
		n.log.Warn("cannot tell the service manager of this process", "err", err)
	}
}
