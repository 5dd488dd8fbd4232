package tunnel

import (
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/internal/fdguard"
)

// waiter waits for a worker's file descriptors, in one epoll set and on one thread.
type waiter struct {
	epoll    *fdguard.Epoll
	wake     int       // eventfd in epoll
	start    func()    // starts the thread
	once     sync.Once // of start
	running  atomic.Bool
	stopping atomic.Bool
}

// Keys in a worker's epoll set that are of no source: the keys of sources are positive.
const (
	wakeKey = 0
	outKey  = -1 // out's epoll set, in that of in while out is parked
)

// workers is a pair of workers: out reads TUN queues, in reads receivers. Each has a thread from its
// first file descriptor on.
type workers struct {
	out, in *worker
	handoff
}

// newWorkers returns a pair whose threads spawn starts. The caller closes it with close.
func newWorkers(index int, newWorker func(index int) *worker, spawn func(func())) (_ *workers, err error) {
	p := &workers{out: newWorker(index), in: newWorker(index), handoff: newHandoff()}
	for _, w := range []*worker{p.out, p.in} {
		w.wake = -1
	}
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	for w, loop := range map[*worker]func(){p.out: p.runOut, p.in: p.runIn} {
		w.start = func() { spawn(loop) }
		if w.epoll, err = fdguard.NewEpoll(); err != nil {
			return nil, err
		}
		if w.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
			return nil, os.NewSyscallError("eventfd", err)
		}
		if err = w.epoll.Add(w.wake, wakeKey); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// watch adds a file descriptor of the source to what the worker waits for. Closing it ends that.
func (w *worker) watch(fd int, key int32) error {
	if err := w.epoll.Add(fd, key); err != nil {
		return err
	}
	w.once.Do(func() {
		w.running.Store(true)
		w.start()
	})
	return nil
}

// unwatch undoes watch, for an open file descriptor.
func (w *worker) unwatch(fd int) { _ = w.epoll.Remove(fd) }

// runOut is the thread of out.
func (p *workers) runOut() {
	runtime.LockOSThread()
	since := time.Now()
	for !p.out.stopping.Load() {
		events := p.out.epoll.Wait()
		now := time.Now()
		p.out.mu.Lock()
		n := p.out.carryAll(events)
		p.out.mu.Unlock()
		if n == 0 {
			continue
		}
		if p.load.idle(n, since, now) {
			p.park()
		}
		since = time.Now()
	}
}

// runIn is the thread of in.
func (p *workers) runIn() {
	runtime.LockOSThread()
	var moderation fdguard.Moderation
	for !p.in.stopping.Load() {
		moderation.Pause()
		events := p.in.epoll.Wait()
		if len(events) == 0 {
			continue
		}
		now := time.Now()
		p.in.mu.Lock()
		n := p.in.carryAll(events)
		p.in.mu.Unlock()
		if n > 0 {
			moderation.Observe(n)
		}
		p.serveParked(n, now)
	}
}

// carryAll has each source that is ready read one batch, and returns the number of packets. The caller
// holds mu. epoll rotates what is ready, so that no source waits for ever.
func (w *worker) carryAll(events []unix.EpollEvent) (n int) {
	for i := range events {
		e := &events[i]
		if e.Pad <= 0 {
			continue
		}
		got, ok := w.carryLocked(e.Pad)
		n += got
		if !ok {
			w.unwatch(int(e.Fd))
		}
	}
	return n
}

// stop ends the threads.
func (p *workers) stop() {
	for _, w := range []*worker{p.out, p.in} {
		w.stopping.Store(true)
		_, _ = unix.Write(w.wake, []byte{0: 1, 7: 0})
	}
	p.unpark()
}

// close closes what newWorkers opened. The threads must have ended.
func (p *workers) close() {
	for _, w := range []*worker{p.out, p.in} {
		if w.wake >= 0 {
			_ = unix.Close(w.wake)
		}
		if w.epoll != nil {
			_ = w.epoll.Close()
		}
	}
}
