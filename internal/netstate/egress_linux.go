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

// Egress hooks behind tcx: a tcx program that redirects a packet, as the fast path's does
// on the tunnel's interface, bypasses them. Hooks ahead of tcx (nftables' egress hook)
// and the ingress side need no check.

// EgressHooks is the reason not to redirect packets by a program on the tcx egress of the
// interface of that index; "" if there is none. A check that fails is a reason. It looks
// for
//   - a qdisc that was configured, by its handle: the kernel's defaults have 0,
//   - tc filters on egress, and
//   - promiscuous mode, which on an interface without a link layer is a capture.
//
// Watch reports changes of all of these. The answer takes a few system calls.
func EgressHooks(device int) (reason string) {
	return firstBlocker(
		func() (string, error) { return qdiscReason(device) },
		func() (string, error) { return filterReason(device, "interface") },
		func() (string, error) { return promiscuousReason(device) },
	)
}

func qdiscReason(device int) (string, error) {
	all, err := qdiscs(device)
	if err != nil {
		return "", err
	}
	for _, q := range all {
		if q.configured && q.parent != netlink.HANDLE_CLSACT && q.kind != "noqueue" { // a no-op
			return "the interface has the queueing discipline " + q.kind, nil
		}
	}
	return "", nil
}

// qdisc is what is read of an RTM_NEWQDISC.
type qdisc struct {
	device     int
	kind       string
	parent     uint32
	configured bool // it has a handle
}

// qdiscs are those of an interface. clsact and ingress, whose parent is HANDLE_CLSACT,
// hold filters and no packets.
func qdiscs(device int) (all []qdisc, err error) {
	// A dump is of all interfaces. The answer to a request for one would be multicast,
	// to Watch among others.
	req := nl.NewNetlinkRequest(unix.RTM_GETQDISC, unix.NLM_F_DUMP)
	req.AddData(&nl.TcMsg{Family: unix.AF_UNSPEC, Ifindex: int32(device)})
	messages, err := dump(req, unix.NETLINK_ROUTE, unix.RTM_NEWQDISC)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) {
		return nil, nil // a kernel without tc
	}
	for i := 0; err == nil && i < len(messages); i++ {
		var q qdisc
		if q, err = parseQdisc(messages[i]); q.device == device {
			all = append(all, q)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("list the queueing disciplines: %w", err)
	}
	return all, nil
}

// parseQdisc reads an RTM_NEWQDISC that starts at its tcmsg.
func parseQdisc(b []byte) (q qdisc, err error) {
	if len(b) < nl.SizeofTcMsg {
		return q, unix.EBADMSG
	}
	m := nl.DeserializeTcMsg(b)
	q = qdisc{device: int(m.Ifindex), parent: m.Parent, configured: m.Handle != 0}
	err = eachAttr(b[nl.SizeofTcMsg:], func(attr uint16, value []byte) error {
		if attr == nl.TCA_KIND {
			q.kind = unix.ByteSliceToString(value)
		}
		return nil
	})
	return q, err
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

// EgressTaps is EgressHooks for packet sockets of ETH_P_ALL, such as tcpdump's, of which
// no netlink message tells: poll it. A socket of ETH_P_IP sees received packets only. The
// answer takes three system calls.
func EgressTaps(device int) (reason string) {
	return firstBlocker(func() (string, error) { return tapReason(device) })
}

func tapReason(device int) (string, error) {
	// /proc/net is of the namespace of the process's first thread.
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

// isTapped looks for a socket of ETH_P_ALL on the device in the text of /proc/net/packet.
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
