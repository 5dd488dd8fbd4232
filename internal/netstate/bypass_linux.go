package netstate

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// SafeToBypass is the reason not to send the outer packets from local to remote, and
// receive their answers, past the kernel's IP stack, as frames on the interface of index
// device; "" if there is none. A check that fails is a reason.
//
// The administrator's rules for such packets must hold. In the IP stack they are
//   - netfilter, by nftables or by legacy iptables,
//   - IPsec policies (XFRM), and
//   - routing rules by protocol, TOS or user, which RTM_GETROUTE cannot evaluate.
//
// Frames pass the device's qdisc and the netfilter hooks of devices and bridges as the
// kernel's do; tc filters on egress are a reason because they can match the socket.
//
// Not checked are eBPF programs on a cgroup's egress, on tcx or on netfilter hooks, and
// IPVS. The answer takes a few system calls and holds until Watch's next call.
func SafeToBypass(device int, local, remote [4]byte) (reason string) {
	return firstBlocker(
		iptablesReason,
		func() (string, error) { return nftablesReason(device) },
		func() (string, error) { return xfrmReason(device, local, remote) },
		func() (string, error) { return filterReason(device, "underlay device") },
		rulesReason,
	)
}

// firstBlocker is the first reason of the checks, "" if there is none. An error is a reason.
func firstBlocker(checks ...func() (string, error)) (reason string) {
	for _, check := range checks {
		reason, err := check()
		if err != nil {
			return fmt.Sprintf("cannot tell: %v", permission(err))
		}
		if reason != "" {
			return reason
		}
	}
	return ""
}

// underlay returns the interface of that index.
func underlay(device int) (netlink.Link, error) {
	l, err := netlink.LinkByIndex(device)
	if err != nil {
		return nil, fmt.Errorf("look up the underlay device: %w", err)
	}
	return l, nil
}

// iptablesReason looks for tables of legacy iptables. It does not read them, which would
// create the missing ones.
func iptablesReason() (string, error) {
	// /proc/net is of the namespace of the process's first thread.
	names, err := os.ReadFile("/proc/thread-self/net/ip_tables_names")
	if errors.Is(err, os.ErrNotExist) {
		return "", nil // the module is not loaded
	}
	if err != nil {
		return "", err
	}
	if tables := strings.Fields(string(names)); len(tables) > 0 {
		return "legacy iptables has tables here: " + strings.Join(tables, " "), nil
	}
	return "", nil
}

// From linux/netfilter.h and linux/netfilter/nf_tables.h.
const (
	nftGetChain = unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETCHAIN
	nftNewChain = unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWCHAIN

	hookDevice = 3 // NFTA_HOOK_DEV: a name
	hookDevs   = 4 // NFTA_HOOK_DEVS: a list of them

	policyAccept = 1 // NF_ACCEPT
	hookForward  = 2 // NF_INET_FORWARD: outer packets are this host's own
)

// nftablesReason looks for a chain of nftables (iptables-nft included) that outer packets
// traverse and that can do more than accept.
func nftablesReason(device int) (string, error) {
	req := nl.NewNetlinkRequest(nftGetChain, unix.NLM_F_DUMP)
	req.AddData(&nl.Nfgenmsg{NfgenFamily: unix.NFPROTO_UNSPEC, Version: nl.NFNETLINK_V0})
	chains, err := dump(req, unix.NETLINK_NETFILTER, nftNewChain)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPROTONOSUPPORT) {
		return "", nil // a kernel without nftables, or without netfilter
	}
	if err != nil {
		return "", fmt.Errorf("list the chains of nftables: %w", err)
	}
	var ifname string // looked up when needed
	for _, c := range chains {
		ch, err := parseChain(c)
		if err != nil {
			return "", fmt.Errorf("list the chains of nftables: %w", err)
		}
		if !ch.applies() {
			continue
		}
		if len(ch.devices) > 0 {
			if ifname == "" {
				l, err := underlay(device)
				if err != nil {
					return "", err
				}
				ifname = l.Attrs().Name
			}
			if !ch.isOn(ifname) {
				continue
			}
		}
		return fmt.Sprintf("nftables has rules in chain %s of table %s", ch.name, ch.table), nil
	}
	return "", nil
}

