package fdguard

import (
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pipe returns a Group of both ends of a pipe. released reports whether they were closed
// exactly once.
func pipe(t *testing.T) (g *Group, r, w int, released func() bool) {
	t.Helper()
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		t.Fatal(os.NewSyscallError("pipe2", err))
	}
	var times int
	g = New(nil, func() {
		times++
		unix.Close(fds[0])
		unix.Close(fds[1])
	})
	return g, fds[0], fds[1], func() bool { return times == 1 }
}

func TestGroupClose_endsWait(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	r, times := pair[0], 0
	g := New(func() { Interrupt(r) }, func() {
		times++
		unix.Close(pair[0])
		unix.Close(pair[1])
	})
	released := func() bool { return times == 1 }
	acquired, done := make(chan bool), make(chan bool)
	go func() {
		defer close(done)
		defer g.Release()
		acquired <- g.Acquire()
		for !g.Closed() {
			Wait(r)
		}
		if released() {
			t.Error("released while a call was in flight")
		}
	}()
	if !<-acquired {
		t.Fatal("Acquire failed on an open Group")
	}
	time.Sleep(20 * time.Millisecond) // most likely it waits by now
	g.Close()
	if !released() {
		t.Error("Close returned before the file descriptors were closed")
	}
	<-done
}

func TestGroupAcquire_afterClose(t *testing.T) {
	g, _, _, released := pipe(t)
	for range 3 {
		g.Close()
	}
	if g.Acquire() {
		t.Error("Acquire succeeded")
	}
	g.Release()
	if !released() {
		t.Error("not released")
	}
}

func TestGroupClose_concurrentCalls(t *testing.T) {
	g, r, w, released := pipe(t)
	var users sync.WaitGroup
	for range 8 {
		users.Go(func() {
			for {
				ok := g.Acquire()
				if ok {
					if _, err := unix.FcntlInt(uintptr(r), unix.F_GETFD, 0); err != nil {
						t.Errorf("the file descriptor was closed during a call: %v", err)
					}
				}
				g.Release()
				if !ok {
					return
				}
			}
		})
	}
	unix.Write(w, []byte{1})
	Wait(r)
	g.Close()
	users.Wait()
	if !released() {
		t.Error("not released")
	}
}

// Only a high rate of small batches is delayed.
func TestModeration(t *testing.T) {
	const perRound = 16
	for _, tt := range []struct {
		name  string
		batch int           // of each Receive
		every time.Duration // interval between batches
		want  bool
	}{
		{"above the rate", perRound, perRound * time.Second / moderateAbove, true},
		{"above the rate, single packets", 1, time.Second / moderateAbove, true},
		{"above the rate, large batches", moderateBelowBatch, moderateBelowBatch * time.Second / moderateAbove, false},
		{"just below the rate", perRound, perRound*time.Second/moderateAbove + time.Microsecond, false},
		{"request-response", 1, 50 * time.Microsecond, false},
		{"bursts", moderateBelowBatch - 1, 2 * rateInterval, false},
		{"idle", 1, time.Hour, false},
	} {
		var m Moderation
		now := time.Now()
		got := 0
		const rounds = 1000
		for range rounds {
			m.Observe(tt.batch)
			if now = now.Add(tt.every); m.shouldDelay(now) {
				got++
			}
		}
		if began := int(rateInterval/tt.every) + 2; tt.want && got < rounds-began || !tt.want && got != 0 {
			t.Errorf("%s: %d of %d delayed", tt.name, got, rounds)
		}
		if m.Observe(1); m.shouldDelay(now.Add(time.Second)) {
			t.Errorf("%s: delayed after a second without messages", tt.name)
		}
	}
}

// only is the only event of events; anything else fails the test.
func only(t *testing.T, events []unix.EpollEvent) unix.EpollEvent {
	t.Helper()
	if len(events) != 1 {
		t.Fatalf("%d events: %v", len(events), events)
	}
	return events[0]
}

// await returns the events of the next Wait that has some: signals interrupt it.
func await(e *Epoll) (events []unix.EpollEvent) {
	for len(events) == 0 {
		events = e.Wait()
	}
	return events
}

func TestEpollWait(t *testing.T) {
	outer, err := NewEpoll()
	if err != nil {
		t.Fatal(err)
	}
	defer outer.Close()
	inner, err := NewEpoll()
	if err != nil {
		t.Fatal(err)
	}
	defer inner.Close()
	if err := outer.Add(inner.FD(), 5); err != nil {
		t.Fatal(err)
	}
	g, r, w, _ := pipe(t)
	if err := inner.Add(r, 3); err != nil {
		t.Fatal(err)
	}
	if events := inner.Poll(); len(events) != 0 {
		t.Errorf("ready already: %v", events)
	}
	// While it holds its P, and after it has given that away.
	for _, delay := range []time.Duration{busyPoll / 10, 2 * busyPoll} {
		time.AfterFunc(delay, func() { unix.Write(w, []byte{1}) })
		if e := only(t, await(outer)); int(e.Fd) != inner.FD() || e.Pad != 5 {
			t.Errorf("the outer set has %+v", e)
		}
		if e := only(t, inner.Poll()); int(e.Fd) != r || e.Pad != 3 {
			t.Errorf("the inner set has %+v", e)
		}
		unix.Read(r, make([]byte, 1))
	}
	unix.Write(w, []byte{1})
	if err := inner.Remove(r); err != nil {
		t.Error(err)
	}
	if events := inner.Poll(); len(events) != 0 {
		t.Errorf("ready after Remove: %v", events)
	}
	if err := inner.Add(r, 4); err != nil {
		t.Fatal(err)
	}
	g.Close() // removes it from the set
	if events := inner.Poll(); len(events) != 0 {
		t.Errorf("ready after its descriptor was closed: %v", events)
	}
	if inner.Add(r, 3) == nil {
		t.Error("a closed descriptor can be added")
	}
}

