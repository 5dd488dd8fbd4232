package tunnel

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// socketName returns the name under which a socket is kept: prefix and its cookie, which no other socket ever has.
func socketName(prefix string, fd int) string {
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	if err != nil {
		return "" // which Manager.Store refuses
	}
	return fmt.Sprintf("%s%x", prefix, cookie)
}
