package tunnel

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// socketName is what a socket is kept under: no other one ever has its cookie.
func socketName(prefix string, fd int) string {
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	if err != nil {
		return "" // which is not stored
	}
	return fmt.Sprintf("%s%x", prefix, cookie)
}
