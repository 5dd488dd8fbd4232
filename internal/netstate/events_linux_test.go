package netstate

import (
	"testing"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// A message that somebody else than the Host's goroutine has read wakes it, if the goroutine has something to do for it:
// the socket has nothing more to read.
func TestHost_wakeIfMarked(t *testing.T) {
	h := newHost(Options{})
	var err error
	if h.waker, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(h.waker)
	woken := func() bool {
		var b [8]byte
		n, _ := unix.Read(h.waker, b[:])
		return n == len(b)
	}
	h.wakeIfMarked()
	if woken() {
		t.Error("it is woken for nothing")
	}
	for _, kind := range []uint16{nl.XFRM_MSG_NEWPOLICY, nl.XFRM_MSG_EXPIRE} {
		h.stale = 0
		h.handle(unix.NETLINK_XFRM, message{kind: kind})
		h.wakeIfMarked()
		if want := kind == nl.XFRM_MSG_NEWPOLICY; woken() != want {
			t.Errorf("message %#x: it is woken: %v", kind, !want)
		}
	}
}
