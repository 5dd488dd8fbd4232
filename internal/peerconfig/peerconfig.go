// Package peerconfig writes the configuration of a tunnel's other end, for the systems that speak RFC 2003:
// the outer addresses swapped, and the settings that have to be the same at both ends, in that system's words.
//
// What is not known here (the networks behind this end, the other end's interfaces), or cannot be said there,
// is a comment in what is written. The syntax is that of systemd.netdev(5), ip-tunnel(8), swanctl.conf(5), the
// command reference of Cisco IOS, and RouterOS's export; docs/tested.md says what of it was tested.
package peerconfig

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"

	"ipipd/internal/config"
	"ipipd/internal/netstate"
	"ipipd/internal/tunnel"
	"ipipd/keepalive"
)

// Systems are the systems that Write writes for.
var Systems = []string{"mikrotik", "linux", "networkd", "cisco", "ipipd"}

// placeholder stands in place of a secret that is not shown: IKE fails with it, so that nothing is sent in the clear.
const placeholder = "put the secret here"

// Tunnel is this end of a tunnel.
type Tunnel struct {
	Config tunnel.Config
	// Local and Remote are the outer addresses in use, if the tunnel runs and has found them; 0.0.0.0 is none.
	Local, Remote netip.Addr
	// Locals has this end's outer address for each of many remotes, if the tunnel runs and has not one for all.
	Locals map[netip.Addr]netip.Addr
	// MTU is the interface's, in bytes, if the tunnel runs; else 0.
	MTU int
	// ShowSecret: the secret is written.
	ShowSecret bool
	// Only is the one of many remotes that is wanted; the zero Addr is all.
	Only netip.Addr

	sources string // the prefixes of one of many remotes
}

// peer is the other end.
type peer struct {
	// Config is ipipd's configuration for that end. Its RemoteAddress is this end's outer address, its LocalAddress
	// the zero Addr if that end's is not known.
	tunnel.Config
	remote netip.Addr
	mtu    int // of the interface, also if it is auto
	// notes are lines for whoever configures it.
	notes []string
	// probe is the form of this end's probes, which that end has to answer; without a keepalive it is FormEcho,
	// which any system answers.
	probe keepalive.Form
	// routed is the first inner address of this end, if it has one.
	routed netip.Addr
	// identity is the IKE identity that this end expects, if it is not the outer address.
	identity string
	shown    bool // whether the secret is written
}

// Write writes the configuration of the other end of t, or of each of many remotes, for one of Systems. A value that
// cannot be used is a *tunnel.ValueError.
func Write(w io.Writer, system string, t *Tunnel) error {
	if t.isMany() {
		return writeMany(w, system, t)
	}
	if t.Only.IsValid() && t.sources == "" {
		return &tunnel.ValueError{Property: "remote", Value: t.Only.String(), Want: "a tunnel whose remote-address is any with it"}
	}
	p, err := mirror(t)
	if err != nil {
		return err
	}
	write := map[string]func(*peer) (string, error){
		"mikrotik": (*peer).mikrotik, "linux": (*peer).linux, "networkd": (*peer).networkd, "cisco": (*peer).cisco, "ipipd": (*peer).ipipd,
	}[system]
	if write == nil {
		return &tunnel.ValueError{Property: "for", Value: system, Want: strings.Join(Systems, ", ")}
	}
	if p.Name == "tunl0" && (system == "linux" || system == "networkd") {
		p.Name = "ipip1"
		p.note("the name here, tunl0, is that of an interface of Linux's own there")
	}
	text, err := write(p)
	if err == nil {
		_, err = io.WriteString(w, text)
	}
	return err
}

func (p *peer) note(format string, args ...any) {
	p.notes = append(p.notes, fmt.Sprintf(format, args...))
}

// mirror returns the other end of this one. It fails if this end's outer address is not known.
func mirror(this *Tunnel) (*peer, error) {
	t := *this
	for _, a := range []*netip.Addr{&t.Local, &t.Remote} {
		if a.IsUnspecified() {
			*a = netip.Addr{}
		}
	}
	c := &t.Config
	p := &peer{Config: tunnel.Default(), mtu: c.MTU, shown: t.ShowSecret}
	p.remote = c.LocalAddress
	if !p.remote.IsValid() {
		p.remote = t.Local
	}
	if !p.remote.IsValid() {
		return nil, errors.New("local-address: not known: the other end needs it: set it in the file, or start the tunnel, which finds it")
	}
	p.Name, p.RemoteAddress = c.Name, p.remote.String()
	p.MTU, p.DSCP, p.DontFragment, p.ClampTCPMSS, p.TTL = c.MTU, c.DSCP, c.DontFragment, c.ClampTCPMSS, c.TTL
	p.LocalAddress, _ = netip.ParseAddr(c.RemoteAddress)
	if !p.LocalAddress.IsValid() {
		p.LocalAddress = t.Remote
		if t.Remote.IsValid() {
			p.note("here the other end is %s, which is %s now", c.RemoteAddress, t.Remote)
		} else {
			p.note("here the other end is %s: its outer address is not known", c.RemoteAddress)
		}
	}
	if !tunnel.IsPublic(p.remote) && (!p.LocalAddress.IsValid() || tunnel.IsPublic(p.LocalAddress)) {
		p.note("%s is private: behind a NAT the other end needs the address that the NAT has, in its place", p.remote)
	}
	p.mirrorAddresses(c, t.sources)
	p.mirrorKeepalive(c)
	p.mirrorSecret(c)
	p.mirrorMany(&t)
	switch {
	case p.mtu == 0 && t.MTU > 0:
		p.mtu = t.MTU
	case p.mtu == 0 && p.IPsec.Wanted():
		p.mtu = 1438 // on a path of 1500, as RouterOS has it
	case p.mtu == 0:
		p.mtu = 1480
	}
	return p, nil
}

