package fdguard

import (
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pipe is a Group that guards both ends of a pipe.
func pipe(t *testing.T) (d *Group, r, w int, released func() bool) {
	t.Helper()
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		t.Fatal(os.NewSyscallError("pipe2", err))
	}
	var times int
	d, err := New(func() {
		times++
		unix.Close(fds[0])
		unix.Close(fds[1])
	})
	if err != nil {
		t.Fatal(err)
	}
	return d, fds[0], fds[1], func() bool { return times == 1 }
}

func TestCloseWakesWhoeverWaitsHoweverLong(t *testing.T) {
	for _, wait := range []func(*Poller) bool{(*Poller).PollSpin, (*Poller).PollBlock} {
		d, r, _, released := pipe(t)
		poller := d.Poller(r)
		inside, done := make(chan bool), make(chan bool)
		go func() {
			defer close(done)
			defer d.Release()
			inside <- d.Acquire()
			for !d.Closed() {
				wait(&poller)
			}
			if released() {
				t.Error("released while somebody was inside")
			}
		}()
		if !<-inside {
			t.Fatal("an open door let nobody in")
		}
		time.Sleep(20 * time.Millisecond) // so that it most often waits by now
		d.Close(nil)
		if !released() {
			t.Error("Close returned before the file descriptors were closed")
		}
		<-done
	}
}

func TestNobodyEntersAfterClose(t *testing.T) {
	d, _, _, released := pipe(t)
	woken := 0
	for range 3 {
		d.Close(func() { woken++ })
	}
	if d.Acquire() {
		t.Error("somebody entered")
	}
	d.Release()
	if !released() || woken != 1 {
		t.Errorf("released %v, woken %d times", released(), woken)
	}
}

func TestManyComeAndGoWhileTheDoorCloses(t *testing.T) {
	d, r, w, released := pipe(t)
	var users sync.WaitGroup
	for range 8 {
		users.Go(func() {
			for {
				ok := d.Acquire()
				if ok {
					if _, err := unix.FcntlInt(uintptr(r), unix.F_GETFD, 0); err != nil {
						t.Errorf("the file descriptor was closed under our hands: %v", err)
					}
				}
				d.Release()
				if !ok {
					return
				}
			}
		})
	}
	unix.Write(w, []byte{1})
	poller := d.Poller(r)
	if poller.PollSpin() {
		t.Error("the pipe is said to be gone")
	}
	d.Close(nil)
	users.Wait()
	if !released() {
		t.Error("not released")
	}
}

func TestWaitTellsThatTheOtherEndIsGone(t *testing.T) {
	d, r, w, _ := pipe(t)
	unix.Close(w)
	poller := d.Poller(r)
	if !poller.PollSpin() || !poller.PollBlock() {
		t.Error("it does not")
	}
	defer d.Close(nil)
}

func TestOnlyAFloodGathers(t *testing.T) {
	const perRound = 16
	for _, tt := range []struct {
		name  string
		taken int           // by each Receive
		every time.Duration // from one to the next
		want  bool
	}{
		{"a flood", perRound, perRound * time.Second / moderateAbove, true},
		{"of single packets", 1, time.Second / moderateAbove, true},
		{"whose batches are large as it is", moderateBelowBatch, moderateBelowBatch * time.Second / moderateAbove, false},
		{"a little less than one", perRound, perRound*time.Second/moderateAbove + time.Microsecond, false},
		{"requests one after the other", 1, 50 * time.Microsecond, false},
		{"a burst now and then", moderateBelowBatch - 1, 2 * rateOver, false},
		{"next to nothing", 1, time.Hour, false},
	} {
		var m moderation
		now := time.Now()
		got := 0
		const rounds = 1000
		for range rounds {
			m.observe(tt.taken)
			if now = now.Add(tt.every); m.shouldDelay(now) {
				got++
			}
		}
		if began := int(rateOver/tt.every) + 2; tt.want && got < rounds-began || !tt.want && got != 0 {
			t.Errorf("%s: %d of %d gather", tt.name, got, rounds)
		}
		if m.observe(1); m.shouldDelay(now.Add(time.Second)) {
			t.Errorf("%s: what comes a second later gathers", tt.name)
		}
	}
}

