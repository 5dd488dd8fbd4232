package fdguard

import (
	"encoding/binary"
	"errors"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/test/netlab"
)

// rawTest is a RawSocket of protocol 253 (RFC 3692) in a namespace of its own, whose open
// fails while exhausted.
type rawTest struct {
	*RawSocket
	ns        *netlab.NS
	exhausted bool
	opened    []int
	sender    int
}

var loopback1, loopback2, loopback3 = [4]byte{127, 0, 0, 1}, [4]byte{127, 0, 0, 2}, [4]byte{127, 0, 0, 3}

func newRawTest(t *testing.T) *rawTest {
	t.Helper()
	r := &rawTest{ns: netlab.New(t)}
	r.ns.Run("ip", "link", "set", "lo", "up")
	var err error
	r.ns.Do(func() {
		if r.sender, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW); err != nil {
			return
		}
		r.RawSocket, err = OpenRaw(nil, r.open, r.close)
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, fd := range append(slices.Clone(r.opened), r.sender) {
			unix.Close(fd)
		}
	})
	return r
}

func (r *rawTest) open() (fd int, err error) {
	if r.exhausted {
		return -1, unix.EMFILE
	}
	r.ns.Do(func() { fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 253) })
	r.opened = append(r.opened, fd)
	return fd, err
}

func (r *rawTest) close(fd int) {
	r.opened = slices.DeleteFunc(r.opened, func(open int) bool { return open == fd })
	unix.Close(fd)
}

// change changes the Binding, and checks whether the socket is connected then.
func (r *rawTest) change(t *testing.T, to Binding, connected bool) {
	t.Helper()
	var err error
	r.ns.Do(func() { err = r.Change(to, func(int) error { return nil }) })
	if err != nil || r.Connected() != connected {
		t.Fatalf("change to %v: %v, connected is %v", to, err, r.Connected())
	}
}

// receives sends a packet for each ID, and checks which of them are received.
func (r *rawTest) receives(t *testing.T, send map[uint16][2][4]byte, want ...uint16) {
	t.Helper()
	r.send(t, send)
	r.queued(t, want...)
}

func (r *rawTest) send(t *testing.T, send map[uint16][2][4]byte) {
	t.Helper()
	for id, addresses := range send {
		p := make([]byte, 20)
		p[0], p[8], p[9] = 0x45, 64, 253
		binary.BigEndian.PutUint16(p[4:], id)
		copy(p[12:], addresses[0][:])
		copy(p[16:], addresses[1][:])
		if err := unix.Sendto(r.sender, p, 0, &unix.SockaddrInet4{Addr: addresses[1]}); err != nil {
			t.Fatal(err)
		}
	}
}

// queued checks the IDs of the packets that the socket has received.
func (r *rawTest) queued(t *testing.T, want ...uint16) {
	t.Helper()
	var got []uint16 // loopback has delivered what sendto has sent
	buf := make([]byte, 100)
	iov := unix.Iovec{Base: &buf[0]}
	iov.SetLen(len(buf))
	msgs := []Message{{Msghdr: unix.Msghdr{Iov: &iov}}}
	msgs[0].SetIovlen(1)
	for {
		n, err := r.Receive(msgs, nil)
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			break
		}
		got = append(got, binary.BigEndian.Uint16(buf[4:]))
	}
	if slices.Sort(got); !slices.Equal(got, want) {
		t.Errorf("received %v, want %v", got, want)
	}
}

func TestRawSocketChange(t *testing.T) {
	fromTo := map[uint16][2][4]byte{
		12: {loopback1, loopback2}, 13: {loopback1, loopback3},
		23: {loopback2, loopback3}, 32: {loopback3, loopback2},
	}
	t.Run("spare", func(t *testing.T) {
		r := newRawTest(t)
		r.receives(t, fromTo)
		r.change(t, Binding{}, true)
		r.receives(t, fromTo, 12, 13, 23, 32)
		for range 3 {
			r.change(t, Binding{Local: loopback2, Remote: loopback1}, true)
			r.receives(t, fromTo, 12)
			r.change(t, Binding{Local: loopback3, Remote: loopback2}, true)
			r.receives(t, fromTo, 23)
		}
		r.change(t, Binding{Local: loopback3, Device: 1}, true)
		r.receives(t, fromTo, 13, 23)
		if len(r.opened) != 2 {
			t.Errorf("%d sockets are open, want one and a spare", len(r.opened))
		}
	})
	t.Run("no-descriptor-left", func(t *testing.T) {
		r := newRawTest(t)
		r.change(t, Binding{Local: loopback2, Remote: loopback1, Device: 1, Mark: 7}, true)
		r.exhausted = true
		for range 3 {
			r.change(t, Binding{Local: loopback3, Remote: loopback2}, false)
			r.receives(t, fromTo, 13, 23)
			r.change(t, Binding{Local: loopback2, Remote: loopback1}, false)
			r.receives(t, fromTo, 12, 32)
		}
		r.change(t, Binding{}, true)
		r.receives(t, fromTo, 12, 13, 23, 32)
		r.change(t, Binding{Local: loopback2, Remote: loopback1}, false)
		r.exhausted = false
		r.ns.Do(r.Connect)
		if !r.Connected() {
			t.Error("it is not connected when there is a spare again")
		}
		r.receives(t, fromTo, 12)
	})
	// The socket in use stays.
	t.Run("error", func(t *testing.T) {
		r := newRawTest(t)
		r.change(t, Binding{Local: loopback2, Remote: loopback1}, true)
		failed := errors.New("failed")
		for range 3 {
			var err error
			r.ns.Do(func() { err = r.Change(Binding{Local: loopback3}, func(int) error { return failed }) })
			if !errors.Is(err, failed) {
				t.Fatal(err)
			}
			r.receives(t, fromTo, 12)
		}
		if len(r.opened) > 2 {
			t.Errorf("%d sockets are open", len(r.opened))
		}
	})
}

