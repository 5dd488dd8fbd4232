package netstate

import (
	"errors"
	"fmt"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// An eBPF program on the egress of a tunnel's interface is a tc filter of the kind bpf in its clsact.
// Adding both, or removing them with the interface, takes no RCU grace period, as a tcx link does with the
// RTNL held, and no descriptor. The program is the last that a packet meets there: those of tcx, and
// filters of lower preference, come first.
//
// To add a clsact to an interface that is up, or to remove it, the kernel deactivates the interface's queues
// for an instant, and drops what is sent meanwhile. So Configure adds it before it sets the interface up.
const (
	programPreference = 0xffff
	programHandle     = 1
)

// Attach attaches a program to the egress of Query.Interface, unless the interface runs it already; it adds
// a clsact if there is none. From now on Answer.Attached says whether the interface runs it.
func (f *Follower) Attach(p Program) error {
	device := f.setProgram(p.ID)
	if f.updateNow(); f.Answer().Attached {
		return nil
	}
	err := f.host.attach(device, p)
	f.updateNow()
	return err
}

// setProgram sets the program that Answer.Attached is about.
func (f *Follower) setProgram(id uint32) (device int) {
	f.updating.Lock()
	defer f.updating.Unlock()
	f.program = id
	f.host.mu.Lock()
	defer f.host.mu.Unlock()
	f.dirty |= dirtyMemory
	return f.query.Interface
}

// updateNow handles the messages that the kernel has sent so far, and updates the Answer.
func (f *Follower) updateNow() {
	f.host.readMessages()
	f.update()
}

// attach adds a program to the egress of a device.
func (h *Host) attach(device int, p Program) error {
	if h.hasQdisc(device, "ingress") {
		// The kernel would attach the filter to ingress.
		return errors.New("the interface has the queueing discipline ingress in place of clsact, whose ingress is the same: remove it (tc qdisc del)")
	}
	clsact, filter := programChanges(device, p)
	if _, err := h.change([]change{clsact}, unix.EEXIST); err != nil {
		return explainProgram(err)
	}
	_, err := h.change([]change{filter}, unix.EEXIST)
	return explainProgram(err)
}

// explainProgram adds the remedy to an error of adding a clsact or a program.
func explainProgram(err error) error {
	switch {
	case errors.Is(err, unix.ENOENT):
		return fmt.Errorf("%w: the kernel lacks clsact, or eBPF as a filter (CONFIG_NET_SCH_INGRESS, CONFIG_NET_CLS_BPF)", err)
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("%w: the kernel lacks tc (CONFIG_NET_SCHED, CONFIG_NET_CLS), or the clsact is one with an egress_block", err)
	}
	return err
}

// hasQdisc reports whether a device has a queueing discipline of a kind.
func (h *Host) hasQdisc(device int, kind string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.ContainsFunc(h.qdiscs[device], func(q qdisc) bool { return q.kind == kind })
}

// runs reports whether a device runs the program of that ID on egress. If the filters cannot be listed
// the result is before.
func (h *Host) runs(device int, id uint32, before bool) bool {
	f := h.filtersOn(filterKey{device, netlink.HANDLE_MIN_EGRESS})
	return slices.Contains(f.programs, id) || f.unknown != "" && before
}

// tcName is the name of a qdisc or program, for an error.
type tcName string

func (n tcName) String() string { return string(n) }

// programChanges returns the changes that add a clsact to a device, and the filter that runs a program on its egress.
func programChanges(device int, p Program) (clsact, filter change) {
	req := nl.NewNetlinkRequest(unix.RTM_NEWQDISC, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	req.AddData(&nl.TcMsg{Ifindex: int32(device), Handle: netlink.HANDLE_CLSACT & major, Parent: netlink.HANDLE_CLSACT})
	req.AddData(nl.NewRtAttr(nl.TCA_KIND, nl.ZeroTerminated("clsact")))
	clsact = change{NetlinkRequest: req, device: device, what: "add queueing discipline %v to %v", object: tcName("clsact")}

	// It replaces the filter of a former process (tun.Adopt), whose maps are not updated any more.
	req = nl.NewNetlinkRequest(unix.RTM_NEWTFILTER, unix.NLM_F_CREATE)
	req.AddData(&nl.TcMsg{
		Ifindex: int32(device), Handle: programHandle, Parent: netlink.HANDLE_MIN_EGRESS,
		Info: netlink.MakeHandle(programPreference, nl.Swap16(unix.ETH_P_IP)),
	})
	req.AddData(nl.NewRtAttr(nl.TCA_KIND, nl.ZeroTerminated("bpf")))
	options := nl.NewRtAttr(nl.TCA_OPTIONS, nil)
	options.AddRtAttr(nl.TCA_BPF_FD, nl.Uint32Attr(uint32(p.FD)))
	options.AddRtAttr(nl.TCA_BPF_NAME, nl.ZeroTerminated(p.Name))
	options.AddRtAttr(nl.TCA_BPF_FLAGS, nl.Uint32Attr(nl.TCA_BPF_FLAG_ACT_DIRECT))
	req.AddData(options)
	filter = change{NetlinkRequest: req, device: device, what: "add eBPF program %v to the egress of %v", object: tcName(p.Name), program: p.FD}
	return clsact, filter
}

// removeProgram removes the filter of programChanges, whatever it runs.
func removeProgram(device int) change {
	req := nl.NewNetlinkRequest(unix.RTM_DELTFILTER, 0)
	req.AddData(&nl.TcMsg{
		Ifindex: int32(device), Handle: programHandle, Parent: netlink.HANDLE_MIN_EGRESS,
		Info: netlink.MakeHandle(programPreference, nl.Swap16(unix.ETH_P_IP)),
	})
	req.AddData(nl.NewRtAttr(nl.TCA_KIND, nl.ZeroTerminated("bpf")))
	return change{NetlinkRequest: req, device: device}
}

// parseProgram reads the ID of the program of an RTM_NEWTFILTER that starts at its tcmsg; 0 if the filter
// is not of the kind bpf.
func parseProgram(b []byte) (id uint32) {
	if len(b) < nl.SizeofTcMsg {
		return 0
	}
	kind := ""
	_ = eachAttr(b[nl.SizeofTcMsg:], func(attr uint16, value []byte) error {
		switch {
		case attr == nl.TCA_KIND:
			kind = unix.ByteSliceToString(value)
		case attr == nl.TCA_OPTIONS && kind == "bpf": // comes after its kind
			return eachAttr(value, func(attr uint16, value []byte) error {
				if attr == nl.TCA_BPF_ID {
					id = u32(value)
				}
				return nil
			})
		}
		return nil
	})
	return id
}