func TestEpollWait_hangup(t *testing.T) {
	e, err := NewEpoll()
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	g, r, w, _ := pipe(t)
	defer g.Close()
	if err := e.Add(r, 1); err != nil {
		t.Fatal(err)
	}
	unix.Close(w)
	if event := only(t, await(e)); event.Events&unix.EPOLLHUP == 0 {
		t.Errorf("EPOLLHUP is not reported: %#x", event.Events)
	}
}

// sysmon's preemption signals interrupt epoll_pwait: the remaining time must shrink all the
// same, until Wait blocks.
func TestEpollWait_interrupted(t *testing.T) {
	e, err := NewEpoll()
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	g, r, w, _ := pipe(t)
	defer g.Close()
	if err := e.Add(r, 1); err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(2*busyPoll, func() { unix.Write(w, []byte{1}) })
	var until time.Time
	for len(e.Wait()) == 0 {
		if !e.interrupted {
			continue // it may have blocked
		}
		if until.IsZero() {
			until = e.until
		}
		if e.until != until {
			t.Fatalf("an interruption has put off the end from %v to %v", until, e.until)
		}
	}
}

// receiver returns a Receiver on a UDP socket that is connected to a port of 127.0.0.1.
func receiver(t *testing.T, port int) (r *Receiver, fd int, g *Group) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	g = New(nil, func() { unix.Close(fd) })
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	return NewReceiver(fd), fd, g
}

func TestReceiverReceive(t *testing.T) {
	// Anybody can forge ICMP errors for a connected socket: they must not end Receive.
	t.Run("icmp-errors", func(t *testing.T) {
		r, fd, g := receiver(t, 9) // a closed port
		defer g.Close()
		reported := 0
		for end := time.Now().Add(time.Minute); reported < maxErrors+10; {
			_ = unix.Sendto(fd, []byte{1}, unix.MSG_DONTWAIT, nil) // or sendto returns the error
			n, err := r.Receive(make([]Message, 1), func(errno unix.Errno) {
				if reported++; errno != unix.ECONNREFUSED {
					t.Fatal(errno)
				}
			})
			if n != 0 || err != nil {
				t.Fatalf("Receive ended: %d, %v", n, err)
			}
			if time.Now().After(end) {
				t.Fatalf("only %d errors", reported)
			}
		}
	})
	t.Run("persistent-error", func(t *testing.T) {
		g, fd, _, _ := pipe(t) // no socket
		defer g.Close()
		r := NewReceiver(fd)
		began, times := time.Now(), 0
		var err error
		for err == nil && times <= maxErrors {
			_, err = r.Receive(make([]Message, 1), func(unix.Errno) { times++ })
		}
		if err == nil || times != maxErrors+1 {
			t.Errorf("%v after %d errors", err, times)
		}
		if elapsed := time.Since(began); elapsed < (maxErrors-1)*errorPause {
			t.Errorf("it gave up after %v", elapsed)
		}
	})
	// The receive queue of the old socket is drained before the switch.
	t.Run("replaced-socket", func(t *testing.T) {
		var fds [4]int
		for i := 0; i < 4; i += 2 {
			pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			copy(fds[i:], pair[:])
		}
		defer func() {
			for _, fd := range fds {
				unix.Close(fd)
			}
		}()
		r := NewReceiver(fds[0])
		var opened []int
		if err := r.Watch(func(fd int) error { opened = append(opened, fd); return nil }); err != nil {
			t.Fatal(err)
		}
		unix.Write(fds[1], []byte{1})
		unix.Write(fds[3], []byte{2, 2})
		retired := 0
		if err := r.Replace(fds[0], fds[2], func() { retired++ }); err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(opened, []int{fds[0], fds[2]}) {
			t.Errorf("watched %v of %v", opened, fds)
		}
		if err := r.Watch(func(fd int) error { opened = []int{fd}; return nil }); err != nil || !slices.Equal(opened, []int{fds[2]}) {
			t.Errorf("a later Watch has %v, %v", opened, err)
		}
		buf := make([]byte, 10)
		iov := unix.Iovec{Base: &buf[0]}
		iov.SetLen(len(buf))
		msgs := []Message{{Msghdr: unix.Msghdr{Iov: &iov}}}
		msgs[0].SetIovlen(1)
		for want := 1; want <= 2; want++ {
			if n, err := r.Receive(msgs, nil); n != 1 || err != nil || msgs[0].N != uint32(want) || retired != want-1 {
				t.Errorf("message %d: %d, %v, %d bytes, retired %d times", want, n, err, msgs[0].N, retired)
			}
		}
		if n, err := r.Receive(msgs, nil); n != 0 || err != nil {
			t.Errorf("without a message: %d, %v", n, err)
		}
	})
}
