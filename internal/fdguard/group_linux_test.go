package fdguard

import (
	"os"
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
	g, err := New(func() {
		times++
		unix.Close(fds[0])
		unix.Close(fds[1])
	})
	if err != nil {
		t.Fatal(err)
	}
	return g, fds[0], fds[1], func() bool { return times == 1 }
}

func TestGroupClose_wakesPollers(t *testing.T) {
	for _, wait := range []func(*Poller) bool{(*Poller).PollSpin, (*Poller).PollBlock} {
		g, r, _, released := pipe(t)
		poller := g.Poller(r)
		acquired, done := make(chan bool), make(chan bool)
		go func() {
			defer close(done)
			defer g.Release()
			acquired <- g.Acquire()
			for !g.Closed() {
				wait(&poller)
			}
			if released() {
				t.Error("released while a call was in flight")
			}
		}()
		if !<-acquired {
			t.Fatal("Acquire failed on an open Group")
		}
		time.Sleep(20 * time.Millisecond) // most likely it polls by now
		g.Close(nil)
		if !released() {
			t.Error("Close returned before the file descriptors were closed")
		}
		<-done
	}
}

func TestGroupAcquire_afterClose(t *testing.T) {
	g, _, _, released := pipe(t)
	woken := 0
	for range 3 {
		g.Close(func() { woken++ })
	}
	if g.Acquire() {
		t.Error("Acquire succeeded")
	}
	g.Release()
	if !released() || woken != 1 {
		t.Errorf("released %v, woken %d times", released(), woken)
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
	poller := g.Poller(r)
	if poller.PollSpin() {
		t.Error("PollSpin reports that the pipe is gone")
	}
	g.Close(nil)
	users.Wait()
	if !released() {
		t.Error("not released")
	}
}

func TestPoller_hangup(t *testing.T) {
	g, r, w, _ := pipe(t)
	unix.Close(w)
	poller := g.Poller(r)
	if !poller.PollSpin() || !poller.PollBlock() {
		t.Error("POLLHUP is not reported")
	}
	defer g.Close(nil)
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
		var m moderation
		now := time.Now()
		got := 0
		const rounds = 1000
		for range rounds {
			m.observe(tt.batch)
			if now = now.Add(tt.every); m.shouldDelay(now) {
				got++
			}
		}
		if began := int(rateInterval/tt.every) + 2; tt.want && got < rounds-began || !tt.want && got != 0 {
			t.Errorf("%s: %d of %d delayed", tt.name, got, rounds)
		}
		if m.observe(1); m.shouldDelay(now.Add(time.Second)) {
			t.Errorf("%s: delayed after a second without messages", tt.name)
		}
	}
}

func TestEpollSet(t *testing.T) {
	set, err := NewEpollSet()
	if err != nil {
		t.Fatal(err)
	}
	defer set.Close()
	own, r, _, _ := pipe(t)
	defer own.Close(nil)
	poller := own.Poller(r)
	poller.Watch(set)
	other, otherR, otherW, _ := pipe(t)
	if err := set.Add(otherR, 3); err != nil {
		t.Fatal(err)
	}
	if key, ok := set.Ready(); ok {
		t.Errorf("key %d is ready already", key)
	}
	for _, delay := range []time.Duration{busyPoll / 10, 2 * busyPoll} {
		time.AfterFunc(delay, func() { unix.Write(otherW, []byte{1}) })
		for poller.fds[2].Revents == 0 { // a signal may interrupt ppoll
			poller.PollSpin()
		}
		if key, ok := set.Ready(); !ok || key != 3 {
			t.Errorf("PollSpin returned, and Ready is %d, %v", key, ok)
		}
		unix.Read(otherR, make([]byte, 1))
		poller.fds[2].Revents = 0
	}
	other.Close(nil) // removes it from the set
	if key, ok := set.Ready(); ok {
		t.Errorf("key %d is ready after its descriptor was closed", key)
	}
	if set.Add(otherR, 3) == nil {
		t.Error("a closed descriptor can be added")
	}
}

// sysmon's preemption signals interrupt ppoll: the remaining busy-poll time must shrink all
// the same, until the Poller blocks.
func TestPollerPollSpin_interrupted(t *testing.T) {
	g, r, w, _ := pipe(t)
	defer g.Close(nil)
	poller := g.Poller(r)
	time.AfterFunc(2*busyPoll, func() { unix.Write(w, []byte{1}) })
	left := int64(busyPoll)
	for interruptions := 0; poller.fds[0].Revents == 0; {
		if poller.PollSpin(); !poller.interrupted {
			continue // it may have blocked
		}
		if interruptions++; poller.timeout.Nano() >= left {
			t.Fatalf("after %d interruptions %d ns are left, and %d were", interruptions, poller.timeout.Nano(), left)
		}
		left = poller.timeout.Nano()
	}
}

// receiver returns a Poller for a UDP socket that is connected to a port of 127.0.0.1.
func receiver(t *testing.T, port int) (p *Poller, fd int, g *Group) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if g, err = New(func() { unix.Close(fd) }); err != nil {
		t.Fatal(err)
	}
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	poller := g.Poller(fd)
	return &poller, fd, g
}

func TestPollerReceive(t *testing.T) {
	// Anybody can forge ICMP errors for a connected socket: they must not end Receive.
	t.Run("icmp-errors", func(t *testing.T) {
		p, fd, g := receiver(t, 9) // a closed port
		reported, ended := make(chan unix.Errno), make(chan error, 1)
		go func() {
			defer g.Release()
			g.Acquire()
			_, err := p.Receive(make([]Message, 1), func(errno unix.Errno) { reported <- errno })
			ended <- err
		}()
		for range maxErrors + 10 {
			_ = unix.Sendto(fd, []byte{1}, unix.MSG_DONTWAIT, nil) // or sendto returns the error
			select {
			case errno := <-reported:
				if errno != unix.ECONNREFUSED {
					t.Fatal(errno)
				}
			case err := <-ended:
				t.Fatalf("Receive ended: %v", err)
			case <-time.After(time.Millisecond):
			}
		}
		go func() {
			for range reported {
			}
		}()
		g.Close(nil)
		close(reported)
		if err := <-ended; err != os.ErrClosed {
			t.Error(err)
		}
	})
	t.Run("persistent-error", func(t *testing.T) {
		g, r, _, _ := pipe(t) // no socket
		defer g.Close(nil)
		p := g.Poller(r)
		began, times := time.Now(), 0
		_, err := p.Receive(make([]Message, 1), func(unix.Errno) { times++ })
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
		g, err := New(func() {})
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			g.Close(nil)
			for _, fd := range fds {
				unix.Close(fd)
			}
		}()
		p := g.Poller(fds[0])
		unix.Write(fds[1], []byte{1})
		unix.Write(fds[3], []byte{2, 2})
		retired := 0
		if err := p.Replace(fds[0], fds[2], func() { retired++ }); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 10)
		iov := unix.Iovec{Base: &buf[0]}
		iov.SetLen(len(buf))
		msgs := []Message{{Msghdr: unix.Msghdr{Iov: &iov}}}
		msgs[0].SetIovlen(1)
		for want := 1; want <= 2; want++ {
			if n, err := p.Receive(msgs, nil); n != 1 || err != nil || msgs[0].N != uint32(want) || retired != want-1 {
				t.Errorf("message %d: %d, %v, %d bytes, retired %d times", want, n, err, msgs[0].N, retired)
			}
		}
	})
}
