package drop

// text is what is said about a Reason. Backquotes mark commands, names and values.
type text struct{ name, why, remedy string }

var texts = [NumReasons]text{
	None: {name: "none"},

	InnerNotIPv4: {
		"inner-not-ipv4",
		"not IPv4, most often the IPv6 that a host tries on each interface",
		"none needed; `sysctl net.ipv6.conf.ipip1.disable_ipv6=1` stops it",
	},
	InnerMalformed: {
		"inner-malformed",
		"the header or its lengths are invalid",
		"look at who sends it: `tcpdump -ni ipip1`",
	},
	InnerTTLZero: {
		"inner-ttl-zero",
		"TTL 0 is never encapsulated (RFC 2003, 3.1)",
		"look for a routing loop",
	},
	InnerTooLong: {
		"inner-too-long",
		"more than 65515 bytes do not fit behind an outer header",
		"lower the MTU",
	},
	Loop: {
		"loop",
		"an outer packet of the tunnel was routed into it, or one that came from its remote end (RFC 2003, 3.2)",
		"give the remote a route that does not go through the tunnel, or `--underlay-device`",
	},
	TooBig: {
		"too-big",
		"longer than the path MTU, and DF forbids fragments; the sender is told by ICMP 3/4",
		"none needed; if TCP stalls, see that the sender gets the ICMP",
	},
	FragmentFailed: {
		"fragment-failed",
		"could not be fragmented to the path MTU",
		"raise the path MTU: the inner header's options leave no room",
	},
	NoPath: {
		"no-path",
		"no route to the remote, or its name has no address",
		"see `ip route get REMOTE`",
	},
	NoRemote: {
		"no-remote",
		"no route of an interface with many remotes covers the inner destination, or the one that does is a blackhole",
		"see `ip route show table all dev ipip1`; `ip route add PREFIX via REMOTE dev ipip1 onlink`",
	},
	RemoteNotUsable: {
		"remote-not-usable",
		"the gateway of its route, without one the inner destination, is not a unicast IPv4 address that can be a remote",
		"see `ip route show table all dev ipip1`; for multicast name the remote: `ip route add 224.0.0.0/4 via REMOTE dev ipip1 onlink`",
	},
	NoLocalAddress: {
		"no-local-address",
		"the local address is not on this host, which sends nothing from it; `print` shows `waiting-for`",
		"none needed on a VRRP backup; else `ip addr add`, or another `--local-address`",
	},
	QueueFull: {
		"queue-full",
		"the transmit queue of the underlay device was full",
		"none needed for a few, TCP's normal signal; else the link is saturated",
	},
	SendFailed: {
		"send-failed",
		"the kernel refused to send",
		"look for a firewall rule in OUTPUT, and under systemd for `IPAddressDeny=`: `systemctl show -p IPAddressDeny -p IPAddressAllow ipipd`",
	},

	ReceiveOverflow: {
		"receive-overflow",
		"the receive buffer was full before the packet was read",
		"none needed for a few; else the processor does not keep up",
	},
	OuterMalformed: {
		"outer-malformed",
		"outer version, header length or total length is invalid",
		"look at the path: `tcpdump -vni IF ip proto 4`",
	},
	OuterNotIPIP: {
		"outer-not-ipip",
		"the outer protocol is not 4",
		"report it",
	},
	OuterFragment: {
		"outer-fragment",
		"a fragment that the kernel did not reassemble",
		"report it: the kernel reassembles before ipipd receives",
	},
	OuterChecksum: {
		"outer-checksum",
		"the outer header checksum is wrong",
		"look for a broken device on the path",
	},
	UnknownPeer: {
		"unknown-peer",
		"no tunnel of this process has these outer addresses (RFC 2003, 6.2)",
		"compare local and remote address of both ends. It is counted where a process has several tunnels; with one the kernel answers such a packet with ICMP protocol unreachable and counts it: `nstat -az IpInUnknownProtos`",
	},
	ReversePath: {
		"reverse-path",
		"an interface with many remotes has no route to the inner source that leads to the outer source (strict reverse path, RFC 3704, 2.2)",
		"if the remote may send it, `ip route add PREFIX via REMOTE dev ipip1 onlink`, or `--accept-from`; else someone forges",
	},
	NotInAcceptFrom: {
		"not-in-accept-from",
		"the outer source is not in `accept-from`, nor reached by the route to the inner source",
		"if the remote may send it, add it to `--accept-from`; else someone forges",
	},
	NotInAcceptTo: {
		"not-in-accept-to",
		"the inner destination is not in `accept-to`",
		"if it is an address that is served here, add it to `--accept-to`",
	},
	ReceivedNotIPv4: {
		"received-not-ipv4",
		"the inner packet is not IPv4",
		"look at the peer's configuration: it sends IPv6, or something else",
	},
	ReceivedTruncated: {
		"received-truncated",
		"the inner packet is longer than what the outer one carries",
		"look for a device on the path that cuts packets",
	},
	ReceivedMalformed: {
		"received-malformed",
		"inner header length or total length is invalid",
		"look at what the peer sends",
	},
	ReceivedChecksum: {
		"received-checksum",
		"the inner header checksum is wrong",
		"look for a broken device between the inner sender and here",
	},
	ReceivedTTLZero: {
		"received-ttl-zero",
		"TTL 0 after decapsulation (RFC 2003, 3.1)",
		"look for a routing loop behind the peer",
	},
	ReceivedLoop: {
		"received-loop",
		"the inner packet is one that this end itself would send to the remote, or a packet of this tunnel inside this tunnel",
		"look for a loop at the peer, or for someone who forges packets",
	},
	ECNCEOnNotECT: {
		"ecn-ce-on-not-ect",
		"congestion was marked on the way and the inner transport can be told only by a loss (RFC 6040, 4.2)",
		"none needed: it is congestion",
	},
	SuperpacketSizeUnknown: {
		"superpacket-size-unknown",
		"datagrams were merged on their way and their boundaries are lost",
		"a few at the start, and after a minute without any: the peer is on the same physical host, and reception has moved to the link layer since. If it goes on, a netfilter rule keeps it from there: `ethtool -K IF tx-udp-segmentation off` at the sender",
	},
	ReflectTTLExpired: {
		"reflect-ttl-expired",
		"a reflect probe whose TTL does not allow sending it back",
		"look at what the peer sends",
	},
	ReflectLimited: {
		"reflect-limited",
		"more reflect probes than are answered (1000 a second, of each of many remotes 10)",
		"someone floods: limit protocol 4 to the peer's address",
	},
	ReceivedNotRunning: {
		"received-not-running",
		"the interface is not up",
		"`ip link set ipip1 up`",
	},
	WriteFailed: {
		"write-failed",
		"the host's network stack refused the packet",
		"look at the interface: `ip link show ipip1`",
	},

	ESPNoSA: {
		"esp-no-sa",
		"there was no SA to send by, or none with the SPI that came",
		"see `ipsec` in `print`; a few before the first SA are normal",
	},
	ESPNoGateway: {
		"esp-no-gateway",
		"the inner destination's route has no gateway: with many remotes only a gateway gets an SA",
		"name the remote: `ip route replace PREFIX via REMOTE dev ipip1 onlink`",
	},
	ESPPlainText: {
		"esp-plain-text",
		"the peer sent it unencrypted",
		"set the secret at the peer too",
	},
	ESPAuthentication: {
		"esp-authentication",
		"the integrity check failed",
		"damage on the way, or a forgery",
	},
	ESPReplay: {
		"esp-replay",
		"it had come before, or came too late for the window of 1024",
		"a few are a network that reorders; many are a replay",
	},
	ESPMalformed: {
		"esp-malformed",
		"the header or its lengths are invalid",
		"look at the path: `tcpdump -vni IF ip proto 50`",
	},
	ESPFragment: {
		"esp-fragment",
		"a fragment that the kernel did not reassemble",
		"report it: the kernel reassembles before ipipd receives",
	},
	ESPPadding: {
		"esp-padding",
		"authentic, and its padding is wrong",
		"report it, with the peer's version",
	},
	ESPSelector: {
		"esp-selector",
		"authentic, and not protocol 4",
		"the peer's policy is for more than this tunnel",
	},
	ESPDummy: {
		"esp-dummy",
		"a dummy packet of the peer (RFC 4303, 2.6)",
		"none needed",
	},
	ESPExhausted: {
		"esp-exhausted",
		"the SA must not be used any more, and no new one came in time",
		"see `ipsec` in `print`",
	},
	ESPNoRoom: {
		"esp-no-room",
		"it would be longer than IPv4 allows once it is sealed",
		"lower the MTU",
	},

	ICMPForbidden: {
		"icmp-forbidden",
		"the packet is one that no ICMP error may be about (RFC 1122, 3.2.2)",
		"none needed",
	},
	ICMPLimited: {
		"icmp-limited",
		"more ICMP errors than the tunnel makes (1000 a second)",
		"look for the sender that ignores them",
	},
	OuterErrorMalformed: {
		"outer-error-malformed",
		"an ICMP error that came in is damaged",
		"look at the path",
	},
	OuterErrorIgnored: {
		"outer-error-ignored",
		"a kind that says nothing about the path (RFC 2003, 4)",
		"none needed",
	},
	OuterErrorNotBelieved: {
		"outer-error-not-believed",
		"it contradicts what is known, or is about a packet that the tunnel cannot have sent: forged, or late",
		"none needed; many of them are someone who forges, or, encrypted behind a NAT, a router that quotes 8 bytes only",
	},
}
