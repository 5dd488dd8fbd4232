package tunnel

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"ipipd/internal/ipv4"
	"ipipd/internal/netstate"
)

// ValueError is an invalid value of a property. Error is one line, whatever the value contains.
type ValueError struct {
	// Property is the property's name.
	Property string
	// Value is the rejected value.
	Value string
	// Missing: a required value was not given.
	Missing bool
	// Hidden: the value is a secret, and Value is empty.
	Hidden bool
	// Want describes the accepted values.
	Want string
}

func (e *ValueError) Error() string {
	switch {
	case e.Hidden:
		return e.Property + ": what was given is not accepted: want " + e.Want
	case e.Missing:
		return e.Property + ": missing: want " + e.Want
	}
	return fmt.Sprintf("%s: %q is not accepted: want %s", e.Property, e.Value, e.Want)
}

// Descriptions used by several properties.
const (
	wantRemote  = "an IPv4 address, a DNS name or any"
	wantAddress = "an IPv4 address and the length of its subnet, 10.255.0.1/30"
	wantPeer    = "the addresses of both ends, 10.255.0.1 peer 10.255.0.2"
	wantRoute   = "an IPv4 network and, if need be, its metric and table, 10.20.0.0/16 metric 200 table 100"
)

// mainTable is RT_TABLE_MAIN: the table of a route that names none.
const mainTable = 254

// parseUnicast parses an IPv4 unicast address. On failure it returns wanted, with details.
func parseUnicast(v, wanted string) (a netip.Addr, want string) {
	a, err := netip.ParseAddr(v)
	switch {
	case err != nil:
		return netip.Addr{}, wanted
	case !a.Is4():
		return netip.Addr{}, wanted + "; IPv6 is not supported"
	case !ipv4.IsUnicast(a):
		return netip.Addr{}, wanted + "; of one host: not 0.0.0.0, multicast or broadcast"
	}
	return a, ""
}

// parsePrefix parses an IPv4 prefix in CIDR notation, and keeps its host bits. On failure it returns
// wanted, with details.
func parsePrefix(v, wanted string) (p netip.Prefix, want string) {
	p, err := netip.ParsePrefix(v)
	switch {
	case err != nil:
		return netip.Prefix{}, wanted
	case !p.Addr().Is4():
		return netip.Prefix{}, wanted + "; IPv6 is not supported"
	}
	return p, ""
}

// isHostName reports whether s is a DNS name (RFC 1123, section 2.1; underscores allowed). The last
// label is never all digits, so a mistyped address is not a name.
func isHostName(s string) bool {
	s = strings.TrimSuffix(s, ".")
	if len(s) == 0 || len(s) > 253 {
		return false
	}
	labels := strings.Split(s, ".")
	for _, l := range labels {
		if len(l) == 0 || len(l) > 63 || l[0] == '-' || l[len(l)-1] == '-' {
			return false
		}
		for _, c := range []byte(l) {
			if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_') {
				return false
			}
		}
	}
	last := labels[len(labels)-1]
	return strings.Trim(last, "0123456789") != ""
}

// formatInt returns n in decimal, or word if n == special.
func formatInt(n, special int, word string) string {
	if n == special {
		return word
	}
	return strconv.Itoa(n)
}

// parseInt parses decimal low..high, or word as special.
func parseInt(to *int, v, word string, special, low, high int) (want string) {
	if v == word {
		*to = special
		return ""
	}
	n, err := strconv.ParseUint(v, 10, 31)
	if err != nil || int(n) < low || int(n) > high {
		return fmt.Sprintf("%s or %d..%d", word, low, high)
	}
	*to = int(n)
	return ""
}

func formatBool(b bool, no, yes string) string {
	if b {
		return yes
	}
	return no
}

func parseBool(to *bool, v, no, yes string) (want string) {
	if v != no && v != yes {
		return no + " or " + yes
	}
	*to = v == yes
	return ""
}

func join[T fmt.Stringer](values []T) string {
	s := make([]string, len(values))
	for i, v := range values {
		s[i] = v.String()
	}
	return strings.Join(s, ",")
}

