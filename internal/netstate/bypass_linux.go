package netstate

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// policy has the host's rules for outer packets, which packets sent as frames past the IP
// stack would evade. In the IP stack they are
//   - netfilter, by nftables or by legacy iptables,
//   - IPsec policies (XFRM), and
//   - routing rules by protocol, TOS or user, which RTM_GETROUTE cannot evaluate.
//
// Frames pass the device's qdisc and the netfilter hooks of devices and bridges as the
// kernel's do; tc filters on egress are a reason because they can match the socket: see
// Host.egressFilters.
//
// Not checked are eBPF programs on a cgroup's egress, on tcx or on netfilter hooks, and
// IPVS. A policy is immutable.
type policy struct {
	iptables, rules string // the reason not to bypass the IP stack, "" if there is none
	rulesUnknown    bool   // the routing rules could not be read: rules says why
	chains          []chain
	chainsUnknown   string // why chains could not be read, else ""
	xfrm            []xfrmPolicy
	xfrmBlocks      bool   // the default policy, in or out, is block
	xfrmUnknown     string // why xfrm could not be read, else ""
}

// policyParts is a set of the parts of a policy, each of which is read as a whole.
type policyParts uint8

const (
	partIptables policyParts = 1 << iota
	partNftables
	partXfrm
	partRules
	allParts = partIptables | partNftables | partXfrm | partRules
)

// readPolicy returns old with these parts read again.
func (r *requester) readPolicy(old policy, parts policyParts) policy {
	p := old
	if parts&partIptables != 0 {
		p.iptables = reasonOf(r.iptablesReason())
	}
	if parts&partNftables != 0 {
		var err error
		p.chains, err = r.chains()
		p.chainsUnknown = reasonOf("", err)
	}
	if parts&partXfrm != 0 {
		var err error
		p.xfrm, p.xfrmBlocks, err = r.xfrmPolicies()
		p.xfrmUnknown = reasonOf("", err)
	}
	if parts&partRules != 0 {
		reason, err := r.rulesReason()
		p.rules, p.rulesUnknown = reasonOf(reason, err), err != nil
	}
	return p
}

// reasonOf returns the reason that a check found or, if it failed, its error as a reason.
func reasonOf(reason string, err error) string {
	if err != nil {
		return fmt.Sprintf("cannot tell: %v", permission(err))
	}
	return reason
}

// bypassBlocker returns the reason of netfilter or IPsec not to bypass the IP stack; "" if there is none.
func (p *policy) bypassBlocker(device int, ifname string, local, remote [4]byte) (reason string) {
	switch {
	case p.iptables != "":
		return p.iptables
	case p.chainsUnknown != "":
		return p.chainsUnknown
	}
	for i := range p.chains {
		if c := &p.chains[i]; len(c.devices) == 0 || c.isOn(ifname) {
			return fmt.Sprintf("nftables has rules in chain %s of table %s", c.name, c.table)
		}
	}
	if p.xfrmUnknown != "" {
		return p.xfrmUnknown
	}
	for i := range p.xfrm {
		if x := &p.xfrm[i]; x.applies(device, local, remote) {
			return x.reason()
		}
	}
	if p.xfrmBlocks {
		return "the default IPsec policy blocks"
	}
	return ""
}

// received returns as a reason the IPsec policy that applies to packets from remote on the device, whichever
// address of this host they come to; "" if there is none.
func (h *Host) received(device int, remote [4]byte) (reason string) {
	h.mu.Lock()
	p := h.policy
	h.mu.Unlock()
	for i := range p.xfrm {
		x := &p.xfrm[i]
		if x.dir == netlink.XFRM_DIR_IN && x.applies(device, x.dst.Addr().As4(), remote) {
			return x.reason()
		}
	}
	return ""
}

// bypass returns the reason not to send the outer packets from local to remote, and receive
// their answers, past the kernel's IP stack, as frames on the device; "" if there is none.
func (h *Host) bypass(device int, ifname string, local, remote [4]byte) (reason string) {
	if h.options.Bypass != "" {
		return h.options.Bypass
	}
	h.mu.Lock()
	p := h.policy
	h.mu.Unlock()
	if reason = p.bypassBlocker(device, ifname, local, remote); reason != "" {
		return reason
	}
	if reason = h.egressFilters(device); reason != "" {
		return reason
	}
	return p.rules
}

