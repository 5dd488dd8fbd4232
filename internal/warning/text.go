package warning

var texts = [NumCodes]Text{
	InterfaceGone: {
		"interface-gone", Broken, "the interface is gone", "it is made again",
		"none needed; to end a tunnel: ipipd down NAME", "the interface is made again", Always,
	},
	InterfaceNotMade: {
		"interface-not-made", Broken, "the interface cannot be made again", "it is tried again and again",
		"ip link show NAME, if another has its name", "", Always,
	},
	InterfaceMoved: {
		"interface-moved", Note, "the interface is in another network namespace", "ipipd sets nothing there",
		"set its addresses, routes and MTU there", "the interface is back in the network namespace of ipipd", Always,
	},
	NotRestored: {
		"not-restored", Warning, "what the interface has lost cannot be put back", "packets for it take another way",
		"ip address show NAME; ip route show", "", Always,
	},
	LeftAlone: {
		"left-alone", Warning, "an address or a route of the interface is taken away again and again", "it is left alone, until the interface was set down",
		"find what removes it (ip monitor address route) and have it leave the interface; then ip link set NAME down, and up", "", Always,
	},
	CarrierNotSet: {
		"carrier-not-set", Warning, "the carrier cannot be set", "routes do not follow the state of the tunnel",
		"none: it is tried again", "", Always,
	},
	MTUNotSet: {
		"mtu-not-set", Warning, "the MTU cannot be set", "it is not what the route takes",
		"ip link set NAME mtu, or another --mtu", "", Always,
	},
	RPSNotSet: {
		"rps-not-set", Warning, "rps is not set as configured", "received flows stay on the processors that they come by",
		"have /sys writable, or --rps off", "", Always,
	},
	FastPathFull: {
		"fast-path-full", Warning, "the fast path does not take all routes, remotes or addresses of the host", "packets are carried in userspace",
		"none needed but for the rate; else fewer routes out of NAME, as by aggregation, or addresses", "the fast path takes all routes and addresses", Always,
	},
	SysctlNotSet: {
		"sysctl-not-set", Warning, "a sysctl cannot be set as --manage-sysctls says", "what it is needed for stays as the warnings beside this one say",
		"run ipipd as root or with CAP_NET_ADMIN, with /proc/sys writable; or set it on the host", "", Always,
	},
	RPFilterTunnel: {
		"rp-filter-tunnel", Broken, "rp_filter drops packets that come out of the tunnel", "their sources are not routed into it",
		"--manage-sysctls, or sysctl -w net.ipv4.conf.NAME.rp_filter=0 net.ipv4.conf.all.rp_filter=0", "", Always,
	},
	VIPMissing: {
		"vip-missing", Warning, "no interface has an address of accept-to", "what comes for it is routed on, or dropped",
		"ip address add it to lo, or --address", "an address of accept-to is on this host", Always,
	},
	VIPAnswered: {
		"vip-answered", Warning, "this host answers ARP for an address of the load balancer", "packets for it come here, past the balancer",
		"--manage-sysctls, or sysctl -w net.ipv4.conf.all.arp_ignore=1 net.ipv4.conf.all.arp_announce=2", "", Always,
	},
	SYNACKMSS: {
		"syn-ack-mss", Warning, "the MSS of SYN-ACKs is larger than what fits the tunnel", "the balancer has to fragment, or drop, what clients send",
		"ip route change default … advmss 1440", "", Always,
	},
	NameNotResolved: {
		"name-not-resolved", Broken, "the name of the remote has no address", "nothing is sent until it has one",
		"see that this host can resolve it, or give its IPv4 address", "", Always,
	},
	NameNotRefreshed: {
		"name-not-refreshed", Warning, "the name of the remote is not resolved again", "its last address stays in use",
		"see that this host can resolve it", "the name is resolved again", Limited,
	},
	OtherAddress: {
		"other-address", Note, "the name of the remote has another address", "it is used once the peer is heard from it, or no longer from the current one",
		"none needed, if the peer moves; else correct the record", "", Limited,
	},
	NoRoute: {
		"no-route", Broken, "there is no route to the remote", "nothing is sent until there is one",
		"add one, or set --underlay-device", "", Always,
	},
	NoPath: {
		"no-path", Broken, "there is no way to the remote", "nothing is sent until there is one",
		"ip route get REMOTE", "", Always,
	},
	SamePair: {
		"same-pair", Broken, "another tunnel has the same outer addresses", "nothing is sent: only one can have both",
		"end one of them, or give it another --local-address", "", Always,
	},
	NoLocalAddress: {
		"no-local-address", Warning, "local-address is not on this host", "nothing is sent until it is",
		"none needed on a VRRP backup; else ip address add, or another --local-address", "local-address is on this host", Always,
	},
	RouteLoop: {
		"route-loop", Broken, "outer packets are routed back into the tunnel", "a loop, so they are dropped",
		"give REMOTE a route that does not go through NAME, or set --underlay-device", "", Limited,
	},
	MTUFeedback: {
		"mtu-feedback", Warning, "the route to the remote seems to lead, through another tunnel, into this one", "the MTU is not lowered any further",
		"give REMOTE a route that goes through no tunnel, or set --underlay-device", "", Always,
	},
	PathMTULowered: {
		"path-mtu-lowered", Note, "a router has lowered the path MTU", "larger packets are fragmented, or their senders told",
		"none needed: it is forgotten after ten minutes", "the path MTU is forgotten: larger packets are tried again", Limited,
	},
	RemoteUnreachable: {
		"remote-unreachable", Warning, "outer packets do not arrive", "a router, or the remote, answers ICMP unreachable",
		"traceroute -n REMOTE", "", Limited,
	},
	PeerNotSetUp: {
		"peer-not-set-up", Broken, "nothing at the remote takes the packets", "it answers ICMP protocol unreachable",
		"set up its end of the tunnel: ipipd peer-config NAME", "", Limited,
	},
	PeerNotHeard: {
		"peer-not-heard", Broken, "the peer is not heard", "the tunnel is not running",
		"see whether REMOTE is up, and protocol 4 passes in both directions", "", Always,
	},
	KeepaliveUnanswered: {
		"keepalive-unanswered", Warning, "the peer does not answer probes", "only what it sends keeps the tunnel running",
		"ipipd set NAME keepalive-probe=echo keepalive-target=PEER-INNER-ADDRESS, or keepalive=off; if it did before, let protocol 4 in where it is lost on the way to REMOTE", "", Limited,
	},
	KeepaliveBehindNAT: {
		"keepalive-behind-nat", Warning, "the local address is private and the remote is not", "behind a NAT nobody but ipipd answers reflect probes",
		"ipipd set NAME keepalive-probe=echo keepalive-target=PEER-INNER-ADDRESS", "", Always,
	},
	PeerBehindNAT: {
		"peer-behind-nat", Note, "the peer says that it is behind a NAT, and answers no reflect probe", "only its own probes and the data that it sends keep the tunnel running",
		"ipipd set NAME keepalive-probe=echo keepalive-target=PEER-INNER-ADDRESS", "", Limited,
	},
	PeerMTU: {
		"peer-mtu", Warning, "the peer sends packets that are longer than the MTU of this end", "protocols that compare them, OSPF for one, do not come up",
		"give both ends the same --mtu", "", Limited,
	},
	Fragments: {
		"fragments", Note, "packets above the path MTU are sent in fragments", "fast where none is lost, and one lost fragment loses the whole packet",
		"none needed where nothing is lost; else --mtu auto at both ends", "", Always,
	},
	FragmentLoss: {
		"fragment-loss", Warning, "fragments are lost on the way here", "with each its whole packet is",
		"--mtu auto at both ends", "", Limited,
	},
	IPsecNotEstablished: {
		"ipsec-not-established", Broken, "there is no SA", "nothing is sent without one",
		"see docs/troubleshooting.md for the text", "", Elsewhere,
	},
	ESPFiltered: {
		"esp-filtered", Broken, "an SA is established, but no ESP is received", "a firewall on the path may pass IKE and drop ESP (IP protocol 50)",
		"let ESP, or UDP 4500 behind a NAT, in from REMOTE", "", Elsewhere,
	},
	WeakAlgorithms: {
		"weak-algorithms", Warning, "the strongest algorithms in both ends' proposals are deprecated", "who records the packets may read them some day",
		"better ones in --ipsec-phase1, --ipsec-phase2 and --ipsec-pfs-group, at both ends", "", Elsewhere,
	},
	WeakSecret: {
		"weak-secret", Warning, "the secret is short", "who answers once in the peer's place can test guesses of it offline",
		"openssl rand -base64 32, the same at both ends", "", Always,
	},
}
