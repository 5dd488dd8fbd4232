package netstate

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Egress hooks behind tcx: a tcx program that redirects a packet, as the fast path's does
// on the tunnel's interface, bypasses them. Hooks ahead of tcx (nftables' egress hook)
// and the ingress side need no check.

// qdisc is what is read of an RTM_NEWQDISC.
type qdisc struct {
	device         int
	handle, parent uint32
	kind           string
}

// configured: the kernel's defaults have no handle. Nor does a message tell of those.
func (q *qdisc) configured() bool { return q.handle != 0 }

// getQdiscs are the configured qdiscs of all interfaces, by interface.
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

// withoutQdisc removes a qdisc and those attached to its classes, of whose end no message
// tells.
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

// filterKey is where tc filters hang: an interface, and ingress or egress of it.
type filterKey struct {
	device int
	parent uint32 // HANDLE_MIN_INGRESS or HANDLE_MIN_EGRESS
}

// filters says whether there are filters; reason if that could not be found out. The
// Host's mu guards it.
type filters struct {
	known, any bool
	unknown    string
}

// getFilters reports whether a device has tc filters on parent, ingress or egress.
func (r *requester) getFilters(k filterKey) (bool, error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETTFILTER, 0)
	req.AddData(&nl.TcMsg{Family: unix.AF_UNSPEC, Ifindex: int32(k.device), Parent: k.parent})
	found, err := r.dump(req, unix.NETLINK_ROUTE, unix.RTM_NEWTFILTER)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENODEV) {
		return false, nil // a kernel without tc, or the interface is gone
	}
	if err != nil {
		return false, fmt.Errorf("list the tc filters: %w", err)
	}
	return len(found) > 0, nil
}

// ingressFilters is the reason not to redirect received packets by a program on the
// device's tcx ingress, ahead of its tc filters; "" if there is none. Sockets receive
// behind those filters, so that they are no matter to a bypass.
func (h *Host) ingressFilters(device int) (reason string) {
	return h.filterReason(filterKey{device, netlink.HANDLE_MIN_INGRESS}, "tc has filters on the ingress of the underlay device")
}

// egressFilters is the reason not to bypass the tc filters on the egress of a device,
// which the reason calls role.
func (h *Host) egressFilters(device int, role string) (reason string) {
	return h.filterReason(filterKey{device, netlink.HANDLE_MIN_EGRESS}, "tc has filters on the egress of the "+role)
}

// filterReason asks the kernel where a message has said that filters may have changed.
func (h *Host) filterReason(k filterKey, there string) (reason string) {
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
		return f.reason(possible, there)
	}
	h.mu.Unlock()
	found, err := h.getFilters(k)
	h.mu.Lock()
	defer h.mu.Unlock()
	// If a message came in the meantime, h.filters has another by now.
	*f = filters{known: true, any: found, unknown: reasonOf("", err)}
	return f.reason(true, there)
}

func (f *filters) reason(possible bool, there string) string {
	switch {
	case !possible:
		return ""
	case f.unknown != "":
		return f.unknown
	case f.any:
		return there
	}
	return ""
}

// egressHooks is the reason not to redirect packets by a program on the tcx egress of the
// interface of that index; "" if there is none. It looks for
//   - a qdisc that was configured, by its handle: the kernel's defaults have 0,
//   - tc filters on egress, and
//   - promiscuous mode, which on an interface without a link layer is a capture.
func (h *Host) egressHooks(device int) (reason string) {
	h.mu.Lock()
	for _, q := range h.qdiscs[device] {
		if q.parent != netlink.HANDLE_CLSACT && q.kind != "noqueue" { // which is a no-op
			reason = "the interface has the queueing discipline " + q.kind
			break
		}
	}
	h.mu.Unlock()
	if reason == "" {
		reason = h.egressFilters(device, "interface")
	}
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
