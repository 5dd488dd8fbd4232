package main

import (
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const notifyEnv = "NOTIFY_SOCKET"

// notifier tells the service manager about the process: sd_notify(3), a datagram a message. It is
// nil if nobody is to be told. (go-systemd's sends no descriptors, for which this is the socket.)
type notifier struct {
	address *net.UnixAddr
	log     *slog.Logger

	mu     sync.Mutex // a message after the other
	status string     // the last one
}

// newNotifier reads NOTIFY_SOCKET, and unsets it: no child is to speak for this process.
func newNotifier(log *slog.Logger) *notifier {
	name := os.Getenv(notifyEnv)
	os.Unsetenv(notifyEnv)
	switch {
	case name == "":
		return nil
	case name[0] != '/' && name[0] != '@': // the latter is abstract, for package net too
		log.Warn("the service manager is not told of this process", notifyEnv, name, "want", "a path, or @name")
		return nil
	}
	return &notifier{address: &net.UnixAddr{Name: name, Net: "unixgram"}, log: log}
}

// ready is after the start, and after a reload, whether it has failed or not.
func (n *notifier) ready() { n.send("READY=1") }

// reloading is followed by ready.
func (n *notifier) reloading() {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return
	}
	n.send(fmt.Sprintf("RELOADING=1\nMONOTONIC_USEC=%d", now.Nano()/1000))
}

func (n *notifier) stopping() { n.send("STOPPING=1") }

// say has `systemctl status` show a line.
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
	c, err := net.DialUnix(n.address.Net, nil, n.address)
	if err == nil {
		defer c.Close()
		_ = c.SetWriteDeadline(time.Now().Add(time.Second)) // its queue may be full
		_, err = c.Write([]byte(message))
	}
	if err != nil {
		n.log.Warn("cannot tell the service manager of this process", "err", err)
	}
}