func TestALookoutTellsWhatCanBeRead(t *testing.T) {
	l, err := NewEpollSet()
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	own, r, _, _ := pipe(t)
	defer own.Close(nil)
	poller := own.Poller(r)
	poller.Watch(l)
	other, otherR, otherW, _ := pipe(t)
	if err := l.Add(otherR, 3); err != nil {
		t.Fatal(err)
	}
	if key, ok := l.Ready(); ok {
		t.Errorf("%d can be read already", key)
	}
	for _, delay := range []time.Duration{busyPoll / 10, 2 * busyPoll} {
		time.AfterFunc(delay, func() { unix.Write(otherW, []byte{1}) })
		for poller.fds[2].Revents == 0 { // a signal may end a wait, too
			poller.PollSpin()
		}
		if key, ok := l.Ready(); !ok || key != 3 {
			t.Errorf("the waiter returned, and %d, %v can be read", key, ok)
		}
		unix.Read(otherR, make([]byte, 1))
		poller.fds[2].Revents = 0
	}
	other.Close(nil) // forgotten with that
	if key, ok := l.Ready(); ok {
		t.Errorf("%d is closed, and can be read", key)
	}
	if l.Add(otherR, 3) == nil {
		t.Error("it can be added when it is closed")
	}
}

// The Go runtime's monitor interrupts a thread that keeps its processor: what was left of
// its attention must become less all the same, until it comes to rest.
func TestSignalsDoNotKeepAThreadFromResting(t *testing.T) {
	d, r, w, _ := pipe(t)
	defer d.Close(nil)
	poller := d.Poller(r)
	time.AfterFunc(2*busyPoll, func() { unix.Write(w, []byte{1}) })
	left := int64(busyPoll)
	for interruptions := 0; poller.fds[0].Revents == 0; {
		if poller.PollSpin(); !poller.interrupted {
			continue // it was at rest, for one
		}
		if interruptions++; poller.timeout.Nano() >= left {
			t.Fatalf("after %d interruptions %d ns are left, and %d were", interruptions, poller.timeout.Nano(), left)
		}
		left = poller.timeout.Nano()
	}
}

// receiver is a Poller for a UDP socket that is connected to a port of this host, and is
// sent to from there by peer.
func receiver(t *testing.T, port int) (w *Poller, fd int, d *Group) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if d, err = New(func() { unix.Close(fd) }); err != nil {
		t.Fatal(err)
	}
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	poller := d.Poller(fd)
	return &poller, fd, d
}

func TestReceive(t *testing.T) {
	// Anybody can send ICMP errors that quote a packet of a connected socket.
	t.Run("icmp-errors", func(t *testing.T) {
		w, fd, d := receiver(t, 9) // where nobody listens
		told, ended := make(chan unix.Errno), make(chan error, 1)
		go func() {
			defer d.Release()
			d.Acquire()
			_, err := w.Receive(make([]Message, 1), func(errno unix.Errno) { told <- errno })
			ended <- err
		}()
		for range maxErrors + 10 {
			_ = unix.Sendto(fd, []byte{1}, unix.MSG_DONTWAIT, nil) // or the error is told here
			select {
			case errno := <-told:
				if errno != unix.ECONNREFUSED {
					t.Fatal(errno)
				}
			case err := <-ended:
				t.Fatalf("Receive ended: %v", err)
			case <-time.After(time.Millisecond):
			}
		}
		go func() {
			for range told {
			}
		}()
		d.Close(nil)
		close(told)
		if err := <-ended; err != os.ErrClosed {
			t.Error(err)
		}
	})
	t.Run("errors-that-stay", func(t *testing.T) {
		d, r, _, _ := pipe(t) // no socket
		defer d.Close(nil)
		w := d.Poller(r)
		began, times := time.Now(), 0
		_, err := w.Receive(make([]Message, 1), func(unix.Errno) { times++ })
		if err == nil || times != maxErrors+1 {
			t.Errorf("%v after %d errors", err, times)
		}
		if observe := time.Since(began); observe < (maxErrors-1)*errorPause {
			t.Errorf("it gave up after %v", observe)
		}
	})
	// What a socket holds is taken before the one that follows it.
	t.Run("successor", func(t *testing.T) {
		var fds [4]int
		for i := 0; i < 4; i += 2 {
			pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			copy(fds[i:], pair[:])
		}
		d, err := New(func() {})
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			d.Close(nil)
			for _, fd := range fds {
				unix.Close(fd)
			}
		}()
		w := d.Poller(fds[0])
		unix.Write(fds[1], []byte{1})
		unix.Write(fds[3], []byte{2, 2})
		retired := 0
		if err := w.Succeed(fds[0], fds[2], func() { retired++ }); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 10)
		iov := unix.Iovec{Base: &buf[0]}
		iov.SetLen(len(buf))
		msgs := []Message{{Msghdr: unix.Msghdr{Iov: &iov}}}
		msgs[0].SetIovlen(1)
		for want := 1; want <= 2; want++ {
			if n, err := w.Receive(msgs, nil); n != 1 || err != nil || msgs[0].N != uint32(want) || retired != want-1 {
				t.Errorf("message %d: %d, %v, %d bytes, retired %d times", want, n, err, msgs[0].N, retired)
			}
		}
	})
}