// Waiting for a raw socket, which is not connected, ends as well.
func TestInterrupt(t *testing.T) {
	r := newRawTest(t)
	ended := make(chan bool)
	go func() {
		Wait(r.FD())
		close(ended)
	}()
	Interrupt(r.FD())
	select {
	case <-ended:
	case <-time.After(netlab.Timeout()):
		t.Fatal("it waits on")
	}
}

// The RawSocket of the next process receives what the one before would have, queued packets
// included, and can be changed as that one could.
func TestOpenRaw_adopt(t *testing.T) {
	fromTo := map[uint16][2][4]byte{
		12: {loopback1, loopback2}, 13: {loopback1, loopback3},
		23: {loopback2, loopback3}, 32: {loopback3, loopback2},
	}
	adopt := func(t *testing.T, r *rawTest) {
		t.Helper()
		slices.Reverse(r.opened) // in any order
		s, err := OpenRaw(slices.Clone(r.opened), r.open, r.close)
		if err != nil {
			t.Fatal(err)
		}
		if len(r.opened) != 2 {
			t.Errorf("%d sockets are open, want one and a spare", len(r.opened))
		}
		r.RawSocket = s
	}
	for _, c := range []struct {
		name    string
		binding Binding
		want    []uint16
	}{
		{"any", Binding{}, []uint16{12, 13, 23, 32}},
		{"bound", Binding{Local: loopback3, Device: 1}, []uint16{13, 23}},
		{"connected", Binding{Local: loopback2, Remote: loopback1, Mark: 7}, []uint16{12}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRawTest(t)
			r.change(t, c.binding, true)
			for range 3 {
				before := r.FD()
				r.send(t, fromTo)
				adopt(t, r)
				if r.FD() != before || r.Binding() != c.binding || !r.Connected() {
					t.Errorf("%d bound to %+v, want %d to %+v", r.FD(), r.Binding(), before, c.binding)
				}
				r.change(t, c.binding, true) // nothing
				r.queued(t, c.want...)
			}
			for range 2 {
				r.change(t, Binding{Local: loopback3, Remote: loopback2}, true)
				r.receives(t, fromTo, 23)
				r.change(t, c.binding, true)
				r.receives(t, fromTo, c.want...)
			}
		})
	}
	t.Run("nothing", func(t *testing.T) {
		r := newRawTest(t) // never changed: both are spares
		adopt(t, r)
		r.receives(t, fromTo)
		r.change(t, Binding{Local: loopback3}, true)
		r.receives(t, fromTo, 13, 23)
	})
	// Killed while one socket took the place of another.
	t.Run("replaced", func(t *testing.T) {
		r := newRawTest(t)
		r.change(t, Binding{Local: loopback2, Remote: loopback1}, true)
		r.change(t, Binding{Local: loopback3, Remote: loopback2}, true)
		if len(r.opened) != 3 {
			t.Fatalf("%d sockets are open, want the one before, too", len(r.opened))
		}
		adopt(t, r)
		r.receives(t, fromTo, 23)
	})
	t.Run("no-descriptor-left", func(t *testing.T) {
		r := newRawTest(t)
		r.change(t, Binding{Local: loopback2, Remote: loopback1}, true)
		r.close(r.spare)
		r.exhausted = true
		if s, err := OpenRaw(slices.Clone(r.opened), r.open, r.close); !errors.Is(err, unix.EMFILE) || len(r.opened) > 0 {
			t.Errorf("%v, %v, %d sockets are open", s, err, len(r.opened))
		}
	})
}
