package fdguard

import (
	"testing"

	"golang.org/x/sys/unix"
)

// Wake ends waits, also later ones, and does not shut the socket down, which another process may have.
func TestWaker(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	w, err := NewWaker()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.Wait(pair[0])
	}()
	w.Wake()
	<-done
	w.Wait(pair[0])
	if _, err := unix.Write(pair[1], []byte("x")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 2)
	if n, err := unix.Read(pair[0], b); n != 1 || err != nil {
		t.Errorf("%d bytes are read: %v", n, err)
	}
}
