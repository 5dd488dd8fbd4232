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

// Taps are the packet sockets of ETH_P_ALL, such as tcpdump's, which are shown what
// interfaces send. No message tells of them: poll EgressTaps.
type Taps struct {
	on  map[int]bool
	all bool // there is a socket of all interfaces
}

// EgressTaps returns the packet sockets of the network namespace that see what interfaces send. A
// socket of ETH_P_IP sees received packets only.
func (r *requester) EgressTaps() (Taps, error) {
	sockets, err := r.netFile(fileTaps)
	if errors.Is(err, os.ErrNotExist) {
		return Taps{}, nil // a kernel without packet sockets
	}
	if err != nil {
		return Taps{}, err
	}
	return parseTaps(sockets)
}

// On returns the reason not to hide from packet sockets what the interface of that index sends; ""
// if there is none.
func (t Taps) On(device int) (reason string) {
	if t.all || t.on[device] {
		return "a packet socket, such as tcpdump's, is shown what the interface sends"
	}
	return ""
}

// parseTaps reads the text of /proc/net/packet.
func parseTaps(sockets []byte) (Taps, error) {
	t := Taps{on: map[int]bool{}}
	lines := bufio.NewScanner(bytes.NewReader(sockets))
	lines.Scan() // sk RefCnt Type Proto Iface …
	for lines.Scan() {
		f := bytes.Fields(lines.Bytes())
		if len(f) < 5 {
			return Taps{}, fmt.Errorf("/proc/net/packet has a line %q", lines.Text())
		}
		const all = "0003" // ETH_P_ALL
		if string(f[3]) != all {
			continue
		}
		device, err := strconv.Atoi(string(f[4]))
		if err != nil {
			return Taps{}, fmt.Errorf("/proc/net/packet has a line %q: %w", lines.Text(), unix.EBADMSG)
		}
		t.on[device] = true
		t.all = t.all || device == 0
	}
	return t, lines.Err()
}
