package control

import (
	"net"
	"os"
	"sync"
)

// guardedListener accepts connections of root and of the process's own user only, and no more
// at once than slots has room for.
type guardedListener struct {
	net.Listener
	slots chan struct{}
}

// Accept closes connections of other users, who can only come by the socket's descriptor or by a
// wrong mode.
func (l *guardedListener) Accept() (net.Conn, error) {
	l.slots <- struct{}{} // Server.Close closes those that hold one
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			<-l.slots
			return nil, err
		}
		if trustedPeer(c.(*net.UnixConn)) {
			return &guardedConn{Conn: c, release: sync.OnceFunc(func() { <-l.slots })}, nil
		}
		c.Close()
	}
}

type guardedConn struct {
	net.Conn
	release func()
}

func (c *guardedConn) Close() error {
	defer c.release()
	return c.Conn.Close()
}

// trustedPeer reports whether the other end belonged to root or to the user of this process
// when it connected.
func trustedPeer(c *net.UnixConn) bool {
	uid := -1
	if raw, err := c.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { uid = peerUID(int(fd)) })
	}
	return uid == 0 || uid == os.Geteuid()
}
