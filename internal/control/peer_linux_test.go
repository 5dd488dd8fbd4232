package control

import (
	"net"
	"os"
	"runtime"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Another user who gets at the socket, here since its mode was changed, gets no answer.
func TestTrustedPeer(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: to be another user")
	}
	dir := tempDir(t, 0o755)
	s := serve(t, dir, "ipip1")
	if err := os.Chmod(s.path, 0o666); err != nil {
		t.Fatal(err)
	}
	read := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with this goroutine
		if _, _, e := syscall.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), nobody, ^uintptr(0)); e != 0 {
			read <- e
			return
		}
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			err = unix.Connect(fd, &unix.SockaddrUnix{Name: s.path})
		}
		if err != nil {
			t.Errorf("connect: %v", err)
			read <- err
			return
		}
		f := os.NewFile(uintptr(fd), s.path)
		defer f.Close()
		c, err := net.FileConn(f)
		if err == nil {
			defer c.Close()
			c.SetDeadline(time.Now().Add(patience))
			_, _ = c.Write([]byte("GET /status?name=ipip1 HTTP/1.1\r\nHost: t\r\n\r\n"))
			_, err = c.Read(make([]byte, 1))
		}
		read <- err
	}()
	select {
	case err := <-read:
		if err == nil {
			t.Error("it was answered")
		}
	case <-time.After(patience):
		t.Error("it is not disconnected")
	}
	var got status
	if err := Status(dir, "ipip1", patience, &got); err != nil {
		t.Errorf("our own user: %v", err)
	}
}
