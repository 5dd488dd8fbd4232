package doctor

import (
	"fmt"
	"strings"
)

// Code names a kind of Finding, for scripts and for docs/troubleshooting.md.
type Code string

// The codes are in the order of Examine's checks.
const (
	ProcessSilent        Code = "process-silent"
	UnderlayDown         Code = "underlay-down"
	InterfaceDown        Code = "interface-down"
	PeerNotSetUp         Code = "peer-not-set-up"
	Protocol4Filtered    Code = "protocol-4-filtered"
	Protocol4Unanswered  Code = "protocol-4-unanswered"
	PeerNotHeard         Code = "peer-not-heard"
	RemoteSilent         Code = "remote-silent"
	RemoteUnreachable    Code = "remote-unreachable"
	SendRefused          Code = "send-refused"
	IPsecNotEstablished  Code = "ipsec-not-established"
	ESPFiltered          Code = "esp-filtered"
	CloudDropsProtocol4  Code = "cloud-drops-protocol-4"
	FirewallDrops        Code = "firewall-drops"
	FirewallConntrack    Code = "firewall-conntrack"
	FirewallProtocol94   Code = "firewall-protocol-94"
	CalicoDrops          Code = "calico-drops"
	RPFilterUnderlay     Code = "rp-filter-underlay"
	RPFilterTunnel       Code = "rp-filter-tunnel"
	VIPMissing           Code = "vip-missing"
	VIPAnswered          Code = "vip-answered"
	SYNACKMSS            Code = "syn-ack-mss"
	NoTUN                Code = "no-tun"
	TUNForbidden         Code = "tun-forbidden"
	NoCapabilities       Code = "no-capabilities"
	NoFastPathCapability Code = "no-fast-path-capability"
	SandboxNotWhole      Code = "sandbox-not-whole"
	CapabilitiesLeft     Code = "capabilities-left"
	MTUAbovePath         Code = "mtu-above-path"
	RouteIgnoresMTU      Code = "route-ignores-mtu"
	MSSNotClamped        Code = "mss-not-clamped"
	KeepaliveBehindNAT   Code = "keepalive-behind-nat"
	KeepaliveUnanswered  Code = "keepalive-unanswered"
	PeerBehindNAT        Code = "peer-behind-nat"
	KernelIPIP           Code = "kernel-ipip"
	NameTaken            Code = "name-taken"
	NameNotResolved      Code = "name-not-resolved"
	NoRoute              Code = "no-route"
	RemoteIsLocal        Code = "remote-is-local"
	RouteLoop            Code = "route-loop"
	NoLocalAddress       Code = "no-local-address"
	NoRemotes            Code = "no-remotes"
	GatewayNotUsable     Code = "gateway-not-usable"
	RouteWithoutGateway  Code = "route-without-gateway"
	SamePair             Code = "same-pair"
	UDPPortTaken         Code = "udp-port-taken"
	ManagedByNetworkd    Code = "managed-by-networkd"
	ManagedByNM          Code = "managed-by-networkmanager"
	CiliumDrops          Code = "cilium-drops"
	FastPathOff          Code = "fast-path-off"
	ClockJump            Code = "clock-jump"
	ClockNotSynchronized Code = "clock-not-synchronized"
	TooFewFiles          Code = "too-few-files"
	TooLittleMemory      Code = "too-little-memory"
)

