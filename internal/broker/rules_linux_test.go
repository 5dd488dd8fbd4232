package broker

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"ipipd/internal/netstate"
	"ipipd/internal/privileged"
	"ipipd/internal/tunnel"
)

const (
	ours, long, vrf, others = 7, 8, 9, 2 // interface indices
	longName                = "a tunnel with a long name"
)

// testHost has the interfaces t1, that of longName, t2, which is in a VRF of table 10, and eth0.
var testHost = host{
	name: func(index uint32) string {
		return map[uint32]string{ours: "t1", long: tunnel.InterfaceName(longName), vrf: "t2", others: "eth0"}[index]
	},
	table: func(index uint32) uint32 {
		if index == vrf {
			return 10
		}
		return unix.RT_TABLE_MAIN
	},
}

func testConfigs() []tunnel.Config {
	one, two, three := tunnel.Default(), tunnel.Default(), tunnel.Default()
	one.Name, one.RemoteAddress, one.RPS, one.FwMark = "t1", "198.51.100.1", "all", 5
	one.Addresses = []netstate.InterfaceAddress{
		{Prefix: netip.MustParsePrefix("10.0.0.1/30")},
		{Prefix: netip.MustParsePrefix("10.0.0.9/32"), Peer: netip.MustParseAddr("10.0.0.10")},
	}
	one.Routes = []netstate.InterfaceRoute{
		{Prefix: netip.MustParsePrefix("10.20.0.0/16")},
		{Prefix: netip.MustParsePrefix("10.30.0.0/16"), Metric: 3, Table: 100},
		{Prefix: netip.MustParsePrefix("10.40.0.0/16"), Gateway: netip.MustParseAddr("198.51.100.9")},
	}
	two.Name, two.RemoteAddress = longName, "198.51.100.2"
	three.Name, three.RemoteAddress, three.LocalAddress = "t2", "198.51.100.3", netip.MustParseAddr("192.0.2.1")
	three.IPsec.Secret = []byte("a secret of sufficient length")
	three.Routes = []netstate.InterfaceRoute{{Prefix: netip.MustParsePrefix("10.50.0.0/16")}}
	return []tunnel.Config{one, two, three}
}

func attribute(kind uint16, value []byte) []byte {
	b := binary.NativeEndian.AppendUint16(nil, uint16(4+len(value)))
	b = append(binary.NativeEndian.AppendUint16(b, kind), value...)
	return append(b, make([]byte, -len(b)&3)...)
}

