package rtnl

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"

	"github.com/cilium/ebpf"
	tcx "github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
)

// SafeToSendDirectly says what stands against giving frames to the driver of an
// interface by themselves: "" if nothing does. Where it cannot tell, that is a reason.
// It is asked beside SafeToBypass, which looks for what a frame on the ordinary way
// meets as well.
//
// Only a veth is fit for it: other drivers fill queues of their own, which a queueing
// discipline keeps in order, or want to be told more than the frame. On the way to the
// driver lie
//   - the queueing discipline, of which a veth has none unless somebody gives it one,
//   - eBPF programs on tcx, and
//   - packet sockets that ask for all protocols, as tcpdump's does, to which what is sent
//     is shown as well. They come and go, and nobody is told: ask again.
//
// It costs a few system calls.
func SafeToSendDirectly(device int) (reason string) {
	return objection(
		func() (string, error) { return deviceReason(device) },
		func() (string, error) { return disciplineReason(device) },
		func() (string, error) { return tcxReason(device) },
		func() (string, error) { return tapReason(device) },
	)
}

func deviceReason(device int) (string, error) {
	l, err := underlay(device)
	if err != nil {
		return "", err
	}
	if l.Type() != "veth" {
		return "the underlay device is no veth", nil
	}
	return "", nil
}

func disciplineReason(device int) (string, error) {
	disciplines, err := netlink.QdiscList(&netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: device}})
	if err != nil {
		return "", fmt.Errorf("list the queueing disciplines: %w", err)
	}
	for _, d := range disciplines {
		if a := d.Attrs(); a.Parent == netlink.HANDLE_ROOT && d.Type() != "noqueue" {
			return "the underlay device has the queueing discipline " + d.Type(), nil
		}
	}
	return "", nil
}

func tcxReason(device int) (string, error) {
	programs, err := tcx.QueryPrograms(tcx.QueryOptions{Target: device, Attach: ebpf.AttachTCXEgress})
	if errors.Is(err, ebpf.ErrNotSupported) {
		return "", nil // before Linux 6.6
	}
	if err != nil {
		return "", fmt.Errorf("list the programs on tcx: %w", err)
	}
	if len(programs.Programs) > 0 {
		return "the underlay device has eBPF programs on its egress", nil
	}
	return "", nil
}

// tapReason looks for packet sockets that are shown what the device sends.
func tapReason(device int) (string, error) {
	// The file of the thread: /proc/net is that of the process's first thread.
	sockets, err := os.ReadFile("/proc/thread-self/net/packet")
	if err != nil {
		return "", err
	}
	lines := bufio.NewScanner(bytes.NewReader(sockets))
	lines.Scan() // sk RefCnt Type Proto Iface …
	for lines.Scan() {
		f := bytes.Fields(lines.Bytes())
		if len(f) < 5 {
			return "", fmt.Errorf("/proc/net/packet has a line %q", lines.Text())
		}
		const all, any = "0003", "0" // ETH_P_ALL, every interface
		if on := string(f[4]); string(f[3]) == all && (on == any || on == strconv.Itoa(device)) {
			return "a packet socket, such as tcpdump's, is shown what the underlay device sends", nil
		}
	}
	return "", nil
}