// iptablesReason looks for tables of legacy iptables. It does not read them, which would
// create the missing ones.
func (r *requester) iptablesReason() (string, error) {
	names, err := r.netFile(fileIptables)
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

// chains returns the base chains of nftables (iptables-nft included) that outer packets may
// traverse on some device, and that can do more than accept.
func (r *requester) chains() (all []chain, err error) {
	req := nl.NewNetlinkRequest(nftGetChain, 0)
	req.AddData(&nl.Nfgenmsg{NfgenFamily: unix.NFPROTO_UNSPEC, Version: nl.NFNETLINK_V0})
	messages, err := r.dump(req, unix.NETLINK_NETFILTER, nftNewChain)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPROTONOSUPPORT) {
		return nil, nil // a kernel without nftables, or without netfilter
	}
	for i := 0; err == nil && i < len(messages); i++ {
		var c chain
		if c, err = parseChain(messages[i]); err == nil && c.applies() {
			c.rules = min(c.rules, 1) // a change of their number does not change the policy
			all = append(all, c)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("list the chains of nftables: %w", err)
	}
	return all, nil
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

// be32 decodes a big-endian 32-bit attribute; MaxUint32 if it has another size.
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

// xfrmPolicy is what is read of an IPsec policy.
type xfrmPolicy struct {
	dir      netlink.Dir
	src, dst netip.Prefix
	device   int // 0: any
}

// xfrmPolicies returns the IPsec policies whose selectors can match packets of protocol 4, and
// whether the default for packets that no policy matches is to block.
func (r *requester) xfrmPolicies() (all []xfrmPolicy, blocks bool, err error) {
	req := nl.NewNetlinkRequest(nl.XFRM_MSG_GETPOLICY, 0)
	req.AddData(nl.NewIfInfomsg(unix.AF_INET))
	messages, err := r.dump(req, unix.NETLINK_XFRM, nl.XFRM_MSG_NEWPOLICY)
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		return nil, false, nil // a kernel without IPsec
	}
	if err != nil {
		return nil, false, fmt.Errorf("list the IPsec policies: %w", err)
	}
	for _, m := range messages {
		if p, ok := parseXfrmPolicy(m); ok {
			all = append(all, p)
		}
	}
	req = nl.NewNetlinkRequest(xfrmGetDefault, 0)
	req.AddRawData(make([]byte, 4)) // struct xfrm_userpolicy_default: in, forward, out
	answers, err := r.execute(req, unix.NETLINK_XFRM, xfrmGetDefault)
	if err != nil || len(answers) == 0 || len(answers[0]) < 3 {
		return all, false, nil // a kernel before 5.14
	}
	return all, answers[0][0] == xfrmPolicyBlock || answers[0][2] == xfrmPolicyBlock, nil
}

// parseXfrmPolicy reads an XFRM_MSG_NEWPOLICY, which starts with a struct
// xfrm_userpolicy_info. ok is false for a policy that matches no outer packet.
func parseXfrmPolicy(b []byte) (p xfrmPolicy, ok bool) {
	if len(b) < nl.SizeofXfrmUserpolicyInfo {
		return xfrmPolicy{}, false
	}
	info := nl.DeserializeXfrmUserpolicyInfo(b)
	sel := &info.Sel
	p = xfrmPolicy{dir: netlink.Dir(info.Dir), device: int(sel.Ifindex),
		src: netip.PrefixFrom(netip.AddrFrom4([4]byte(sel.Saddr[:4])), int(sel.PrefixlenS)),
		dst: netip.PrefixFrom(netip.AddrFrom4([4]byte(sel.Daddr[:4])), int(sel.PrefixlenD))}
	return p, sel.Family == unix.AF_INET && (sel.Proto == 0 || sel.Proto == unix.IPPROTO_IPIP) &&
		(p.dir == netlink.XFRM_DIR_IN || p.dir == netlink.XFRM_DIR_OUT)
}

func (p *xfrmPolicy) reason() string {
	return fmt.Sprintf("an IPsec policy applies: %v → %v, %v", p.src, p.dst, p.dir)
}

// applies reports whether the policy's selector matches outer packets on the device.
func (p *xfrmPolicy) applies(device int, local, remote [4]byte) bool {
	src, dst := local, remote
	if p.dir == netlink.XFRM_DIR_IN {
		src, dst = remote, local
	}
	return (p.device == 0 || p.device == device) &&
		p.src.Contains(netip.AddrFrom4(src)) && p.dst.Contains(netip.AddrFrom4(dst))
}
