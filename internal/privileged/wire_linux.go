package privileged

import (
	"encoding/binary"
	"errors"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// HeaderSize is how many bytes precede the fields of a request, and of an answer: the verb or kind, and the sequence
// number, in the host's byte order, which an answer has from its request.
const HeaderSize = 5

// Header returns the header of a request or an answer.
func Header(kind byte, sequence uint32) []byte {
	return binary.NativeEndian.AppendUint32([]byte{kind}, sequence)
}

// Sequence returns the sequence number in a message of at least HeaderSize bytes.
func Sequence(b []byte) uint32 { return binary.NativeEndian.Uint32(b[1:]) }

// Fields are the values of a request or an answer.
type Fields [][]byte

// Append appends fields to b: each its length, four bytes in the host's byte order, and itself.
func Append(b []byte, fields ...[]byte) []byte {
	for _, f := range fields {
		b = append(binary.NativeEndian.AppendUint32(b, uint32(len(f))), f...)
	}
	return b
}

var errFields = errors.New("it has other fields")

// Parse splits b into exactly n fields, which are slices of b.
func Parse(b []byte, n int) (fields Fields, err error) {
	for range n {
		if len(b) < 4 {
			return nil, errFields
		}
		size := binary.NativeEndian.Uint32(b)
		if b = b[4:]; uint64(size) > uint64(len(b)) {
			return nil, errFields
		}
		fields, b = append(fields, b[:size:size]), b[size:]
	}
	if len(b) > 0 {
		return nil, errFields
	}
	return fields, nil
}

// U32 returns a number as a field, in the host's byte order.
func U32(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }

// U32 returns field i as a number; 0 if it is not four bytes long.
func (f Fields) U32(i int) uint32 {
	if len(f[i]) != 4 {
		return 0
	}
	return binary.NativeEndian.Uint32(f[i])
}

// Send sends a message with a descriptor, which stays the caller's; -1 is none.
func Send(socket int, b []byte, fd int) error {
	var rights []byte
	if fd >= 0 {
		rights = unix.UnixRights(fd)
	}
	for {
		if err := unix.Sendmsg(socket, b, rights, nil, unix.MSG_NOSIGNAL); err != unix.EINTR {
			return os.NewSyscallError("sendmsg", err)
		}
	}
}

var recvmsg = unix.Recvmsg // except in tests

// Receive receives a message into b, and its descriptor, which is the caller's; -1 is none. It fails with io.EOF
// when the other end is closed. If the kernel lacks memory it tries again: without an answer it would not be known
// what was done.
func Receive(socket int, b []byte) (n, fd int, err error) {
	control := make([]byte, unix.CmsgSpace(4))
	for {
		n, controlLen, flags, _, err := recvmsg(socket, b, control, unix.MSG_CMSG_CLOEXEC)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.ENOMEM, err == unix.ENOBUFS:
			time.Sleep(10 * time.Millisecond)
			continue
		case err != nil:
			return 0, -1, os.NewSyscallError("recvmsg", err)
		}
		fds := Rights(control[:controlLen])
		if len(fds) == 1 && flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) == 0 {
			return n, fds[0], nil
		}
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
		switch {
		case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 || len(fds) > 0:
			return 0, -1, os.NewSyscallError("recvmsg", unix.EMSGSIZE)
		case n == 0:
			return 0, -1, io.EOF
		}
		return n, -1, nil
	}
}

// Rights returns the descriptors in the control messages of recvmsg (SCM_RIGHTS), which are the caller's.
func Rights(control []byte) (fds []int) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return nil
	}
	for i := range messages {
		if got, err := unix.ParseUnixRights(&messages[i]); err == nil {
			fds = append(fds, got...)
		}
	}
	return fds
}
