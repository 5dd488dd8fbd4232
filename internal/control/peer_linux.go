package control

import "golang.org/x/sys/unix"

// peerUID returns the user of a socket's other end, -1 if it is not known.
func peerUID(fd int) int {
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return -1
	}
	return int(cred.Uid)
}
