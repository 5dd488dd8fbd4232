package netstate

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// RawSockets returns the inodes of the raw sockets of a protocol in the network namespace. No message tells of
// them: poll RawSockets.
func (r *requester) RawSockets(protocol uint8) (inodes []uint64, err error) {
	sockets, err := r.netFile(fileRaw)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return parseRaw(sockets, protocol)
}

// parseRaw reads the text of /proc/net/raw.
func parseRaw(sockets []byte, protocol uint8) (inodes []uint64, err error) {
	lines := bufio.NewScanner(bytes.NewReader(sockets))
	lines.Scan() // sl local_address …
	suffix := fmt.Appendf(nil, ":%04X", protocol)
	for lines.Scan() {
		f := bytes.Fields(lines.Bytes())
		if len(f) < 10 {
			return nil, fmt.Errorf("/proc/net/raw has a line %q", lines.Text())
		}
		if !bytes.HasSuffix(f[1], suffix) {
			continue
		}
		inode, err := strconv.ParseUint(string(f[9]), 10, 64)
		if err != nil {
			return nil, fmt.Errorf("/proc/net/raw has a line %q: %w", lines.Text(), unix.EBADMSG)
		}
		inodes = append(inodes, inode)
	}
	return inodes, lines.Err()
}
