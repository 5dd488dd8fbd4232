package tunnel

import (
	"runtime"
	"sync"
)

// processors is the number of processors for this process, as limited by the environment or a cgroup:
// GOMAXPROCS at the start.
var processors = runtime.GOMAXPROCS(0)

// MaxThreads is the largest number of TUN queues, or of pairs of workers.
const MaxThreads = 16

// DefaultThreads leaves half of the processors to the other direction and to applications.
func DefaultThreads() int { return min(max(processors/2, 1), 4) }

// workerThreads counts the threads of the Engines of this process. While one of them waits in a raw
// system call it holds a P of the Go scheduler, so GOMAXPROCS is raised by their number.
var workerThreads threadCount

type threadCount struct {
	mu sync.Mutex
	n  int
}

func (c *threadCount) add(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n += n
	runtime.GOMAXPROCS(processors + c.n)
}
