package tunnel

import (
	"runtime"
	"sync"
)

// processors is how many there are for this process, with what the environment or a
// cgroup allows: Go's own value at its start.
var processors = runtime.GOMAXPROCS(0)

// MaxThreads bounds how many threads, or queues, can be asked for.
const MaxThreads = 16

// defaultThreads leaves half of the processors to the other direction and to
// whoever sends and receives through the tunnel.
func defaultThreads() int { return min(max(processors/2, 1), 4) }

// loopThreads counts the loops of the data path in this process. Each keeps a thread,
// and while it waits in a system call that the runtime does not know of, also one of
// GOMAXPROCS, which is raised by as many.
var loopThreads threadCount

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
