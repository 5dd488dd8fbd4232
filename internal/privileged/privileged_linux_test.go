package privileged

import (
	"testing"

	"golang.org/x/sys/unix"
)

// What is left of an answer that could not be read is not taken for the next one.
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