func netlinkMessage(kind, flags uint16, parts ...[]byte) []byte {
	body := slices.Concat(parts...)
	b := binary.NativeEndian.AppendUint32(nil, uint32(16+len(body)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = binary.NativeEndian.AppendUint16(b, flags|unix.NLM_F_REQUEST)
	return append(append(b, make([]byte, 8)...), body...)
}

func linkHeader(index, flags, change uint32) []byte {
	return slices.Concat(make([]byte, 4), privileged.U32(index), privileged.U32(flags), privileged.U32(change))
}

func addressHeader(index uint32, bits byte) []byte {
	return append([]byte{unix.AF_INET, bits, 0, 0}, privileged.U32(index)...)
}

func routeHeader(bits byte) []byte {
	return []byte{unix.AF_INET, bits, 0, 0, 0, unix.RTPROT_STATIC, unix.RT_SCOPE_LINK, unix.RTN_UNICAST, 0, 0, 0, 0}
}

func tcHeader(index uint32) []byte {
	return append(append(make([]byte, 4), privileged.U32(index)...), make([]byte, 12)...)
}

func neighbourHeader(state, flags byte) []byte {
	return append(append([]byte{unix.AF_INET, 0, 0, 0}, privileged.U32(others)...), state, 0, flags, 0)
}

func route(kind uint16, index uint32, dst [4]byte, bits byte, table uint32, more ...[]byte) []byte {
	return netlinkMessage(kind, unix.NLM_F_CREATE, slices.Concat([][]byte{
		routeHeader(bits), attribute(unix.RTA_DST, dst[:]), attribute(unix.RTA_TABLE, privileged.U32(table)), attribute(unix.RTA_OIF, privileged.U32(index)),
	}, more)...)
}

func newAddress(index uint32, local, peer [4]byte, bits byte) []byte {
	return netlinkMessage(unix.RTM_NEWADDR, unix.NLM_F_CREATE, addressHeader(index, bits), attribute(unix.IFA_LOCAL, local[:]), attribute(unix.IFA_ADDRESS, peer[:]))
}

func filter(index uint32, kind string, options ...[]byte) []byte {
	return netlinkMessage(unix.RTM_NEWTFILTER, unix.NLM_F_CREATE, tcHeader(index), attribute(tcaKind, []byte(kind)), attribute(tcaOptions, slices.Concat(options...)))
}

// netlinkCases are messages of rtnetlink, and whether they are allowed.
var netlinkCases = []struct {
	name    string
	message []byte
	allowed bool
}{
	{"set up", netlinkMessage(unix.RTM_NEWLINK, 0, linkHeader(ours, unix.IFF_UP, unix.IFF_UP)), true},
	{"set up another", netlinkMessage(unix.RTM_NEWLINK, 0, linkHeader(others, unix.IFF_UP, unix.IFF_UP)), false},
	{"set up one that is gone", netlinkMessage(unix.RTM_NEWLINK, 0, linkHeader(99, unix.IFF_UP, unix.IFF_UP)), false},
	{"set up without an index", netlinkMessage(unix.RTM_NEWLINK, 0, linkHeader(0, unix.IFF_UP, unix.IFF_UP), attribute(unix.IFLA_IFNAME, []byte("eth0\x00"))), false},
	{"other flags", netlinkMessage(unix.RTM_NEWLINK, 0, linkHeader(ours, unix.IFF_PROMISC, unix.IFF_PROMISC)), false},
	{"flags without a mask", netlinkMessage(unix.RTM_NEWLINK, 0, linkHeader(ours, unix.IFF_UP, 0)), false},
	{"make an interface", netlinkMessage(unix.RTM_NEWLINK, unix.NLM_F_CREATE, linkHeader(ours, unix.IFF_UP, unix.IFF_UP)), false},
	{"MTU", netlinkMessage(unix.RTM_SETLINK, 0, linkHeader(ours, 0, 0), attribute(unix.IFLA_MTU, privileged.U32(1400))), true},
	{"MTU of another", netlinkMessage(unix.RTM_SETLINK, 0, linkHeader(others, 0, 0), attribute(unix.IFLA_MTU, privileged.U32(1400))), false},
	{"twice the MTU", netlinkMessage(unix.RTM_SETLINK, 0, linkHeader(ours, 0, 0), attribute(unix.IFLA_MTU, privileged.U32(1400)), attribute(unix.IFLA_MTU, privileged.U32(1400))), false},
	{"no link-local address", netlinkMessage(unix.RTM_SETLINK, 0, linkHeader(ours, 0, 0), attribute(unix.IFLA_AF_SPEC, attribute(unix.AF_INET6, attribute(unix.IFLA_INET6_ADDR_GEN_MODE, []byte{1})))), true},
	{"promote_secondaries", netlinkMessage(unix.RTM_SETLINK, 0, linkHeader(ours, 0, 0), attribute(unix.IFLA_AF_SPEC, attribute(unix.AF_INET, attribute(inetConf, attribute(promote, privileged.U32(1)))))), true},
	{"forwarding", netlinkMessage(unix.RTM_SETLINK, 0, linkHeader(ours, 0, 0), attribute(unix.IFLA_AF_SPEC, attribute(unix.AF_INET, attribute(inetConf, attribute(1, privileged.U32(1)))))), false},
	{"a master", netlinkMessage(unix.RTM_SETLINK, 0, linkHeader(ours, 0, 0), attribute(unix.IFLA_MASTER, privileged.U32(others))), false},
	{"another namespace", netlinkMessage(unix.RTM_SETLINK, 0, linkHeader(ours, 0, 0), attribute(unix.IFLA_NET_NS_PID, privileged.U32(1))), false},
	{"a name", netlinkMessage(unix.RTM_SETLINK, 0, linkHeader(ours, 0, 0), attribute(unix.IFLA_IFNAME, []byte("t3\x00"))), false},
	{"remove", netlinkMessage(unix.RTM_DELLINK, 0, linkHeader(ours, 0, 0)), true},
	{"remove another", netlinkMessage(unix.RTM_DELLINK, 0, linkHeader(others, 0, 0)), false},
	{"remove a group", netlinkMessage(unix.RTM_DELLINK, 0, linkHeader(0, 0, 0), attribute(unix.IFLA_GROUP, privileged.U32(0))), false},
	{"remove a group and ours", netlinkMessage(unix.RTM_DELLINK, 0, linkHeader(ours, 0, 0), attribute(unix.IFLA_GROUP, privileged.U32(0))), false},
	{"alternative name", netlinkMessage(rtmNewLinkProp, 0, linkHeader(long, 0, 0), attribute(iflaPropList|unix.NLA_F_NESTED, attribute(iflaAltIfname, []byte(longName+"\x00")))), true},
	{"another alternative name", netlinkMessage(rtmNewLinkProp, 0, linkHeader(long, 0, 0), attribute(iflaPropList, attribute(iflaAltIfname, []byte("eth1\x00")))), false},
	{"address", newAddress(ours, [4]byte{10, 0, 0, 1}, [4]byte{10, 0, 0, 1}, 30), true},
	{"address with a peer", newAddress(ours, [4]byte{10, 0, 0, 9}, [4]byte{10, 0, 0, 10}, 32), true},
	{"address with another peer", newAddress(ours, [4]byte{10, 0, 0, 9}, [4]byte{10, 0, 0, 11}, 32), false},
	{"address with another prefix", newAddress(ours, [4]byte{10, 0, 0, 1}, [4]byte{10, 0, 0, 1}, 8), false},
	{"another address", newAddress(ours, [4]byte{10, 0, 0, 2}, [4]byte{10, 0, 0, 2}, 30), false},
	{"address of another interface", newAddress(others, [4]byte{10, 0, 0, 1}, [4]byte{10, 0, 0, 1}, 30), false},
	{"address of another tunnel", newAddress(vrf, [4]byte{10, 0, 0, 1}, [4]byte{10, 0, 0, 1}, 30), false},
	{"remove any address", netlinkMessage(unix.RTM_DELADDR, 0, addressHeader(ours, 30), attribute(unix.IFA_LOCAL, []byte{10, 9, 9, 9})), true},
	{"remove another's address", netlinkMessage(unix.RTM_DELADDR, 0, addressHeader(others, 30), attribute(unix.IFA_LOCAL, []byte{10, 9, 9, 9})), false},
	{"route", route(unix.RTM_NEWROUTE, ours, [4]byte{10, 20}, 16, unix.RT_TABLE_MAIN), true},
	{"route in another table", route(unix.RTM_NEWROUTE, ours, [4]byte{10, 20}, 16, 100), false},
	{"route in the table local", route(unix.RTM_NEWROUTE, ours, [4]byte{10, 20}, 16, unix.RT_TABLE_LOCAL), false},
	{"route in its table", route(unix.RTM_NEWROUTE, ours, [4]byte{10, 30}, 16, 100, attribute(unix.RTA_PRIORITY, privileged.U32(3))), true},
	{"route of another metric", route(unix.RTM_NEWROUTE, ours, [4]byte{10, 30}, 16, 100), false},
	{"route in a VRF", route(unix.RTM_NEWROUTE, vrf, [4]byte{10, 50}, 16, 10), true},
	{"route beside its VRF", route(unix.RTM_NEWROUTE, vrf, [4]byte{10, 50}, 16, unix.RT_TABLE_MAIN), false},
	{"route by a gateway", route(unix.RTM_NEWROUTE, ours, [4]byte{10, 40}, 16, unix.RT_TABLE_MAIN, attribute(unix.RTA_GATEWAY, []byte{198, 51, 100, 9})), true},
	{"route by another gateway", route(unix.RTM_NEWROUTE, ours, [4]byte{10, 40}, 16, unix.RT_TABLE_MAIN, attribute(unix.RTA_GATEWAY, []byte{198, 51, 100, 8})), false},
	{"route without its gateway", route(unix.RTM_NEWROUTE, ours, [4]byte{10, 40}, 16, unix.RT_TABLE_MAIN), false},
	{"default route", route(unix.RTM_NEWROUTE, ours, [4]byte{}, 0, unix.RT_TABLE_MAIN), false},
	{"longer route", route(unix.RTM_NEWROUTE, ours, [4]byte{10, 20}, 24, unix.RT_TABLE_MAIN), false},
	{"route of another interface", route(unix.RTM_NEWROUTE, others, [4]byte{10, 20}, 16, unix.RT_TABLE_MAIN), false},
	{"route of several next hops", route(unix.RTM_NEWROUTE, ours, [4]byte{10, 20}, 16, unix.RT_TABLE_MAIN, attribute(unix.RTA_MULTIPATH, make([]byte, 8))), false},
	{"two interfaces", route(unix.RTM_NEWROUTE, ours, [4]byte{10, 20}, 16, unix.RT_TABLE_MAIN, attribute(unix.RTA_OIF, privileged.U32(others))), false},
	{"remove a route", route(unix.RTM_DELROUTE, ours, [4]byte{10, 99}, 16, unix.RT_TABLE_MAIN), true},
	{"remove another's route", route(unix.RTM_DELROUTE, others, [4]byte{10, 20}, 16, unix.RT_TABLE_MAIN), false},
	{"remove a route of any interface", netlinkMessage(unix.RTM_DELROUTE, 0, routeHeader(0)), false},
	{"clsact", netlinkMessage(unix.RTM_NEWQDISC, 0, tcHeader(ours), attribute(tcaKind, []byte("clsact\x00"))), true},
	{"another qdisc", netlinkMessage(unix.RTM_NEWQDISC, 0, tcHeader(ours), attribute(tcaKind, []byte("netem\x00"))), false},
	{"clsact of another", netlinkMessage(unix.RTM_NEWQDISC, 0, tcHeader(others), attribute(tcaKind, []byte("clsact\x00"))), false},
	{"a program", filter(ours, "bpf\x00", attribute(tcaBPFFD, privileged.U32(3)), attribute(tcaBPFName, []byte("x\x00")), attribute(tcaBPFFlags, privileged.U32(1))), true},
	{"no program", filter(ours, "bpf\x00"), false},
	{"a program on another", filter(others, "bpf\x00", attribute(tcaBPFFD, privileged.U32(3))), false},
	{"an action", filter(ours, "bpf\x00", attribute(tcaBPFFD, privileged.U32(3)), attribute(1, make([]byte, 4))), false},
	{"another filter", filter(ours, "matchall\x00", attribute(tcaBPFFD, privileged.U32(3))), false},
	{"a filter of a block", filter(0xffffffff, "bpf\x00", attribute(tcaBPFFD, privileged.U32(3))), false},
	{"remove the program", netlinkMessage(unix.RTM_DELTFILTER, 0, tcHeader(ours), attribute(tcaKind, []byte("bpf\x00"))), true},
	{"use a neighbour", netlinkMessage(unix.RTM_NEWNEIGH, unix.NLM_F_CREATE, neighbourHeader(0, unix.NTF_USE), attribute(ndaDst, []byte{192, 0, 2, 2})), true},
	{"set a neighbour", netlinkMessage(unix.RTM_NEWNEIGH, unix.NLM_F_CREATE, neighbourHeader(0, unix.NTF_USE), attribute(ndaDst, []byte{192, 0, 2, 2}), attribute(2, make([]byte, 6))), false},
	{"a permanent neighbour", netlinkMessage(unix.RTM_NEWNEIGH, unix.NLM_F_CREATE, neighbourHeader(unix.NUD_PERMANENT, 0), attribute(ndaDst, []byte{192, 0, 2, 2})), false},
	{"a routing rule", netlinkMessage(unix.RTM_NEWRULE, unix.NLM_F_CREATE, routeHeader(0)), false},
	{"cut off", netlinkMessage(unix.RTM_NEWLINK, 0, make([]byte, 6)), false},
	{"no request", func() []byte {
		b := netlinkMessage(unix.RTM_NEWLINK, 0, linkHeader(ours, unix.IFF_UP, unix.IFF_UP))
		b[6] = 0
		return b
	}(), false},
	{"too long", func() []byte {
		b := netlinkMessage(unix.RTM_NEWLINK, 0, linkHeader(ours, unix.IFF_UP, unix.IFF_UP))
		b[0]++
		return b
	}(), false},
	{"nothing", nil, false},
}

func TestRules_checkNetlink(t *testing.T) {
	r := newRules(testConfigs())
	allowed := netlinkCases[0].message
	for _, c := range netlinkCases {
		for _, b := range [][]byte{c.message, slices.Concat(allowed, c.message), slices.Concat(c.message, allowed)} {
			if c.message == nil && len(b) > 0 {
				continue
			}
			err := r.checkNetlink(unix.NETLINK_ROUTE, b, true, testHost)
			var no refusal
			if c.allowed != (err == nil) || err != nil && !errors.As(err, &no) {
				t.Errorf("%s: %v, want allowed %v", c.name, err, c.allowed)
			}
			// Without a configuration nothing is allowed but to use a neighbour.
			if err := newRules().checkNetlink(unix.NETLINK_ROUTE, b, true, testHost); err == nil && c.name != "use a neighbour" {
				t.Errorf("%s: allowed without a configuration", c.name)
			}
		}
	}
	name := attribute(iflaAltIfname, []byte(strings.Repeat("\U0010ffff", 100))) // 10 bytes each where it is quoted
	if err := r.checkNetlink(unix.NETLINK_ROUTE, netlinkMessage(rtmNewLinkProp, 0, linkHeader(long, 0, 0), attribute(iflaPropList, name)), false, testHost); err == nil || len(err.Error()) > 300 {
		t.Errorf("a long alternative name: %v", err)
	}
	if err := r.checkNetlink(unix.NETLINK_ROUTE, filter(ours, "bpf\x00", attribute(tcaBPFFD, privileged.U32(3))), false, testHost); err == nil {
		t.Error("a program of the broker's own descriptors is attached")
	}
	dump := uint16(unix.NLM_F_DUMP)
	for _, c := range []struct {
		protocol    uint32
		kind, flags uint16
		allowed     bool
	}{
		{unix.NETLINK_NETFILTER, nftGetChain, dump, true},
		{unix.NETLINK_NETFILTER, nftGetChain, 0, false},
		{unix.NETLINK_NETFILTER, unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWCHAIN, dump, false},
		{unix.NETLINK_NETFILTER, unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_DELTABLE, 0, false},
		{unix.NETLINK_NETFILTER, unix.NFNL_MSG_BATCH_BEGIN, 0, false},
		{unix.NETLINK_XFRM, xfrmGetPolicy, dump, true},
		{unix.NETLINK_XFRM, xfrmGetDefault, 0, true},
		{unix.NETLINK_XFRM, 0x12, dump, false}, // XFRM_MSG_GETSA, which has keys
		{unix.NETLINK_XFRM, 0x13, 0, false},    // XFRM_MSG_NEWPOLICY
		{unix.NETLINK_SOCK_DIAG, 20, dump, false},
		{unix.NETLINK_ROUTE, unix.RTM_GETLINK, dump, false}, // takes no privilege
	} {
		one := netlinkMessage(c.kind, c.flags, make([]byte, 16))
		if err := r.checkNetlink(c.protocol, one, false, testHost); c.allowed != (err == nil) {
			t.Errorf("message %#x of protocol %d: %v, want allowed %v", c.kind, c.protocol, err, c.allowed)
		}
		if r.checkNetlink(c.protocol, slices.Concat(one, one), false, testHost) == nil {
			t.Errorf("message %#x of protocol %d: two at once are allowed", c.kind, c.protocol)
		}
	}
}

// split parses what request returns.
func split(b []byte) (verb byte, f privileged.Fields, err error) {
	if len(b) == 0 {
		return 0, nil, errShort
	}
	f, err = parse(b[0], b[1:])
	return b[0], f, err
}

func request(verb byte, fields ...[]byte) []byte { return privileged.Append([]byte{verb}, fields...) }

func TestRules_check(t *testing.T) {
	raw, udp, tcp := object{hasDescriptor: true, domain: unix.AF_INET, typ: unix.SOCK_RAW}, object{hasDescriptor: true, domain: unix.AF_INET, typ: unix.SOCK_DGRAM}, object{hasDescriptor: true, domain: unix.AF_INET, typ: unix.SOCK_STREAM}
	queue, file, none := object{hasDescriptor: true, tun: true}, object{hasDescriptor: true}, object{}
	n := func(v int) []byte { return privileged.U32(uint32(v)) }
	const tunFlags = unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR
	option := func(level, name, value int) []byte { return request(privileged.SetOption, n(level), n(name), n(value)) }
	plain := testConfigs()[:2]
	anyLocal := testConfigs()[2:]
	anyLocal[0].LocalAddress = netip.Addr{}
	unnamed := testConfigs()[:1]
	unnamed[0].Name = ""
	noFastPath := testConfigs()[:1]
	noFastPath[0].AllowFastPath = tunnel.Off
	for _, c := range []struct {
		name    string
		request []byte
		object  object
		configs []tunnel.Config
		allowed bool
	}{
		{"raw socket of IPIP", request(privileged.Socket, n(unix.IPPROTO_IPIP)), none, plain, true},
		{"raw socket of ESP", request(privileged.Socket, n(unix.IPPROTO_ESP)), none, testConfigs(), true},
		{"raw socket of ESP without a secret", request(privileged.Socket, n(unix.IPPROTO_ESP)), none, plain, false},
		{"raw socket of ICMP", request(privileged.Socket, n(unix.IPPROTO_ICMP)), none, testConfigs(), false},
		{"raw socket of everything", request(privileged.Socket, n(unix.IPPROTO_RAW)), none, testConfigs(), false},
		{"raw socket with a descriptor", request(privileged.Socket, n(unix.IPPROTO_IPIP)), raw, plain, false},
		{"buffer", option(unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20), raw, plain, true},
		{"large buffer", option(unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 1<<30), raw, plain, false},
		{"buffer without a socket", option(unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20), none, plain, false},
		{"buffer of a file", option(unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20), file, plain, false},
		{"buffer of TCP", option(unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20), tcp, plain, false},
		{"mark", option(unix.SOL_SOCKET, unix.SO_MARK, 5), udp, plain, true},
		{"no mark", option(unix.SOL_SOCKET, unix.SO_MARK, 0), udp, plain, true},
		{"another mark", option(unix.SOL_SOCKET, unix.SO_MARK, 6), udp, plain, false},
		{"device", option(unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX, 3), raw, plain, true},
		{"transparent", option(unix.IPPROTO_IP, unix.IP_TRANSPARENT, 1), raw, plain, true},
		{"transparent UDP", option(unix.IPPROTO_IP, unix.IP_TRANSPARENT, 1), udp, plain, false},
		{"debug", option(unix.SOL_SOCKET, unix.SO_DEBUG, 1), raw, plain, false},
		{"priority", option(unix.SOL_SOCKET, unix.SO_PRIORITY, 7), raw, plain, false},
		{"port of IKE", request(privileged.Bind, []byte{192, 0, 2, 1}, n(500)), udp, testConfigs(), true},
		{"port of NAT-T", request(privileged.Bind, []byte{192, 0, 2, 1}, n(4500)), udp, testConfigs(), true},
		{"another port", request(privileged.Bind, []byte{192, 0, 2, 1}, n(53)), udp, testConfigs(), false},
		{"another address", request(privileged.Bind, []byte{192, 0, 2, 2}, n(500)), udp, testConfigs(), false},
		{"any address", request(privileged.Bind, []byte{0, 0, 0, 0}, n(500)), udp, anyLocal, false},
		{"another address, by the route", request(privileged.Bind, []byte{192, 0, 2, 2}, n(500)), udp, anyLocal, true},
		{"port of IKE without a secret", request(privileged.Bind, []byte{192, 0, 2, 1}, n(500)), udp, plain, false},
		{"port of IKE by TCP", request(privileged.Bind, []byte{192, 0, 2, 1}, n(500)), tcp, testConfigs(), false},
		{"address of another length", request(privileged.Bind, make([]byte, 16), n(500)), udp, testConfigs(), false},
		{"interface", request(privileged.AttachTUN, []byte("t1"), n(tunFlags|unix.IFF_MULTI_QUEUE|unix.IFF_TUN_EXCL)), queue, plain, true},
		{"another interface", request(privileged.AttachTUN, []byte("t2"), n(tunFlags)), queue, plain, false},
		{"automatic interface", request(privileged.AttachTUN, []byte("ipip1"), n(tunFlags)), queue, unnamed, true},
		{"automatic interface beside a name", request(privileged.AttachTUN, []byte("ipip1"), n(tunFlags)), queue, plain, false},
		{"no automatic interface", request(privileged.AttachTUN, []byte("ipip1x"), n(tunFlags)), queue, unnamed, false},
		{"interface with a zero byte", request(privileged.AttachTUN, []byte("t1\x00"), n(tunFlags)), queue, plain, false},
		{"TAP", request(privileged.AttachTUN, []byte("t1"), n(unix.IFF_TAP|unix.IFF_NO_PI|unix.IFF_VNET_HDR)), queue, plain, false},
		{"interface without a TUN", request(privileged.AttachTUN, []byte("t1"), n(tunFlags)), file, plain, false},
		{"namespace", request(privileged.Netns), queue, plain, true},
		{"namespace of a file", request(privileged.Netns), file, plain, false},
		{"programs", request(privileged.Programs, n(others)), none, nil, true},
		{"rps", request(privileged.SetRPS, []byte("t1"), []byte("all")), none, plain, true},
		{"clear rps", request(privileged.ClearRPS, []byte("t1"), []byte("all")), none, plain, true},
		{"another mask", request(privileged.SetRPS, []byte("t1"), []byte("f")), none, plain, false},
		{"rps of another", request(privileged.SetRPS, []byte("eth0"), []byte("all")), none, plain, false},
		{"rps off", request(privileged.SetRPS, []byte("t1"), nil), none, plain, false},
		{"ring buffer", request(privileged.CaptureRing), none, plain, true},
		{"ring buffer of encrypted tunnels", request(privileged.CaptureRing), none, anyLocal, false},
		{"ring buffer without a fast path", request(privileged.CaptureRing), none, noFastPath, false},
		{"ring buffer with a size", request(privileged.CaptureRing, n(1<<30)), none, plain, false},
		{"ring buffer with a descriptor", request(privileged.CaptureRing), file, plain, false},
		{"nothing", nil, none, plain, false},
		{"an unknown verb", request(200), none, plain, false},
		{"fields too many", request(privileged.Socket, n(4), n(4)), none, plain, false},
		{"fields too few", request(privileged.Bind, n(4)), udp, testConfigs(), false},
	} {
		verb, f, err := split(c.request)
		if err == nil {
			err = newRules(c.configs).check(verb, f, c.object, testHost)
		}
		var no refusal
		if c.allowed != (err == nil) || err != nil && !errors.As(err, &no) {
			t.Errorf("%s: %v, want allowed %v", c.name, err, c.allowed)
		}
	}
}

// No request makes check panic. Without a configuration it allows no bind, TUN, RPS or capture ring. A message of
// rtnetlink that it allows is, as package syscall parses it, one that checkAllowed accepts.
func FuzzRules_check(f *testing.F) {
	for _, c := range netlinkCases {
		f.Add(request(privileged.Netlink, privileged.U32(unix.NETLINK_ROUTE), c.message), true)
	}
	f.Add(request(privileged.AttachTUN, []byte("t1"), privileged.U32(unix.IFF_TUN|unix.IFF_NO_PI|unix.IFF_VNET_HDR)), true)
	f.Add(request(privileged.Bind, []byte{192, 0, 2, 1}, privileged.U32(500)), true)
	with, without := newRules(testConfigs()), newRules()
	f.Fuzz(func(t *testing.T, b []byte, descriptor bool) {
		verb, fields, err := split(b)
		if err != nil {
			return
		}
		objects := []object{{}}
		if descriptor {
			objects = []object{{hasDescriptor: true, tun: true}, {hasDescriptor: true, domain: unix.AF_INET, typ: unix.SOCK_DGRAM}, {hasDescriptor: true, domain: unix.AF_INET, typ: unix.SOCK_RAW}}
		}
		for _, o := range objects {
			changes := []byte{privileged.Bind, privileged.AttachTUN, privileged.SetRPS, privileged.ClearRPS, privileged.CaptureRing}
			if err := without.check(verb, fields, o, testHost); err == nil && slices.Contains(changes, verb) {
				t.Errorf("request %d is allowed without a configuration", verb)
			}
			if err := with.check(verb, fields, o, testHost); err != nil || verb != privileged.Netlink || fields.U32(0) != unix.NETLINK_ROUTE {
				continue
			}
			setProgram(fields[1], 77)
			read, err := syscall.ParseNetlinkMessage(fields[1])
			if err != nil {
				t.Fatalf("allowed, and no message: %v", err)
			}
			for i := range read {
				checkAllowed(t, &read[i])
			}
		}
	})
}

// checkAllowed fails the test if m is about an interface that is no tunnel's, or adds an address or route of none.
func checkAllowed(t *testing.T, m *syscall.NetlinkMessage) {
	t.Helper()
	value := func(skip int, kind uint16) (v []byte) {
		for b := m.Data[skip:]; len(b) >= 4; {
			n := int(binary.NativeEndian.Uint16(b))
			if n < 4 || n > len(b) {
				t.Fatalf("message %d: broken attributes are allowed", m.Header.Type)
			}
			if binary.NativeEndian.Uint16(b[2:])&0x3fff == kind {
				v = b[4:n]
			}
			b = b[min((n+3)&^3, len(b)):]
		}
		return v
	}
	device := uint32(0)
	switch m.Header.Type {
	case unix.RTM_NEWNEIGH:
		return
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		device = binary.NativeEndian.Uint32(value(unix.SizeofRtMsg, unix.RTA_OIF))
		dst := netip.PrefixFrom(address(value(unix.SizeofRtMsg, unix.RTA_DST)), int(m.Data[1]))
		if m.Header.Type == unix.RTM_NEWROUTE && !slices.ContainsFunc(testConfigs(), func(c tunnel.Config) bool {
			return slices.ContainsFunc(c.Routes, func(r netstate.InterfaceRoute) bool { return r.Prefix == dst })
		}) {
			t.Errorf("the route %v is allowed", dst)
		}
	default:
		device = binary.NativeEndian.Uint32(m.Data[4:])
	}
	if m.Header.Type == unix.RTM_NEWADDR {
		local := address(value(unix.SizeofIfAddrmsg, unix.IFA_LOCAL))
		if local != netip.AddrFrom4([4]byte{10, 0, 0, 1}) && local != netip.AddrFrom4([4]byte{10, 0, 0, 9}) {
			t.Errorf("the address %v is allowed", local)
		}
	}
	if device != ours && device != long && device != vrf {
		t.Errorf("message %d about interface %d is allowed", m.Header.Type, device)
	}
	kinds := []uint16{unix.RTM_NEWLINK, unix.RTM_SETLINK, unix.RTM_DELLINK, rtmNewLinkProp, unix.RTM_NEWADDR, unix.RTM_DELADDR, unix.RTM_NEWROUTE, unix.RTM_DELROUTE, unix.RTM_NEWQDISC, unix.RTM_NEWTFILTER, unix.RTM_DELTFILTER}
	if !slices.Contains(kinds, m.Header.Type) {
		t.Errorf("message %d is allowed", m.Header.Type)
	}
	if m.Header.Type == unix.RTM_NEWTFILTER {
		options := value(20, tcaOptions)
		if i := slices.Index(options, 77); i < 0 {
			t.Error("the descriptor of the program is the process's own number")
		}
	}
}
