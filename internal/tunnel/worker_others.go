//go:build !linux

package tunnel

import (
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// waiter waits for each of a worker's file descriptors in a goroutine of its own.
type waiter struct {
	spawn    func(func())
	stopping atomic.Bool
}

// workers is a pair of workers: out reads TUN queues, in reads receivers.
type workers struct{ out, in *worker }

func newWorkers(index int, newWorker func(index int) *worker, spawn func(func())) (*workers, error) {
	p := &workers{newWorker(index), newWorker(index)}
	p.out.spawn, p.in.spawn = spawn, spawn
	return p, nil
}

// watch has the source carry a batch whenever fd is readable.
func (w *worker) watch(fd int, key int32) error {
	w.spawn(func() {
		for ok := true; ok && !w.stopping.Load(); {
			// The time-out bounds how long stop waits, and what a descriptor costs that was closed.
			const milliseconds = 100
			_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, milliseconds)
			w.mu.Lock()
			if ok = w.has(key); ok {
				_, ok = w.carryLocked(key)
			}
			w.mu.Unlock()
		}
	})
	return nil
}

// unwatch does nothing: remove ends the goroutine.
func (w *worker) unwatch(fd int) {}

// has reports whether the source was not removed.
func (w *worker) has(key int32) bool {
	w.sourcesMu.Lock()
	defer w.sourcesMu.Unlock()
	return w.sources[key] != nil
}

// stop ends the goroutines.
func (p *workers) stop() {
	p.out.stopping.Store(true)
	p.in.stopping.Store(true)
}

func (p *workers) close() {}
