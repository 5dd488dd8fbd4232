package tunnel

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"ipipd/keepalive"
	"ipipd/tun"
)

// Property is a setting of a tunnel. The flags of `up` and their errors, the output of `print`, its
// JSON and the table in the README are all generated from Properties, so a new setting is one
// entry there.
type Property struct {
	// Name is RouterOS's spelling; the flag is the same behind "--".
	Name string
	// Values describes the accepted values.
	Values string
	// Default describes the value if the property is not set.
	Default string
	// Help describes the property in one line.
	Help string
	// Words are accepted values for shell completion.
	Words []string
	// Repeatable: each Set appends a value, and Get joins them with commas.
	Repeatable bool
	// Mapping: in a file the values may be a YAML mapping, whose keys are what is before the =.
	Mapping bool
	// Secret: errors and Get do not show the value.
	Secret bool
	// Remade says when a change of the property has the tunnel made again, and why; "": it changes in place.
	Remade string

	// get returns the value in the notation that set takes, "" if it is not set.
	get func(*Config) string
	// set returns "", or a description of the accepted values.
	set func(*Config, string) (want string)
	// reset sets the default; nil if set takes what get returns of the default.
	reset func(*Config)
}

// Set parses value into c. Its error is a *ValueError.
func (p Property) Set(c *Config, value string) error {
	want := p.set(c, value)
	switch {
	case want == "":
		return nil
	case p.Secret:
		return &ValueError{Property: p.Name, Hidden: true, Want: want}
	}
	return &ValueError{Property: p.Name, Value: value, Want: want}
}

// Reset sets the property of c to its default; one that is required is unset then.
func (p Property) Reset(c *Config) {
	if p.reset != nil {
		p.reset(c)
		return
	}
	byDefault := Default()
	p.set(c, p.get(&byDefault))
}

// Get returns c's value in the notation that Set takes, or "" if it has none. For a Secret it
// returns a placeholder.
func (p Property) Get(c *Config) string { return p.get(c) }

// Properties returns all properties in display order.
func Properties() []Property { return slices.Concat(properties, ipsecProperties) }

