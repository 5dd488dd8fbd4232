package tunnel

import (
	"net/netip"
	"slices"
	"strings"

	"ipipd/internal/netstate"
	"ipipd/keepalive"
)

// Config is the configuration of a tunnel, set through Properties. Start from Default: the
// zero value differs from RouterOS's defaults.
type Config struct {
	// Name of the tunnel, as CheckName accepts it, and of its interface: see InterfaceName. ""
	// is the first free ipipN from ipip1, which the caller of Apply chooses.
	Name string
	// LocalAddress is the source of outer packets; the zero Addr takes the preferred source
	// of the route to the remote.
	LocalAddress netip.Addr
	// RemoteAddress is the other end, an IPv4 address or a DNS name; AnyRemote means the gateways of the
	// interface's routes. Required.
	RemoteAddress string
	// MTU of the interface in bytes, 68 to 65515; 0 is auto: the path's MTU less the
	// encapsulation overhead, 20 bytes without IPsec.
	MTU int
	// DSCP of outer packets, 0 to 63; InheritDSCP copies the inner packet's.
	DSCP int
	// DontFragment copies the inner DF bit to the outer header (inherit);
	// false leaves it clear (no).
	DontFragment bool
	// ClampTCPMSS lowers the MSS option of received SYN and SYN-ACK to fit the MTU.
	ClampTCPMSS bool
	// AllowFastPath forwards packets in the kernel by eBPF where possible; netfilter does
	// not see their outer packets. Auto is On without IPsec, and Off with it.
	AllowFastPath Tristate
	// Keepalive is the interval and number of probes; zero is off.
	Keepalive keepalive.Config
	// KeepaliveProbe is the form of a probe.
	KeepaliveProbe keepalive.Form
	// KeepaliveTarget is the inner destination of an echo probe, whose source is the first of
	// Addresses. Required with FormEcho, but for AnyRemote, and rejected with the other forms.
	KeepaliveTarget netip.Addr
	// TTL of outer packets, 1 to 255; 0 copies the inner packet's (inherit).
	TTL int
	// Addresses are the inner addresses of the interface, host bits kept.
	Addresses []netstate.InterfaceAddress
	// Routes are the routes into the interface; their host bits are zero. Those with a Gateway are the
	// property peers, and only with AnyRemote.
	Routes []netstate.InterfaceRoute
	// AcceptAnyPeer, AcceptFrom and AcceptTo say which remotes may send, and to which inner destinations:
	// see fib.Acceptance. Only with AnyRemote.
	AcceptAnyPeer        bool
	AcceptFrom, AcceptTo []netip.Prefix
	// UnderlayDevice is the interface or VRF that outer packets are bound to, as by
	// SO_BINDTODEVICE; "" leaves it to the route.
	UnderlayDevice string
	// FwMark is the mark (SO_MARK) of outer packets, for policy routing; 0 is none.
	FwMark uint32
	// TunQueues is the number of TUN queues; 0 is one for each thread that sends
	// (EngineOptions.Threads).
	TunQueues int
	// RPS is the interface's rps_cpus, the processors that received flows are spread over:
	// "all", or a hexadecimal mask; "" leaves it unchanged (off).
	RPS string
	// IPsec encrypts the tunnel if it has a secret.
	IPsec IPsec
	// Comment is free text of the operator.
	Comment string
	// Disabled: the tunnel is validated only. The caller gives it neither to Apply nor to Diff, and its name to no other.
	Disabled bool
}

// clone returns a copy that shares no memory with c.
func (c *Config) clone() *Config {
	next := *c
	next.Addresses, next.Routes = slices.Clone(c.Addresses), slices.Clone(c.Routes)
	next.AcceptFrom, next.AcceptTo = slices.Clone(c.AcceptFrom), slices.Clone(c.AcceptTo)
	next.IPsec.Secret = slices.Clone(c.IPsec.Secret)
	next.IPsec.Phase1, next.IPsec.Phase2 = slices.Clone(c.IPsec.Phase1), slices.Clone(c.IPsec.Phase2)
	return &next
}

