package broker

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"ipipd/internal/netstate"
	"ipipd/internal/tunnel"
)

// A message has to mean here what it means to the kernel: one that the kernel could parse differently is refused.
const (
	rtmNewLinkProp = 108 // RTM_NEWLINKPROP
	iflaPropList   = 52  // IFLA_PROP_LIST
	iflaAltIfname  = 53  // IFLA_ALT_IFNAME
	ndaDst         = 1   // NDA_DST
	xfrmGetPolicy  = 0x15
	xfrmGetDefault = 0x28
	tcaKind        = 1
	tcaOptions     = 2
	tcaBPFFD       = 6
	tcaBPFName     = 7
	tcaBPFFlags    = 8
	nftGetChain    = unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETCHAIN
	inetConf       = 1  // IFLA_INET_CONF
	promote        = 20 // IPV4_DEVCONF_PROMOTE_SECONDARIES
)

// message is a netlink message; body is what follows its header.
type message struct {
	kind, flags uint16
	body        []byte
}

var errMessage = refuse("a broken message of netlink")

// messages splits a request into its netlink messages. Anything else in it is an error.
func messages(b []byte) (all []message, err error) {
	for len(b) > 0 {
		if len(b) < unix.SizeofNlMsghdr {
			return nil, errMessage
		}
		n := binary.NativeEndian.Uint32(b)
		m := message{kind: binary.NativeEndian.Uint16(b[4:]), flags: binary.NativeEndian.Uint16(b[6:])}
		if n < unix.SizeofNlMsghdr || n > uint32(len(b)) || n%unix.NLMSG_ALIGNTO != 0 || m.flags&unix.NLM_F_REQUEST == 0 {
			return nil, errMessage
		}
		m.body, b = b[unix.SizeofNlMsghdr:n], b[n:]
		all = append(all, m)
	}
	if all == nil {
		return nil, errMessage
	}
	return all, nil
}

// attributes returns the attributes after the first n bytes of b, by type. It fails on one not allowed, or there twice.
func attributes(b []byte, n int, allowed ...uint16) (map[uint16][]byte, error) {
	const typeMask = 0x3fff // NLA_TYPE_MASK
	if len(b) < n {
		return nil, errMessage
	}
	all := map[uint16][]byte{}
	for b = b[n:]; len(b) > 0; {
		if len(b) < unix.SizeofNlAttr {
			return nil, errMessage
		}
		size, kind := int(binary.NativeEndian.Uint16(b)), binary.NativeEndian.Uint16(b[2:])&typeMask
		if size < unix.SizeofNlAttr || size > len(b) {
			return nil, errMessage
		}
		if _, twice := all[kind]; twice || !slices.Contains(allowed, kind) {
			return nil, refuse("attribute %d of a message of netlink", kind)
		}
		all[kind] = b[unix.SizeofNlAttr:size:size]
		b = b[min((size+3)&^3, len(b)):]
	}
	return all, nil
}

func u32(b []byte) uint32 {
	if len(b) != 4 {
		return 0
	}
	return binary.NativeEndian.Uint32(b)
}

// address returns the IPv4 address in an attribute; the zero Addr if it has none.
func address(b []byte) netip.Addr {
	if len(b) != 4 {
		return netip.Addr{}
	}
	return netip.AddrFrom4([4]byte(b))
}