// properties are all properties except ipsecProperties.
var properties = []Property{
	{
		Name: "name", Values: "text", Default: "first free ipipN, from ipip1",
		Help:  "name of the interface: " + wantName + "; one that is no interface name, as it has more than 15 bytes, is its alternative name beside a short one",
		reset: func(c *Config) { c.Name = "" },
		get:   func(c *Config) string { return c.Name },
		set: func(c *Config, v string) string {
			c.Name = v
			return checkName(v)
		},
	},
	{
		Name: "comment", Values: "text", Default: "none",
		Help: "what `print` shows beside the tunnel",
		get:  func(c *Config) string { return c.Comment },
		set: func(c *Config, v string) string {
			c.Comment = v
			if !utf8.ValidString(v) || strings.ContainsFunc(v, unicode.IsControl) || len(v) > 255 {
				return "up to 255 bytes of text on one line"
			}
			return ""
		},
	},
	{
		Name: "local-address", Values: "IPv4", Default: "from the route to the remote",
		Help:  "outer source address; without it the source that the route gives, of many remotes that to each, followed when it changes",
		reset: func(c *Config) { c.LocalAddress = netip.Addr{} },
		get: func(c *Config) string {
			if !c.LocalAddress.IsValid() {
				return ""
			}
			return c.LocalAddress.String()
		},
		set: func(c *Config, v string) (want string) {
			c.LocalAddress, want = parseUnicast(v, "an IPv4 address of this host, or no local-address at all to follow the route")
			return want
		},
	},
	{
		Name: "remote-address", Values: "IPv4, DNS name or `any`", Default: "required", Remade: remadeMany,
		Help:  "outer destination address: the other end of the tunnel; any are the gateways of the routes out of the interface, each the remote of its prefix, without keepalive",
		reset: func(c *Config) { c.RemoteAddress = "" },
		get:   func(c *Config) string { return c.RemoteAddress },
		set: func(c *Config, v string) (want string) {
			c.RemoteAddress = v
			if v != AnyRemote && strings.EqualFold(v, AnyRemote) {
				return AnyRemote + " in lower case"
			}
			if isHostName(v) {
				return ""
			}
			_, want = parseUnicast(v, wantRemote)
			return want
		},
	},
	{
		Name: "mtu", Values: "`auto` or 68..65515", Default: "auto",
		Help:  "largest inner packet in bytes; auto is the MTU of the route to the remote - 20, 1480 on Ethernet",
		Words: []string{"auto"},
		get:   func(c *Config) string { return formatInt(c.MTU, 0, "auto") },
		set: func(c *Config, v string) string {
			return parseInt(&c.MTU, v, "auto", 0, 68, 65515)
		},
	},
	{
		Name: "dscp", Values: "`inherit` or 0..63", Default: "inherit",
		Help:  "DSCP of the outer header; ECN is handled by RFC 6040 in both cases",
		Words: []string{"inherit"},
		get:   func(c *Config) string { return formatInt(c.DSCP, InheritDSCP, "inherit") },
		set: func(c *Config, v string) string {
			return parseInt(&c.DSCP, v, "inherit", InheritDSCP, 0, 63)
		},
	},
	{
		Name: "dont-fragment", Values: "`no` or `inherit`", Default: "no",
		Help:  "DF of the outer header: no clears it, inherit copies that of the inner packet",
		Words: []string{"no", "inherit"},
		get:   func(c *Config) string { return formatBool(c.DontFragment, "no", "inherit") },
		set:   func(c *Config, v string) string { return parseBool(&c.DontFragment, v, "no", "inherit") },
	},
	{
		Name: "clamp-tcp-mss", Values: "`yes` or `no`", Default: "yes",
		Help:  "lower the MSS of received TCP SYN and SYN-ACK to what the MTU leaves, after decapsulation",
		Words: []string{"yes", "no"},
		get:   func(c *Config) string { return formatBool(c.ClampTCPMSS, "no", "yes") },
		set: func(c *Config, v string) string {
			if parseBool(&c.ClampTCPMSS, v, "no", "yes") != "" {
				return "yes or no"
			}
			return ""
		},
	},
	{
		Name: "allow-fast-path", Values: "`yes` or `no`", Default: "yes",
		Help:  "carry plain packets inside the kernel by eBPF, but not with ipsec-secret, and where Linux 6.6, CAP_BPF and an Ethernet underlay without packet filters allow it",
		Words: []string{"yes", "no"},
		reset: func(c *Config) { c.AllowFastPath = Auto },
		get:   func(c *Config) string { return formatBool(c.FastPathAllowed(), "no", "yes") },
		set: func(c *Config, v string) string {
			var yes bool
			if parseBool(&yes, v, "no", "yes") != "" {
				return "yes or no"
			}
			c.AllowFastPath = Off
			if yes {
				c.AllowFastPath = On
			}
			return ""
		},
	},
	{
		Name: "keepalive", Values: "`10s,10`, `10,10`, `00:00:10,10`, `10s` or `off`", Default: "10s,10",
		Help:  "interval and retries: the remote may be silent for one times the other before the tunnel is not running; with remote-address any it is off",
		Words: []string{"10s,10", "off"},
		get:   func(c *Config) string { return c.keepalive().String() },
		set: func(c *Config, v string) string {
			k, err := keepalive.Parse(v)
			if err != nil {
				return keepalive.Syntax
			}
			c.Keepalive = k
			return ""
		},
	},
	{
		Name: "keepalive-probe", Values: "`reflect`, `empty` or `echo`", Default: "reflect",
		Help:  "what a probe looks like: reflect as RouterOS and Cisco send it, empty, or echo, which any peer answers",
		Words: keepalive.Forms,
		get:   func(c *Config) string { return c.KeepaliveProbe.String() },
		set: func(c *Config, v string) string {
			f, err := keepalive.ParseForm(v)
			if err != nil {
				return "reflect, empty or echo"
			}
			c.KeepaliveProbe = f
			return ""
		},
	},
	{
		Name: "keepalive-target", Values: "inner IPv4", Default: "none",
		Help:  "whom an echo probe asks: the address of the other end inside the tunnel; required by echo, which also needs an address",
		reset: func(c *Config) { c.KeepaliveTarget = netip.Addr{} },
		get: func(c *Config) string {
			if !c.KeepaliveTarget.IsValid() {
				return ""
			}
			return c.KeepaliveTarget.String()
		},
		set: func(c *Config, v string) (want string) {
			c.KeepaliveTarget, want = parseUnicast(v, "an inner IPv4 address")
			return want
		},
	},
	{
		Name: "ttl", Values: "1..255 or `inherit`", Default: "255",
		Help:  "TTL of the outer header; inherit copies that of the inner packet",
		Words: []string{"inherit"},
		get:   func(c *Config) string { return formatInt(c.TTL, 0, "inherit") },
		set: func(c *Config, v string) string {
			return parseInt(&c.TTL, v, "inherit", 0, 1, 255)
		},
	},
	{
		Name: "address", Values: "CIDR or `IPv4 peer IPv4`, repeatable", Default: "none", Repeatable: true,
		Help:  "inner address of the interface, with that of the other end if it is point-to-point",
		reset: func(c *Config) { c.Addresses = nil },
		get:   func(c *Config) string { return join(c.Addresses) },
		set: func(c *Config, v string) string {
			a, want := parseAddress(v)
			if want == "" {
				c.Addresses = append(c.Addresses, a)
			}
			return want
		},
	},
	{
		Name: "route", Values: "CIDR, then `metric N`, then `table N`, repeatable", Default: "none", Repeatable: true,
		Help:  "network that is routed into the interface; the table is main if none is given, or that of the interface's VRF",
		reset: func(c *Config) { c.Routes = c.peers() },
		get:   func(c *Config) string { return join(c.plainRoutes()) },
		set: func(c *Config, v string) string {
			r, want := parseRoute(v)
			if want == "" {
				c.Routes = append(c.Routes, r)
			}
			return want
		},
	},
	{
		Name: "peers", Values: "CIDR=IPv4, repeatable", Default: "none", Repeatable: true, Mapping: true,
		Help:  "with remote-address any: a network and the remote that it is sent to, 10.20.0.0/16=198.51.100.7: each is a route of protocol 94 with that gateway; in a file also a mapping",
		reset: func(c *Config) { c.Routes = c.plainRoutes() },
		get:   formatPeers,
		set: func(c *Config, v string) string {
			routes := c.Routes
			for one := range strings.SplitSeq(v, ",") {
				r, want := parsePeer(one)
				if want != "" {
					return want
				}
				routes = append(routes, r)
			}
			c.Routes = routes
			return ""
		},
	},
	{
		Name: "accept-from", Values: "`any-peer` or CIDR, repeatable", Default: "the gateway of the route to the inner source", Repeatable: true,
		Help:  "with remote-address any: outer sources that may send from any inner source as well; any-peer is any gateway of a route",
		Words: []string{anyPeer},
		reset: func(c *Config) { c.AcceptAnyPeer, c.AcceptFrom = false, nil },
		get:   formatAcceptFrom,
		set: func(c *Config, v string) (want string) {
			if v == anyPeer {
				c.AcceptAnyPeer = true
				return ""
			}
			c.AcceptFrom, want = parsePrefixes(c.AcceptFrom, v, "any-peer, or IPv4 networks or addresses, 192.0.2.10,172.16.0.0/12")
			return want
		},
	},
	{
		Name: "accept-to", Values: "CIDR, repeatable", Default: "any", Repeatable: true,
		Help:  "with remote-address any: inner destinations that packets may have; required by an accept-from of more than single addresses",
		reset: func(c *Config) { c.AcceptTo = nil },
		get:   func(c *Config) string { return join(c.AcceptTo) },
		set: func(c *Config, v string) (want string) {
			c.AcceptTo, want = parsePrefixes(c.AcceptTo, v, "IPv4 networks or addresses, 203.0.113.5")
			return want
		},
	},
	{
		Name: "underlay-device", Values: "interface", Default: "none",
		Help:  "outer packets leave and enter only by this interface, which may be a VRF, or in one",
		reset: func(c *Config) { c.UnderlayDevice = "" },
		get:   func(c *Config) string { return c.UnderlayDevice },
		set: func(c *Config, v string) string {
			c.UnderlayDevice = v
			if !tun.CheckName(v) {
				return "the name of an interface"
			}
			return ""
		},
	},
	{
		Name: "fwmark", Values: "number, decimal or 0x…", Default: "0",
		Help: "mark on outer packets, for policy routing",
		get: func(c *Config) string {
			if c.FwMark == 0 {
				return "0"
			}
			return fmt.Sprintf("%#x", c.FwMark)
		},
		set: func(c *Config, v string) string {
			digits, base := v, 10
			if hex, ok := strings.CutPrefix(strings.ToLower(v), "0x"); ok {
				digits, base = hex, 16
			}
			n, err := strconv.ParseUint(digits, base, 32)
			if err != nil {
				return "0..4294967295, or 0x0..0xffffffff"
			}
			c.FwMark = uint32(n)
			return ""
		},
	},
	{
		Name: "tun-queues", Values: "`auto` or 1..16", Default: "auto",
		Help:   "queues of the interface; flows are spread over them, and they over the threads that send; auto is one for each of these (threads)",
		Words:  []string{"auto"},
		Remade: "always: the queues are made with the interface",
		get:    func(c *Config) string { return formatInt(c.TunQueues, 0, "auto") },
		set: func(c *Config, v string) string {
			return parseInt(&c.TunQueues, v, "auto", 0, 1, MaxThreads)
		},
	},
	{
		Name: "rps", Values: "`off`, `all` or a mask of processors in hexadecimal", Default: "off",
		Help:  "processors that the flows received through the tunnel are spread over (rps_cpus of the interface); off leaves it to the kernel",
		Words: []string{"off", "all"},
		get: func(c *Config) string {
			if c.RPS == "" {
				return "off"
			}
			return c.RPS
		},
		set: func(c *Config, v string) (want string) {
			c.RPS, want = parseRPS(v)
			return want
		},
	},
}