// chain is what is read of an NFT_MSG_NEWCHAIN.
type chain struct {
	family      uint8 // NFPROTO_INET, …
	table, name string
	base        bool // attached to a hook
	hook        uint32
	devices     []string // of an ingress or egress hook; a final * is a wildcard
	rules       uint32
	policy      uint32
}

// applies reports whether outer packets traverse the chain and it can affect them.
func (c *chain) applies() bool {
	if !c.base || c.rules == 0 && c.policy == policyAccept {
		return false
	}
	switch c.family {
	case unix.NFPROTO_IPV4, unix.NFPROTO_INET:
		return c.hook != hookForward
	case unix.NFPROTO_NETDEV:
		return true
	}
	return false // IPv6, ARP; a bridge's chains see our frames too
}

func (c *chain) isOn(ifname string) bool {
	for _, d := range c.devices {
		if before, any := strings.CutSuffix(d, "*"); d == ifname || any && strings.HasPrefix(ifname, before) {
			return true
		}
	}
	return false
}

// parseChain reads an NFT_MSG_NEWCHAIN that starts at its nfgenmsg. Its integers are
// big-endian.
func parseChain(b []byte) (chain, error) {
	if len(b) < nl.SizeofNfgenmsg {
		return chain{}, unix.EBADMSG
	}
	c := chain{family: b[0], policy: policyAccept}
	err := eachAttr(b[nl.SizeofNfgenmsg:], func(kind uint16, value []byte) error {
		switch kind {
		case unix.NFTA_CHAIN_TABLE:
			c.table = unix.ByteSliceToString(value)
		case unix.NFTA_CHAIN_NAME:
			c.name = unix.ByteSliceToString(value)
		case unix.NFTA_CHAIN_POLICY:
			c.policy = be32(value)
		case unix.NFTA_CHAIN_USE:
			c.rules = be32(value) // a base chain is used by its rules only
		case unix.NFTA_CHAIN_HOOK:
			c.base = true
			return c.parseHook(value)
		}
		return nil
	})
	return c, err
}

func (c *chain) parseHook(b []byte) error {
	return eachAttr(b, func(kind uint16, value []byte) error {
		switch kind {
		case unix.NFTA_HOOK_HOOKNUM:
			c.hook = be32(value)
		case hookDevice:
			c.devices = append(c.devices, unix.ByteSliceToString(value))
		case hookDevs:
			return eachAttr(value, func(kind uint16, value []byte) error {
				name := unix.ByteSliceToString(value)
				if len(name) == len(value) {
					name += "*" // NFTA_DEVICE_PREFIX: not terminated
				}
				c.devices = append(c.devices, name)
				return nil
			})
		}
		return nil
	})
}

// attributes is nl.ParseRouteAttr for a message whose last attribute is not padded.
func attributes(b []byte) ([]syscall.NetlinkRouteAttr, error) {
	if odd := len(b) % unix.RTA_ALIGNTO; odd != 0 {
		b = append(slices.Clip(b), make([]byte, unix.RTA_ALIGNTO-odd)...)
	}
	return nl.ParseRouteAttr(b)
}

// eachAttr calls f with the type, without flags, and the value of each netlink attribute
// in b.
func eachAttr(b []byte, f func(kind uint16, value []byte) error) error {
	attrs, err := attributes(b)
	if err != nil {
		return err
	}
	for _, a := range attrs {
		if err := f(a.Attr.Type&nlaTypeMask, a.Value); err != nil {
			return err
		}
	}
	return nil
}

// be32 decodes a big-endian 32-bit attribute, or is MaxUint32 if it has another size.
func be32(b []byte) uint32 {
	if len(b) != 4 {
		return 1<<32 - 1
	}
	return binary.BigEndian.Uint32(b)
}

// From linux/xfrm.h.
const (
	xfrmGetDefault  = 0x28 // XFRM_MSG_GETDEFAULT, since Linux 5.14
	xfrmPolicyBlock = 1    // XFRM_USERPOLICY_BLOCK
)