// checkNetlink checks the messages of a request. program: the request has the descriptor of a program.
func (r *rules) checkNetlink(protocol uint32, b []byte, program bool, h host) error {
	all, err := messages(b)
	if err != nil {
		return err
	}
	for _, m := range all {
		switch {
		case protocol == unix.NETLINK_ROUTE:
			err = r.checkRoute(m, program, h)
		case len(all) > 1:
			err = refuse("several requests of netlink protocol %d at once", protocol)
		case protocol == unix.NETLINK_NETFILTER && m.kind == nftGetChain && m.flags&unix.NLM_F_DUMP == unix.NLM_F_DUMP,
			protocol == unix.NETLINK_XFRM && m.kind == xfrmGetPolicy && m.flags&unix.NLM_F_DUMP == unix.NLM_F_DUMP,
			protocol == unix.NETLINK_XFRM && m.kind == xfrmGetDefault: // these only read, and no keys
		default:
			err = refuse("message %d of netlink protocol %d", m.kind, protocol)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// checkRoute checks a message of rtnetlink.
func (r *rules) checkRoute(m message, program bool, h host) error {
	const index = 4 // in ifinfomsg, ifaddrmsg, tcmsg and ndmsg
	if m.kind == unix.RTM_NEWNEIGH {
		return checkNeighbour(m)
	}
	if m.kind == unix.RTM_NEWROUTE || m.kind == unix.RTM_DELROUTE {
		return r.checkRouteChange(m, h)
	}
	if len(m.body) < index+4 {
		return errMessage
	}
	device := binary.NativeEndian.Uint32(m.body[index:])
	name := h.name(device)
	configs := r.configs(name)
	if configs == nil {
		return refuse("a change of interface %d, %q", device, name)
	}
	switch m.kind {
	case unix.RTM_NEWLINK, unix.RTM_SETLINK:
		return checkLink(m)
	case unix.RTM_DELLINK:
		_, err := attributes(m.body, unix.SizeofIfInfomsg)
		return err
	case rtmNewLinkProp:
		a, err := attributes(m.body, unix.SizeofIfInfomsg, iflaPropList)
		if err == nil {
			a, err = attributes(a[iflaPropList], 0, iflaAltIfname)
		}
		alt := string(bytes.TrimSuffix(a[iflaAltIfname], []byte{0}))
		if err == nil && !slices.ContainsFunc(configs, func(c *tunnel.Config) bool { return c.Name == alt }) {
			err = refuse("the alternative name %q of %s", alt[:min(len(alt), 60)], name)
		}
		return err
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		a, err := attributes(m.body, unix.SizeofIfAddrmsg, unix.IFA_LOCAL, unix.IFA_ADDRESS, unix.IFA_BROADCAST)
		if err == nil && m.kind == unix.RTM_NEWADDR {
			err = checkAddress(m, a, configs, name)
		}
		return err
	case unix.RTM_NEWQDISC:
		a, err := attributes(m.body, unix.SizeofIfInfomsg+4, tcaKind)
		if err == nil && string(a[tcaKind]) != "clsact\x00" {
			err = refuse("a queueing discipline of %s", name)
		}
		return err
	case unix.RTM_NEWTFILTER, unix.RTM_DELTFILTER:
		_, err := filterProgram(m)
		if err == nil && m.kind == unix.RTM_NEWTFILTER && !program {
			err = refuse("a filter of %s without its program", name)
		}
		return err
	}
	return refuse("message %d of rtnetlink", m.kind)
}

// checkLink checks that a tunnel's interface is only set up, or given MTU, txqueuelen, addr_gen_mode, promote_secondaries.
func checkLink(m message) error {
	a, err := attributes(m.body, unix.SizeofIfInfomsg, unix.IFLA_MTU, unix.IFLA_TXQLEN, unix.IFLA_AF_SPEC)
	if err != nil {
		return err
	}
	flags, change := binary.NativeEndian.Uint32(m.body[8:]), binary.NativeEndian.Uint32(m.body[12:])
	if m.flags&(unix.NLM_F_CREATE|unix.NLM_F_REPLACE) != 0 || flags != change || flags&^unix.IFF_UP != 0 {
		return refuse("other flags of an interface")
	}
	families, err := attributes(a[unix.IFLA_AF_SPEC], 0, unix.AF_INET, unix.AF_INET6)
	if err == nil {
		_, err = attributes(families[unix.AF_INET6], 0, unix.IFLA_INET6_ADDR_GEN_MODE)
	}
	var conf map[uint16][]byte
	if err == nil {
		conf, err = attributes(families[unix.AF_INET], 0, inetConf)
	}
	if err == nil {
		_, err = attributes(conf[inetConf], 0, promote)
	}
	return err
}

// checkAddress checks that an address to be added to a tunnel's interface is configured.
func checkAddress(m message, a map[uint16][]byte, configs []*tunnel.Config, name string) error {
	local, peer, bits := address(a[unix.IFA_LOCAL]), address(a[unix.IFA_ADDRESS]), int(m.body[1])
	for _, c := range configs {
		for _, has := range c.Addresses {
			want := has.Peer
			if !want.IsValid() {
				want = has.Prefix.Addr()
			}
			if m.body[0] == unix.AF_INET && m.body[2] == 0 && m.body[3] == 0 && has.Prefix == netip.PrefixFrom(local, bits) && peer == want {
				return nil
			}
		}
	}
	return refuse("the address %v/%d of %s", local, bits, name)
}

// checkRouteChange checks a route into a tunnel's interface: one to be added has to be configured.
func (r *rules) checkRouteChange(m message, h host) error {
	a, err := attributes(m.body, unix.SizeofRtMsg, unix.RTA_DST, unix.RTA_TABLE, unix.RTA_OIF, unix.RTA_GATEWAY, unix.RTA_PRIORITY)
	if err != nil {
		return err
	}
	const family, dstLen, srcLen, tos, kind = 0, 1, 2, 3, 7
	device := u32(a[unix.RTA_OIF])
	name := h.name(device)
	configs := r.configs(name)
	dst, gateway := netip.PrefixFrom(address(a[unix.RTA_DST]), int(m.body[dstLen])), address(a[unix.RTA_GATEWAY])
	table := u32(a[unix.RTA_TABLE])
	if configs == nil || m.body[family] != unix.AF_INET || m.body[srcLen] != 0 || m.body[tos] != 0 || m.body[kind] != unix.RTN_UNICAST || table == 0 ||
		a[unix.RTA_GATEWAY] != nil && !gateway.IsValid() || a[unix.RTA_PRIORITY] != nil && len(a[unix.RTA_PRIORITY]) != 4 {
		return refuse("the route %v of interface %d, %q", dst, device, name)
	}
	if m.kind == unix.RTM_DELROUTE { // RTA_OIF limits it to routes into the tunnel's interface
		return nil
	}
	for _, c := range configs {
		for _, has := range c.Routes {
			if has == (netstate.InterfaceRoute{Prefix: dst, Gateway: gateway, Metric: u32(a[unix.RTA_PRIORITY]), Table: has.Table}) &&
				(has.Table == table || has.Table == 0 && table == h.table(device)) {
				return nil
			}
		}
	}
	return refuse("the route %v of %s", dst, name)
}

// checkNeighbour checks that a message only has the kernel resolve a neighbour, as a packet to it would.
func checkNeighbour(m message) error {
	const family, state, flags, kind, size = 0, 8, 10, 11, 12
	a, err := attributes(m.body, size, ndaDst)
	if err == nil && (m.body[family] != unix.AF_INET || m.body[state] != 0 || m.body[state+1] != 0 || m.body[flags] != unix.NTF_USE || m.body[kind] != 0 || !address(a[ndaDst]).IsValid()) {
		err = refuse("a change of a neighbour")
	}
	return err
}

// filterProgram returns the bytes, within a filter's message, of its program's descriptor; nil if it has none.
func filterProgram(m message) (fd []byte, err error) {
	const size = 20 // struct tcmsg
	a, err := attributes(m.body, size, tcaKind, tcaOptions)
	if err != nil {
		return nil, err
	}
	options, err := attributes(a[tcaOptions], 0, tcaBPFFD, tcaBPFName, tcaBPFFlags)
	if err != nil {
		return nil, err
	}
	if string(a[tcaKind]) != "bpf\x00" || m.kind == unix.RTM_NEWTFILTER && len(options[tcaBPFFD]) != 4 {
		return nil, refuse("a filter of another kind than bpf")
	}
	return options[tcaBPFFD], nil
}

// setProgram puts the descriptor of a program into all messages that name one.
func setProgram(b []byte, fd int) {
	all, _ := messages(b)
	for _, m := range all {
		if m.kind == unix.RTM_NEWTFILTER {
			if at, err := filterProgram(m); err == nil && at != nil {
				binary.NativeEndian.PutUint32(at, uint32(fd))
			}
		}
	}
}
