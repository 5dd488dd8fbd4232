package netstate

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Queueing disciplines and tc filters of interfaces.

// qdisc is what is read of an RTM_NEWQDISC.
type qdisc struct {
	device         int
	handle, parent uint32
	kind           string
}

// configured reports whether the qdisc was added by somebody: the kernel's default ones have no handle, and no messages.
func (q *qdisc) configured() bool { return q.handle != 0 }

// getQdiscs returns the configured qdiscs of all interfaces, by interface.
func (r *requester) getQdiscs() (map[int][]qdisc, error) {
	// A dump: the answer to a request for one would be multicast, to us among others.
	req := nl.NewNetlinkRequest(unix.RTM_GETQDISC, 0)
	req.AddData(&nl.TcMsg{Family: unix.AF_UNSPEC})
	messages, err := r.dump(req, unix.NETLINK_ROUTE, unix.RTM_NEWQDISC)
	all := map[int][]qdisc{}
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) {
		return all, nil // a kernel without tc
	}
	for i := 0; err == nil && i < len(messages); i++ {
		var q qdisc
		if q, err = parseQdisc(messages[i]); err == nil && q.configured() {
			all[q.device] = append(all[q.device], q)
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
	q = qdisc{device: int(m.Ifindex), handle: m.Handle, parent: m.Parent}
	err = eachAttr(b[nl.SizeofTcMsg:], func(attr uint16, value []byte) error {
		if attr == nl.TCA_KIND {
			q.kind = unix.ByteSliceToString(value)
		}
		return nil
	})
	return q, err
}

// major is the part of a handle that a qdisc has in common with its classes.
const major = 0xffff0000

// withoutQdisc returns all without a qdisc and without those attached to its classes, of whose
// removal no message tells.
func withoutQdisc(all []qdisc, gone qdisc) (rest []qdisc) {
	pending := []qdisc{gone}
	for len(pending) > 0 {
		gone, pending = pending[0], pending[1:]
		rest = nil
		for _, q := range all {
			switch {
			case q.handle == gone.handle:
			case q.parent&major == gone.handle&major && q.parent < netlink.HANDLE_CLSACT&major:
				pending = append(pending, q)
			default:
				rest = append(rest, q)
			}
		}
		all = rest
	}
	return all
}

// filterKey is where tc filters are attached: ingress or egress of an interface.
type filterKey struct {
	device int
	parent uint32 // HANDLE_MIN_INGRESS or HANDLE_MIN_EGRESS
}

// filters are the tc filters at a filterKey; unknown is why they could not be listed. The Host's mu guards it.
type filters struct {
	known, any bool
	programs   []uint32 // IDs of the eBPF programs among them
	unknown    string
}

// getFilters lists the tc filters that a device has on parent, ingress or egress.
func (r *requester) getFilters(k filterKey) (f filters, err error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETTFILTER, 0)
	req.AddData(&nl.TcMsg{Family: unix.AF_UNSPEC, Ifindex: int32(k.device), Parent: k.parent})
	found, err := r.dump(req, unix.NETLINK_ROUTE, unix.RTM_NEWTFILTER)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENODEV) {
		return f, nil // a kernel without tc, or the interface is gone
	}
	if err != nil {
		return f, fmt.Errorf("list the tc filters: %w", err)
	}
	f.any = len(found) > 0
	for _, m := range found {
		if id := parseProgram(m); id != 0 {
			f.programs = append(f.programs, id)
		}
	}
	return f, nil
}

// ingressFilters returns the reason not to redirect received packets by a program on the
// device's tcx ingress, ahead of its tc filters; "" if there is none. Sockets receive
// behind those filters, so that they do not prevent a bypass.
func (h *Host) ingressFilters(device int) (reason string) {
	return h.filtersOn(filterKey{device, netlink.HANDLE_MIN_INGRESS}).reason("tc has filters on the ingress of the underlay device")
}

// egressFilters returns the reason not to bypass the tc filters on the egress of the underlay
// device; "" if there is none.
func (h *Host) egressFilters(device int) (reason string) {
	return h.filtersOn(filterKey{device, netlink.HANDLE_MIN_EGRESS}).reason("tc has filters on the egress of the underlay device")
}

// filtersOn returns the filters at k, listed again if a message has told of a change.
func (h *Host) filtersOn(k filterKey) filters {
	h.mu.Lock()
	possible := false
	for _, q := range h.qdiscs[k.device] {
		// With the ingress qdisc, which has no egress, the kernel answers a request for
		// those of egress with the filters of ingress.
		possible = possible || q.kind == "clsact" || q.kind == "ingress" && k.parent == netlink.HANDLE_MIN_INGRESS
	}
	f := h.filters[k]
	if f == nil && possible {
		f = new(filters)
		h.filters[k] = f
	}
	if !possible || f.known {
		defer h.mu.Unlock()
		if !possible {
			return filters{}
		}
		return *f
	}
	h.mu.Unlock()
	found, err := h.getFilters(k)
	found.known, found.unknown = true, reasonOf("", err)
	h.mu.Lock()
	defer h.mu.Unlock()
	*f = found // after a message in the meantime h.filters no longer has f
	return found
}

func (f filters) reason(there string) string {
	switch {
	case f.unknown != "":
		return f.unknown
	case f.any:
		return there
	}
	return ""
}

// egressBlocker returns the reason not to let the attached program (Answer.Attached) of an interface
// redirect packets; "" if there is none. Hooks that packets pass before the program do not matter:
// nftables' egress hook, programs of tcx, tc filters. Behind it there are
//   - a qdisc that was configured, by its handle: the kernel's defaults have 0, and
//   - promiscuous mode, which on an interface without a link layer is a capture.
func (h *Host) egressBlocker(device int) (reason string) {
	h.mu.Lock()
	for _, q := range h.qdiscs[device] {
		if q.parent != netlink.HANDLE_CLSACT && q.kind != "noqueue" { // which is a no-op
			reason = "the interface has the queueing discipline " + q.kind
			break
		}
	}
	h.mu.Unlock()
	if reason != "" {
		return reason
	}
	l, err := h.link(device)
	switch {
	case err != nil:
		return reasonOf("", fmt.Errorf("look up the interface: %w", err))
	case l.promiscuous:
		return "the interface is in promiscuous mode, as for a capture"
	}
	return ""
}