// xfrmReason looks for an IPsec policy whose selector matches outer packets.
func xfrmReason(device int, local, remote [4]byte) (string, error) {
	policies, err := netlink.XfrmPolicyList(netlink.FAMILY_V4)
	for tries := 0; errors.Is(err, netlink.ErrDumpInterrupted) && tries < 3; tries++ {
		policies, err = netlink.XfrmPolicyList(netlink.FAMILY_V4)
	}
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		return "", nil // a kernel without IPsec
	}
	if err != nil {
		return "", fmt.Errorf("list the IPsec policies: %w", err)
	}
	for _, p := range policies {
		src, dst := local, remote
		if p.Dir == netlink.XFRM_DIR_IN {
			src, dst = remote, local
		}
		if p.Dir != netlink.XFRM_DIR_IN && p.Dir != netlink.XFRM_DIR_OUT ||
			p.Proto != 0 && p.Proto != unix.IPPROTO_IPIP ||
			p.Ifindex != 0 && p.Ifindex != device ||
			!covers(p.Src, src) || !covers(p.Dst, dst) {
			continue
		}
		return fmt.Sprintf("an IPsec policy applies: %v → %v, %v", p.Src, p.Dst, p.Dir), nil
	}
	// The default policy, for packets that no policy matches.
	req := nl.NewNetlinkRequest(xfrmGetDefault, 0)
	req.AddRawData(make([]byte, 4)) // struct xfrm_userpolicy_default: in, forward, out
	answers, err := req.Execute(unix.NETLINK_XFRM, xfrmGetDefault)
	if err != nil || len(answers) == 0 || len(answers[0]) < 3 {
		return "", nil // a kernel before 5.14
	}
	if a := answers[0]; a[0] == xfrmPolicyBlock || a[2] == xfrmPolicyBlock {
		return "the default IPsec policy blocks", nil
	}
	return "", nil
}

// covers reports whether a selector matches an address; nil matches any.
func covers(n *net.IPNet, a [4]byte) bool { return n == nil || n.Contains(a[:]) }

// IngressFilters is the reason not to redirect received packets by a program on the
// device's tcx ingress, ahead of its tc filters; "" if there is none. Sockets receive
// behind those filters, so SafeToBypass need not check them.
func IngressFilters(device int) (reason string) {
	filtered, err := hasFilters(device, netlink.HANDLE_MIN_INGRESS)
	switch {
	case err != nil:
		return fmt.Sprintf("cannot tell: %v", permission(err))
	case filtered:
		return "tc has filters on the ingress of the underlay device"
	}
	return ""
}

// filterReason looks for tc filters on the egress of a device, which the reason calls
// role. They belong to clsact: with the ingress qdisc in its place, which has no egress,
// the kernel answers with the filters of ingress.
func filterReason(device int, role string) (string, error) {
	all, err := qdiscs(device)
	if err != nil || !slices.ContainsFunc(all, func(q qdisc) bool { return q.kind == "clsact" }) {
		return "", err
	}
	filtered, err := hasFilters(device, netlink.HANDLE_MIN_EGRESS)
	if err != nil || !filtered {
		return "", err
	}
	return "tc has filters on the egress of the " + role, nil
}

// hasFilters reports whether a device has tc filters on parent, ingress or egress.
func hasFilters(device int, parent uint32) (bool, error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETTFILTER, unix.NLM_F_DUMP)
	req.AddData(&nl.TcMsg{Family: unix.AF_UNSPEC, Ifindex: int32(device), Parent: parent})
	filters, err := dump(req, unix.NETLINK_ROUTE, unix.RTM_NEWTFILTER)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) {
		return false, nil // a kernel without tc
	}
	if err != nil {
		return false, fmt.Errorf("list the tc filters: %w", err)
	}
	return len(filters) > 0, nil
}

// dump executes a dump request, again while the kernel says that it was interrupted.
func dump(req *nl.NetlinkRequest, protocol int, answer uint16) (answers [][]byte, err error) {
	for range 4 {
		answers, err = req.Execute(protocol, answer)
		if !errors.Is(err, netlink.ErrDumpInterrupted) && !errors.Is(err, unix.EINTR) {
			break
		}
	}
	return answers, err
}