// mirrorAddresses finds the inner addresses of the other end; sources are the prefixes of one of many remotes.
func (p *peer) mirrorAddresses(c *tunnel.Config, sources string) {
	for i, a := range c.Addresses {
		if i == 0 {
			p.routed = a.Prefix.Addr()
		}
		if b, ok := opposite(a, c.KeepaliveTarget); ok && sources == "" {
			p.Addresses = append(p.Addresses, b)
		} else if sources != "" {
			p.note("inner address: one of %s", sources)
			break
		} else if a.Prefix.IsSingleIP() {
			p.note("inner address: any other than %s", a.Prefix.Addr())
		} else {
			p.note("inner address: one of %s other than %s", a.Prefix.Masked(), a.Prefix.Addr())
		}
	}
	behind := "the networks behind this end"
	if p.routed.IsValid() {
		behind += " (" + p.routed.String() + ")"
	}
	if len(c.Addresses) == 0 {
		p.note("inner address: none, as here")
	}
	p.note("routes: those to %s have to lead into the tunnel", behind)
	for _, r := range c.Routes {
		p.note("from here %s leads into the tunnel", r.Prefix)
	}
}

// opposite returns the other end's address in the subnet of a, if it can be told; target is one that it has, or invalid.
func opposite(a netstate.InterfaceAddress, target netip.Addr) (netstate.InterfaceAddress, bool) {
	own, bits, other := a.Prefix.Addr(), a.Prefix.Bits(), a.Opposite()
	switch {
	case a.Peer.IsValid():
		return netstate.InterfaceAddress{Prefix: netip.PrefixFrom(a.Peer, 32), Peer: own}, true
	case target.IsValid() && target != own && bits < 32 && a.Prefix.Contains(target):
		other = target
	}
	return netstate.InterfaceAddress{Prefix: netip.PrefixFrom(other, bits)}, other.IsValid()
}

func (p *peer) mirrorKeepalive(c *tunnel.Config) {
	p.Keepalive = c.Keepalive
	p.probe = c.KeepaliveProbe
	if c.Keepalive.Interval == 0 {
		p.probe = keepalive.FormEcho
	}
	switch {
	case c.KeepaliveProbe != keepalive.FormEcho:
		p.KeepaliveProbe = c.KeepaliveProbe
	case p.routed.IsValid() && len(p.Addresses) > 0:
		p.KeepaliveProbe, p.KeepaliveTarget = keepalive.FormEcho, p.routed
	}
}

// mirrorSecret sets the same secret and the same proposals at the other end.
func (p *peer) mirrorSecret(c *tunnel.Config) {
	if !c.IPsec.Wanted() {
		return
	}
	p.IPsec = c.IPsec
	p.IPsec.RemoteID, p.identity = "", c.IPsec.RemoteID
	if c.IPsec.SecretFile != "" {
		p.note("secret: that of %s here", c.IPsec.SecretFile)
		p.IPsec.SecretFile, p.shown = "", false
	}
	if p.identity != "" {
		p.note("identity in IKE: here it is expected to be %s", p.identity)
	}
	if !p.shown {
		p.IPsec.Secret = []byte(placeholder)
	}
	if p.LocalAddress.IsValid() && !tunnel.IsPublic(p.LocalAddress) && tunnel.IsPublic(p.remote) {
		p.note("%s is private: ipsec-remote-id here has to be what the other end says behind its NAT", p.LocalAddress)
	}
}

// echoAdvice says what to set at this end for a system that answers no reflect probe.
func (p *peer) echoAdvice() string {
	target := "INNER-ADDRESS"
	if len(p.Addresses) > 0 {
		target = p.Addresses[0].Prefix.Addr().String()
	}
	return fmt.Sprintf("want keepalive-probe: echo and keepalive-target: %s at this end", target)
}

// comments returns lines as comments, each behind prefix.
func comments(prefix string, lines []string) string {
	var b strings.Builder
	for _, line := range lines {
		b.WriteString(strings.TrimRight(prefix+line, " ") + "\n")
	}
	return b.String()
}

// ident returns the tunnel's name as an identifier that each system takes, and Linux as an interface's name.
func (p *peer) ident() string {
	name := strings.Map(func(c rune) rune {
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_' {
			return c
		}
		return '-'
	}, tunnel.InterfaceName(p.Name))
	return cmp.Or(strings.TrimLeft(name, "-"), "ipip")
}

func (p *peer) ipipd() (string, error) {
	var b strings.Builder
	b.WriteString(comments("# ", p.notes))
	err := config.WriteYAML(&b, config.DefaultProcess(), []config.Entry{{Config: p.Config, HideSecret: !p.shown}})
	return b.String(), err
}

func (p *peer) mikrotik() (string, error) {
	var b strings.Builder
	c := p.Config
	c.KeepaliveProbe, c.KeepaliveTarget = keepalive.FormReflect, netip.Addr{} // the only form of RouterOS's keepalive
	rules := []string{"firewall, above the rules that drop:"}
	input := "/ip firewall filter add chain=input src-address=" + p.RemoteAddress + " protocol="
	if p.IPsec.Wanted() {
		rules = append(rules, input+"udp dst-port=500,4500 action=accept", input+"ipsec-esp action=accept",
			input+"ipencap ipsec-policy=in,ipsec action=accept")
	} else {
		rules = append(rules, input+"ipencap action=accept")
	}
	b.WriteString(comments("# ", slices.Concat(p.notes, rules)))
	_, err := config.WriteRouterOS(&b, config.DefaultProcess(), []config.Entry{{Config: c}})
	return b.String(), err
}