// remote returns RemoteAddress if it is an IP address, and reports whether it is a DNS name.
func (c *Config) remote() (a netip.Addr, named bool) {
	a, err := netip.ParseAddr(c.RemoteAddress)
	return a, err != nil && !c.many()
}

// Tristate is a yes/no setting whose default depends on other settings.
type Tristate uint8

const (
	Auto Tristate = iota // not set
	On
	Off
)

// FastPathAllowed reports whether the tunnel may have the fast path: it resolves AllowFastPath.
func (c *Config) FastPathAllowed() bool {
	return c.AllowFastPath == On || c.AllowFastPath == Auto && !c.IPsec.Wanted()
}

// InheritDSCP is the Config.DSCP that copies the inner DSCP.
const InheritDSCP = -1

// Default returns RouterOS's defaults. RemoteAddress has none and must be set.
func Default() Config {
	return Config{
		DSCP:        InheritDSCP,
		ClampTCPMSS: true,
		Keepalive:   keepalive.Default,
		TTL:         255,
		IPsec:       defaultIPsec(),
	}
}

// Validate checks every value as Property.Set does, and then their combinations. Its error is
// a *ValueError about the first fault found.
func (c *Config) Validate() error {
	if err := c.validateEach(); err != nil {
		return err
	}
	if c.RemoteAddress == "" {
		return &ValueError{Property: "remote-address", Missing: true, Want: wantRemote}
	}
	if c.LocalAddress.IsValid() && c.RemoteAddress == c.LocalAddress.String() {
		return &ValueError{Property: "remote-address", Value: c.RemoteAddress, Want: "an address other than local-address"}
	}
	if c.Name != "" && c.UnderlayDevice == InterfaceName(c.Name) {
		return &ValueError{Property: "underlay-device", Value: c.UnderlayDevice, Want: "an interface other than the tunnel's own"}
	}
	if err := c.validateMany(); err != nil {
		return err
	}
	if err := c.validateIPsec(); err != nil {
		return err
	}
	addresses := make(map[netip.Addr]bool)
	for _, a := range c.Addresses {
		if addresses[a.Prefix.Addr()] {
			return &ValueError{Property: "address", Value: a.String(), Want: "each address once"}
		}
		addresses[a.Prefix.Addr()] = true
	}
	if err := c.validateRoutes(); err != nil {
		return err
	}
	return c.validateKeepalive(addresses)
}

func (c *Config) validateKeepalive(addresses map[netip.Addr]bool) error {
	target := c.KeepaliveTarget
	switch echo := c.KeepaliveProbe == keepalive.FormEcho; {
	case !echo && target.IsValid():
		return &ValueError{Property: "keepalive-target", Value: target.String(), Want: "keepalive-probe echo with it"}
	case !echo, c.many(): // with many remotes there is no keepalive, and so no probe
		return nil
	case !target.IsValid():
		return &ValueError{Property: "keepalive-target", Missing: true, Want: "the inner IPv4 address that keepalive-probe echo asks"}
	case len(c.Addresses) == 0:
		return &ValueError{Property: "address", Missing: true, Want: "the inner address that keepalive-probe echo asks from, as " + wantAddress}
	case addresses[target]:
		return &ValueError{Property: "keepalive-target", Value: target.String(), Want: "an address of the other end, not of this one"}
	}
	return nil
}

// validateEach passes every value through the Set of its property, so that a Config literal
// obeys the same rules as the command line.
func (c *Config) validateEach() error {
	for _, p := range Properties() {
		var scratch Config
		value := p.Get(c)
		if value == "" {
			continue // not set; Validate checks required properties
		}
		values := []string{value}
		if p.Repeatable {
			values = strings.Split(value, ",")
		}
		for _, v := range values {
			if err := p.Set(&scratch, v); err != nil {
				return err
			}
		}
	}
	return nil
}
