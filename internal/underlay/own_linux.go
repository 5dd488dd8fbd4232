package underlay

import (
	"sync"

	"golang.org/x/sys/unix"
)

// own are the inodes of the sockets that this process has made or taken over. The kernel does not use
// one again while a process runs.
var own sync.Map

func noteOwn(fd int) {
	var s unix.Stat_t
	if unix.Fstat(fd, &s) == nil {
		own.Store(s.Ino, true)
	}
}

// Own reports whether a socket, by its inode, is one of this process's for outer packets.
func Own(inode uint64) bool {
	_, ok := own.Load(inode)
	return ok
}
