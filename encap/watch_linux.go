package encap

import (
	"os"

	"ipipd/internal/door"
)

// watch is what a Receiver waits for besides its socket.
type watch struct {
	socket *socket
	others door.Lookout
}

func (w *watch) Watch(fd int, key int32) error {
	defer w.socket.door.Leave()
	if !w.socket.door.Enter() {
		return os.ErrClosed
	}
	return w.others.Add(fd, key)
}

func (w *watch) Unwatch(fd int) error {
	defer w.socket.door.Leave()
	if !w.socket.door.Enter() {
		return os.ErrClosed
	}
	return w.others.Remove(fd)
}

func (w *watch) Ready() (key int32, ok bool) {
	defer w.socket.door.Leave()
	if !w.socket.door.Enter() {
		return 0, false
	}
	return w.others.Ready()
}
