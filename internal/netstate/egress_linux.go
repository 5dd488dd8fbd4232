package netstate

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// What a packet meets on its way out of an interface, behind tcx: a program there that
// redirects it, as that of the fast path does on the tunnel's own interface, takes it
// past all of this. What it meets before tcx (nftables' egress hook), and on its way in,
// needs no look.

// EgressHooks says what stands against taking packets off the egress of the interface
// of that index by a program on tcx: "" if nothing does. Where it cannot tell, that is a
// reason. It looks for
//   - a queueing discipline that somebody has set, by its handle: those that the kernel
//     gives an interface by itself have 0,
//   - tc filters on egress, and
//   - promiscuous mode, which on an interface without a link layer is a capture.
//
// The kernel tells of changes of all of these: see Watch. The answer costs a few system
// calls.
func EgressHooks(device int) (reason string) {
	return firstBlocker(
		func() (string, error) { return disciplineReason(device) },
		func() (string, error) { return filterReason(device, "interface") },
		func() (string, error) { return promiscuousReason(device) },
	)
}

func disciplineReason(device int) (string, error) {
	all, err := disciplines(device)
	if err != nil {
		return "", err
	}
	for _, d := range all {
		if d.byHand && d.parent != netlink.HANDLE_CLSACT && d.kind != "noqueue" { // which does nothing
			return "the interface has the queueing discipline " + d.kind, nil
		}
	}
	return "", nil
}

// discipline is what matters of a queueing discipline.
type discipline struct {
	device int
	kind   string
	parent uint32
	byHand bool // it has a handle
}

// disciplines are those of an interface. clsact and ingress, whose parent is
// HANDLE_CLSACT, hold filters and no packets.
func disciplines(device int) (all []discipline, err error) {
	// A dump is of all interfaces. A request for one has the kernel tell everybody of
	// the answer, Watch included.
	req := nl.NewNetlinkRequest(unix.RTM_GETQDISC, unix.NLM_F_DUMP)
	req.AddData(&nl.TcMsg{Family: unix.AF_UNSPEC, Ifindex: int32(device)})
	messages, err := dump(req, unix.NETLINK_ROUTE, unix.RTM_NEWQDISC)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) {
		return nil, nil // a kernel without tc
	}
	for i := 0; err == nil && i < len(messages); i++ {
		var d discipline
		if d, err = parseDiscipline(messages[i]); d.device == device {
			all = append(all, d)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("list the queueing disciplines: %w", err)
	}
	return all, nil
}

// parseDiscipline reads an RTM_NEWQDISC, from its tcmsg on.
func parseDiscipline(b []byte) (d discipline, err error) {
	if len(b) < nl.SizeofTcMsg {
		return d, unix.EBADMSG
	}
	m := nl.DeserializeTcMsg(b)
	d = discipline{device: int(m.Ifindex), parent: m.Parent, byHand: m.Handle != 0}
	err = eachAttr(b[nl.SizeofTcMsg:], func(attr uint16, value []byte) error {
		if attr == nl.TCA_KIND {
			d.kind = unix.ByteSliceToString(value)
		}
		return nil
	})
	return d, err
}

func promiscuousReason(device int) (string, error) {
	l, err := netlink.LinkByIndex(device)
	if err != nil {
		return "", fmt.Errorf("look up the interface: %w", err)
	}
	if l.Attrs().Promisc == 0 {
		return "", nil
	}
	return "the interface is in promiscuous mode, as for a capture", nil
}

// EgressTaps is EgressHooks for what nobody is told of, so that one has to look again:
// packet sockets that ask for all protocols, as tcpdump's does, to which what the
// interface sends is shown. One for IPv4 only sees what is received. The answer costs
// three system calls.
func EgressTaps(device int) (reason string) {
	return firstBlocker(func() (string, error) { return tapReason(device) })
}

func tapReason(device int) (string, error) {
	// The file of the thread: /proc/net is that of the process's first thread.
	sockets, err := os.ReadFile("/proc/thread-self/net/packet")
	if errors.Is(err, os.ErrNotExist) {
		return "", nil // a kernel without packet sockets
	}
	if err != nil {
		return "", err
	}
	tapped, err := isTapped(sockets, device)
	if err != nil || !tapped {
		return "", err
	}
	return "a packet socket, such as tcpdump's, is shown what the interface sends", nil
}

// isTapped looks for such a socket in what /proc/net/packet holds.
func isTapped(sockets []byte, device int) (bool, error) {
	lines := bufio.NewScanner(bytes.NewReader(sockets))
	lines.Scan() // sk RefCnt Type Proto Iface …
	for lines.Scan() {
		f := bytes.Fields(lines.Bytes())
		if len(f) < 5 {
			return false, fmt.Errorf("/proc/net/packet has a line %q", lines.Text())
		}
		const all, any = "0003", "0" // ETH_P_ALL, every interface
		if on := string(f[4]); string(f[3]) == all && (on == any || on == strconv.Itoa(device)) {
			return true, nil
		}
	}
	return false, lines.Err()
}
