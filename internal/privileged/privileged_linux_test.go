package privileged

import (
	"testing"

	"golang.org/x/sys/unix"
)

// Messages left of an earlier answer are not taken for the answer to this request.
func TestExchange_staleAnswer(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[1])
	Use(pair[0])
	defer func() {
		parent.Store(nil)
		unix.Close(pair[0])
	}()
	ended := make(chan error, 1)
	go func() {
		b := make([]byte, MaxMessage)
		if _, _, err := Receive(pair[1], b); err != nil {
			ended <- err
			return
		}
		now := Sequence(b)
		for _, m := range [][]byte{
			append(Header(Part, now-1), "old"...), Header(Done, now-1), {Done}, append(Header(Part, now), "new"...), Header(Done, now),
		} {
			if err := Send(pair[1], m, -1); err != nil {
				ended <- err
				return
			}
		}
		ended <- nil
	}()
	var got string
	if err := Exchange(unix.NETLINK_ROUTE, -1, []byte("request"), func(b []byte) { got += string(b) }); err != nil || got != "new" {
		t.Errorf("%q, %v", got, err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// Receive tries again where memory is short (ENOMEM, ENOBUFS): without the answer a socket that the parent has bound
// would be taken for one that is not bound.
func TestReceive_noMemory(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	failures := []error{unix.ENOMEM, unix.ENOBUFS, unix.EINTR, unix.ENOMEM}
	recvmsg = func(fd int, b, control []byte, flags int) (int, int, int, unix.Sockaddr, error) {
		if len(failures) > 0 {
			err := failures[0]
			failures = failures[1:]
			return 0, 0, 0, nil, err
		}
		return unix.Recvmsg(fd, b, control, flags)
	}
	defer func() { recvmsg = unix.Recvmsg }()
	if err := Send(pair[1], []byte("answer"), -1); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, MaxMessage)
	if n, fd, err := Receive(pair[0], b); string(b[:n]) != "answer" || fd >= 0 || err != nil || len(failures) > 0 {
		t.Errorf("%q, descriptor %d, %v", b[:n], fd, err)
	}
}
