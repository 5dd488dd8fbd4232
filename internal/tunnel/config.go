package tunnel

import (
	"net/netip"
	"strings"

	"ipipd/keepalive"
	"ipipd/tun"
)

// Config is what a tunnel is asked to be. It is filled through Properties, by
// the command line as by anything else; Default is where to begin, since the
// zero value is not a tunnel that anybody wants.
type Config struct {
	// Name of the interface, by CheckName's rules; "" leaves it to who starts
	// the tunnel: the first free ipipN from ipip1.
	Name string
	// LocalAddress is the source of outer packets; the zero Addr follows the
	// route to the remote.
	LocalAddress netip.Addr
	// RemoteAddress is the other end, an IPv4 address or a DNS name. Required.
	RemoteAddress string
	// MTU of the interface in bytes, 68 to 65515; 0 is auto, the path's less 20.
	MTU int
	// DSCP of outer packets, 0 to 63; InheritDSCP takes that of the inner packet.
	DSCP int
	// DontFragment copies the inner DF bit to the outer header (inherit);
	// false leaves it clear (no).
	DontFragment bool
	// ClampTCPMSS lowers the MSS of received SYN and SYN-ACK to what fits.
	ClampTCPMSS bool
	// AllowFastPath has the kernel carry plain packets where it can; netfilter
	// does not see their outer packets. Auto is yes unless IPsec is wanted,
	// with which it cannot be.
	AllowFastPath Tristate
	// Keepalive says how long the remote may be silent; zero is off.
	Keepalive keepalive.Config
	// KeepaliveProbe is what a probe looks like.
	KeepaliveProbe keepalive.Form
	// KeepaliveTarget is the inner address that an echo probe asks; only with
	// KeepaliveProbe Echo, which needs one of Addresses to ask from as well.
	KeepaliveTarget netip.Addr
	// TTL of outer packets, 1 to 255; 0 takes that of the inner packet (inherit).
	TTL int
	// Addresses are put on the interface, each with the length of its subnet.
	Addresses []netip.Prefix
	// Routes are put on the interface; their host bits are zero.
	Routes []netip.Prefix
	// UnderlayDevice is the only interface that outer packets leave and enter
	// by; "" leaves it to the route.
	UnderlayDevice string
	// FwMark is put on outer packets for policy routing; 0 is none.
	FwMark uint32
	// TunQueues is how many threads send what the host puts into the interface;
	// 0 leaves it to the number of processors (auto).
	TunQueues int
	// RPS is which processors the flows that the interface receives are spread over:
	// "all", or rps_cpus in hexadecimal; "" leaves rps_cpus as it is (off).
	RPS string
	// IPsec encrypts the tunnel, if it is wanted.
	IPsec IPsec
	// Comment is the operator's.
	Comment string
}

// Tristate is yes, no, or what follows from the other settings.
type Tristate uint8

// The choices.
const (
	Auto Tristate = iota
	On
	Off
)

// fastPath reports what AllowFastPath comes to.
func (c *Config) fastPath() bool {
	return c.AllowFastPath == On || c.AllowFastPath == Auto && !c.IPsec.Wanted()
}

// InheritDSCP as Config.DSCP is `inherit`.
const InheritDSCP = -1

// Default is RouterOS's, but for RemoteAddress, which has none.
func Default() Config {
	return Config{
		DSCP:        InheritDSCP,
		ClampTCPMSS: true,
		Keepalive:   keepalive.Default,
		TTL:         255,
		IPsec:       defaultIPsec(),
	}
}

// Validate checks the whole: every value by itself, as Property.Set does, and
// then those that only make sense together. Its error is a *ValueError about
// the first thing that is wrong.
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
	if c.Name != "" && c.UnderlayDevice == c.Name {
		return &ValueError{Property: "underlay-device", Value: c.UnderlayDevice, Want: "an interface other than the tunnel's own"}
	}
	if err := c.validateIPsec(); err != nil {
		return err
	}
	addresses := make(map[netip.Addr]bool)
	for _, p := range c.Addresses {
		if addresses[p.Addr()] {
			return &ValueError{Property: "address", Value: p.String(), Want: "each address once"}
		}
		addresses[p.Addr()] = true
	}
	routes := make(map[netip.Prefix]bool)
	for _, p := range c.Routes {
		if routes[p] {
			return &ValueError{Property: "route", Value: p.String(), Want: "each route once"}
		}
		routes[p] = true
	}
	return c.validateKeepalive(addresses)
}

func (c *Config) validateKeepalive(addresses map[netip.Addr]bool) error {
	target := c.KeepaliveTarget
	switch echo := c.KeepaliveProbe == keepalive.FormEcho; {
	case !echo && target.IsValid():
		return &ValueError{Property: "keepalive-target", Value: target.String(), Want: "keepalive-probe echo with it"}
	case !echo:
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

// validateEach puts every value through the Set of its property, so that a
// Config written as a literal keeps the same rules as one that was read.
func (c *Config) validateEach() error {
	for _, p := range Properties() {
		var scratch Config
		value := p.Get(c)
		if value == "" {
			continue // the zero value: what is required, Validate asks for
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

// CheckName refuses what tun.CheckName does. Its error is a *ValueError about the
// property name.
func CheckName(name string) error {
	if want := checkName(name); want != "" {
		return &ValueError{Property: "name", Value: name, Want: want}
	}
	return nil
}

const wantName = tun.WantName

// checkName returns what is wanted instead of name, "" if name is fine.
func checkName(name string) (want string) {
	if !tun.CheckName(name) {
		return wantName
	}
	return ""
}