// Codes has every Code, with what it means.
var Codes = []struct {
	Code
	Severity
	Means string
}{
	{ProcessSilent, Broken, "a process of ipipd does not answer"},
	{UnderlayDown, Broken, "the underlay device is down, or has no carrier"},
	{InterfaceDown, Broken, "somebody has set the interface of a running tunnel down"},
	{PeerNotSetUp, Broken, "the remote answers ICMP protocol unreachable: nothing there takes protocol 4"},
	{Protocol4Filtered, Broken, "the remote answers pings, and the running tunnel hears nothing of it: protocol 4 is filtered on the way, or its tunnel is down"},
	{Protocol4Unanswered, Warning, "the remote answers pings and no protocol-4 probe: filtered, or a peer that answers none"},
	{PeerNotHeard, Broken, "the running tunnel hears nothing of the remote, which answers no pings either"},
	{RemoteSilent, Warning, "the remote answers neither pings nor protocol 4"},
	{RemoteUnreachable, Broken, "a router answers that the remote is not reachable"},
	{SendRefused, Warning, "the kernel has refused to send packets of the running tunnel"},
	{IPsecNotEstablished, Broken, "there is no SA"},
	{ESPFiltered, Broken, "there is an SA, and no ESP is received"},
	{CloudDropsProtocol4, Broken, "this host's cloud never passes protocol 4"},
	{FirewallDrops, Broken, "a local nftables or iptables rule drops the outer packets"},
	{FirewallConntrack, Warning, "local rules let outer packets in only as answers"},
	{FirewallProtocol94, Warning, "a local rule names protocol 94 (`ipip` there) where 4 (`ipencap`) was meant"},
	{CalicoDrops, Broken, "Calico drops IPIP of hosts that are not its own"},
	{RPFilterUnderlay, Broken, "strict rp_filter, and the route back to the remote leads elsewhere"},
	{RPFilterTunnel, Warning, "strict rp_filter on the tunnel's interface drops inner packets"},
	{VIPMissing, Warning, "no interface has an address of accept-to"},
	{VIPAnswered, Warning, "this host answers ARP for an address that a load balancer serves"},
	{SYNACKMSS, Warning, "the SYN-ACKs of a real server have clients send more than fits the tunnel"},
	{NoTUN, Broken, "/dev/net/tun is missing, or the kernel has no TUN"},
	{TUNForbidden, Broken, "/dev/net/tun may not be opened: the container's device list, or its mode"},
	{NoCapabilities, Broken, "this user lacks capabilities that `up` needs"},
	{NoFastPathCapability, Note, "this user lacks CAP_BPF: no fast path"},
	{SandboxNotWhole, Note, "a running process is less confined than it could be"},
	{CapabilitiesLeft, Note, "which capabilities a running process has, and what for"},
	{MTUAbovePath, Warning, "the MTU is larger than the path takes"},
	{RouteIgnoresMTU, Warning, "a route into the tunnel has an MTU or MSS that is larger than the interface takes"},
	{MSSNotClamped, Warning, "`clamp-tcp-mss` is off, and TCP depends on ICMP errors getting through"},
	{KeepaliveBehindNAT, Warning, "reflect probes from behind a 1:1 NAT: nobody but ipipd answers them"},
	{KeepaliveUnanswered, Warning, "protocol 4 comes from the peer, which answers no probe: it answers none, or does not get them"},
	{PeerBehindNAT, Note, "the peer says by its probes that it is behind a NAT, and answers none of this end"},
	{KernelIPIP, Warning, "the kernel's ipip or tunnel4 is loaded"},
	{NameTaken, Broken, "an interface of this host has the tunnel's name"},
	{NameNotResolved, Broken, "the name of the remote has no address"},
	{NoRoute, Broken, "there is no route to the remote"},
	{RemoteIsLocal, Broken, "remote-address is an address of this host"},
	{RouteLoop, Broken, "the route to the remote leads into the tunnel"},
	{NoLocalAddress, Warning, "no interface has local-address: nothing is sent"},
	{NoRemotes, Warning, "nothing is routed into an interface with many remotes"},
	{GatewayNotUsable, Warning, "a route of an interface with many remotes names a gateway that cannot be used"},
	{RouteWithoutGateway, Warning, "a route without a gateway, where `ipsec-secret` takes one"},
	{SamePair, Broken, "two tunnels, or the kernel's own, have the same outer addresses"},
	{UDPPortTaken, Broken, "UDP 500 or 4500 is taken"},
	{ManagedByNetworkd, Warning, "systemd-networkd manages the tunnel's interface"},
	{ManagedByNM, Warning, "NetworkManager manages the tunnel's interface"},
	{CiliumDrops, Warning, "Cilium drops IPIP that is not its own"},
	{FastPathOff, Note, "why the fast path is off"},
	{ClockJump, Warning, "the clock was set back"},
	{ClockNotSynchronized, Note, "the clock is not synchronized"},
	{TooFewFiles, Broken, "the limit of open files is too small for the tunnels"},
	{TooLittleMemory, Broken, "the limit of memory is too small for the tunnels"},
}

// severity returns the severity of c. It panics if Codes lacks it.
func (c Code) severity() Severity {
	for i := range Codes {
		if Codes[i].Code == c {
			return Codes[i].Severity
		}
	}
	panic("doctor.Codes has no " + string(c))
}

// CodeTable returns the table of docs/troubleshooting.md.
func CodeTable() string {
	var b strings.Builder
	b.WriteString("| code | severity | what is wrong |\n| --- | --- | --- |\n")
	for _, c := range Codes {
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", c.Code, c.Severity, c.Means)
	}
	return b.String()
}
