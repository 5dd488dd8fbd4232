package underlay

import (
	"os"

	"ipipd/internal/fdguard"
)

// watcher implements the methods of Watcher: the file descriptors that a Receiver waits for
// besides its own socket.
type watcher struct {
	socket   *socket
	epollSet fdguard.EpollSet
}

func (w *watcher) Watch(fd int, key int32) error {
	defer w.socket.guard.Release()
	if !w.socket.guard.Acquire() {
		return os.ErrClosed
	}
	return w.epollSet.Add(fd, key)
}

func (w *watcher) Unwatch(fd int) error {
	defer w.socket.guard.Release()
	if !w.socket.guard.Acquire() {
		return os.ErrClosed
	}
	return w.epollSet.Remove(fd)
}

func (w *watcher) Ready() (key int32, ok bool) {
	defer w.socket.guard.Release()
	if !w.socket.guard.Acquire() {
		return 0, false
	}
	return w.epollSet.Ready()
}
