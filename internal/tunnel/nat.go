package tunnel

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"

	"ipipd/internal/warning"
	"ipipd/keepalive"
)

// cgn is the shared address space of carrier-grade NAT (RFC 6598).
var cgn = netip.MustParsePrefix("100.64.0.0/10")

// IsPublic reports whether an address is globally routable: not of RFC 1918 or RFC 6598, and
// neither link-local nor loopback.
func IsPublic(a netip.Addr) bool {
	return !a.IsPrivate() && !cgn.Contains(a) && !a.IsLinkLocalUnicast() && !a.IsLoopback()
}

// ReflectsBehindNAT reports whether the local address is private and the remote is not, which means a NAT,
// and c has reflect probes. A NAT translates the outer header only: the inner destination of a reflect probe
// stays the private address, to which the peer has no route.
func ReflectsBehindNAT(c *Config, local, remote netip.Addr) bool {
	return c.keepalive().Interval != 0 && c.KeepaliveProbe == keepalive.FormReflect && !IsPublic(local) && IsPublic(remote)
}

// noteReflect notes what a reflect probe of the peer says: its destination is the peer's own address, big-endian in
// peerOwnAddress, where 0 is the remote. Whoever can forge the peer's source can forge it: nothing but a warning follows.
func (t *Tunnel) noteReflect(destination, remote [4]byte) {
	t.peerProbes.Store(true)
	if destination == remote {
		destination = [4]byte{}
	}
	t.peerOwnAddress.Store(binary.BigEndian.Uint32(destination[:]))
}

// warnPeerBehindNAT warns that only the peer's own probes keep the tunnel running: the inner source of this end's probes
// is the peer's public address, which is not the peer's own.
func (c *control) warnPeerBehindNAT(unanswered bool) {
	var inside [4]byte
	binary.BigEndian.PutUint32(inside[:], c.peerOwnAddress.Load())
	c.warnEcho(unanswered && inside != [4]byte{} && c.cfg.KeepaliveProbe == keepalive.FormReflect, warning.PeerBehindNAT,
		"its probe says that it is %v, and comes from %v", address(inside), c.remote)
}

// PeerInner returns the peer's inner address: KeepaliveTarget, or the Opposite of the first address; the zero Addr if there
// is none.
func (c *Config) PeerInner() netip.Addr {
	if c.KeepaliveTarget.IsValid() || len(c.Addresses) == 0 {
		return c.KeepaliveTarget
	}
	return c.Addresses[0].Opposite()
}

// EchoRemedy returns how to have the keepalive probe by echo requests, which any peer answers: a command for the running
// tunnel called name, or flags of up if name is "". In place of an unknown inner address is a word in capitals.
func (c *Config) EchoRemedy(name string) string {
	target := "PEER-INNER-ADDRESS"
	if a := c.PeerInner(); a.IsValid() {
		target = a.String()
	}
	settings := []string{"keepalive-probe=echo", "keepalive-target=" + target}
	if len(c.Addresses) == 0 { // an echo request needs a source
		settings = append(settings, "address=INNER-ADDRESS/30")
	}
	if name != "" {
		return fmt.Sprintf("ipipd set %s %s", name, strings.Join(settings, " "))
	}
	return "--" + strings.ReplaceAll(strings.Join(settings, " --"), "=", " ")
}

// warnEcho is warnIf with EchoRemedy as the remedy.
func (c *control) warnEcho(active bool, code warning.Code, format string, args ...any) {
	if active {
		c.raise(code, fmt.Sprintf(format, args...), c.cfg.EchoRemedy(c.ifname.get()))
	} else {
		c.clear(code)
	}
}