// parseAddress parses an inner address: with the length of its subnet or, point-to-point, its peer.
func parseAddress(v string) (a netstate.InterfaceAddress, want string) {
	wanted := wantAddress
	local, peer, pointToPoint := strings.Cut(v, " peer ")
	if pointToPoint {
		wanted = wantPeer
		local = strings.TrimSuffix(local, "/32") + "/32"
		if a.Peer, want = parseUnicast(strings.TrimSuffix(peer, "/32"), wanted); want != "" {
			return a, want
		}
	}
	if a.Prefix, want = parsePrefix(local, wanted); want == "" {
		_, want = parseUnicast(a.Prefix.Addr().String(), wanted)
	}
	if want == "" && a.Peer == a.Prefix.Addr() {
		want = wantPeer
	}
	return a, want
}

const wantPeers = "an IPv4 network and the address of its remote, 10.20.0.0/16=198.51.100.7"

// parsePeer parses a route with a gateway: PREFIX=REMOTE.
func parsePeer(v string) (r netstate.InterfaceRoute, want string) {
	prefix, remote, found := strings.Cut(v, "=")
	if !found {
		return r, wantPeers
	}
	if a, err := netip.ParseAddr(prefix); err == nil && a.Is4() {
		prefix += "/32"
	}
	if r.Prefix, want = parsePrefix(prefix, wantPeers); want == "" && r.Prefix != r.Prefix.Masked() {
		want = "an IPv4 network without host bits, " + r.Prefix.Masked().String()
	}
	if want != "" {
		return r, want
	}
	if r.Gateway, want = parseUnicast(remote, wantPeers); want == "" && (r.Gateway.IsLoopback() || r.Gateway.As4()[0] == 0) {
		want = wantPeers + "; of another host"
	}
	return r, want
}

// formatPeers is the value of peers.
func formatPeers(c *Config) string {
	var b strings.Builder
	for _, r := range c.Routes {
		if !r.Gateway.IsValid() {
			continue
		}
		if b.Len() > 0 {
			b.WriteByte(',')
		}
		b.WriteString(peerText(r))
	}
	return b.String()
}

func peerText(r netstate.InterfaceRoute) string { return r.Prefix.String() + "=" + r.Gateway.String() }

// parseRoute parses a route into the interface.
func parseRoute(v string) (r netstate.InterfaceRoute, want string) {
	words := strings.Split(v, " ")
	if r.Prefix, want = parsePrefix(words[0], "an IPv4 network, 10.20.0.0/16"); want == "" && r.Prefix != r.Prefix.Masked() {
		want = "an IPv4 network without host bits, " + r.Prefix.Masked().String()
	}
	if words[0] == "default" {
		want = "an IPv4 network: 0.0.0.0/0 is the default route"
	}
	words = words[1:]
	number := func(name string, low uint64) (n uint32) {
		if want != "" || len(words) < 2 || words[0] != name {
			return 0
		}
		parsed, err := strconv.ParseUint(words[1], 10, 32)
		if words = words[2:]; err != nil || parsed < low {
			want = wantRoute
		}
		return uint32(parsed)
	}
	r.Metric = number("metric", 0)
	if len(words) == 2 && words[1] == "main" {
		words[1] = strconv.Itoa(mainTable)
	}
	if r.Table = number("table", 1); r.Table == mainTable {
		r.Table = 0
	}
	if want == "" && len(words) > 0 {
		want = wantRoute
	}
	return r, want
}

// parseRPS parses off, all, or rps_cpus in Linux's notation: groups of up to 8 hexadecimal digits,
// separated by commas.
func parseRPS(v string) (rps, want string) {
	const wanted = "off, all, or the mask of at least one processor in hexadecimal, such as 3 or ff,ffffffff"
	switch v {
	case "off":
		return "", ""
	case "all":
		return v, ""
	}
	for group := range strings.SplitSeq(v, ",") {
		if n, err := strconv.ParseUint(group, 16, 32); err != nil || len(group) > 8 || n == 0 && strings.Trim(v, "0,") == "" {
			return "", wanted
		}
	}
	return v, ""
}
