package underlay

import (
	"os"

	"ipipd/internal/fdguard"
)

// watch is what a Receiver waits for besides its socket.
type watch struct {
	socket *socket
	others fdguard.EpollSet
}

func (w *watch) Watch(fd int, key int32) error {
	defer w.socket.guard.Release()
	if !w.socket.guard.Acquire() {
		return os.ErrClosed
	}
	return w.others.Add(fd, key)
}

func (w *watch) Unwatch(fd int) error {
	defer w.socket.guard.Release()
	if !w.socket.guard.Acquire() {
		return os.ErrClosed
	}
	return w.others.Remove(fd)
}

func (w *watch) Ready() (key int32, ok bool) {
	defer w.socket.guard.Release()
	if !w.socket.guard.Acquire() {
		return 0, false
	}
	return w.others.Ready()
}
