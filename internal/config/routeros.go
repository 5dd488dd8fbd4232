package config

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// The menus that are read, in the order that an export has them in.
const (
	menuTunnel  = "/interface ipip"
	menuAddress = "/ip address"
	menuRoute   = "/ip route"
)

func isRead(menu string) bool { return menu == menuTunnel || menu == menuAddress || menu == menuRoute }

// tunnelProperties are the properties of /interface ipip that can be set. A tunnel.Property has the same name.
var tunnelProperties = []string{
	"allow-fast-path", "clamp-tcp-mss", "comment", "disabled", "dont-fragment", "dscp", "ipsec-secret", "keepalive",
	"local-address", "mtu", "name", "remote-address",
}

// ipip is a tunnel that is being read.
type ipip struct {
	Tunnel
	// label is the name by which addresses and routes refer to it: RouterOS gives one if none is set.
	label string
	// plain: the script says that there is no secret.
	plain bool
}

// routerOS collects what a script says.
type routerOS struct {
	tunnels []*ipip
	labels  map[string]*ipip
	unnamed int // the last N of ipip-tunnelN, RouterOS's name for a tunnel that has none
	// networks are the subnets and peers of addresses, each with the tunnel that it is behind; nil: another interface.
	networks map[netip.Prefix]*ipip
	skipped  map[string]int // how often each menu, or property of one, was passed over
	notes    []string
	errs     Errors
}

// parseRouterOS reads the tunnels of a RouterOS export: /interface ipip, with their addresses and routes. The
// File has what could be read even if there are errors.
func parseRouterOS(name string, data []byte) (*File, Errors) {
	commands, errs := scanRouterOS(name, data)
	r := routerOS{labels: map[string]*ipip{}, networks: map[netip.Prefix]*ipip{}, skipped: map[string]int{}, errs: errs}
	var addresses, routes []command // read last: they may precede the tunnels that they refer to
	seen := map[string]bool{}
	for _, c := range commands {
		switch {
		case strings.HasPrefix(c.verb, "#"):
			r.incomplete(c, seen[menuTunnel] && seen[menuAddress] && seen[menuRoute] && !isRead(c.menu))
		case c.verb == "" && len(c.words) > 0 && strings.HasPrefix(c.words[0].raw, "[") && strings.Contains(c.words[0].raw, "@"):
			r.fail(c.pos, "the prompt of a terminal: want the export alone, as by /export file=NAME")
		case isRead(c.menu) && c.verb == "", strings.HasPrefix(c.menu, menuTunnel+" "), strings.HasPrefix(c.menu, menuAddress+" "):
			r.fail(c.pos, "not a command of RouterOS: want add or set, or the path of a menu with a / in front")
		case c.menu == menuTunnel:
			r.tunnel(c)
		case c.menu == menuAddress:
			addresses = append(addresses, c)
		case c.menu == menuRoute:
			routes = append(routes, c)
		default:
			if c.menu == "/ip ipsec policy" && slices.ContainsFunc(c.words, func(w word) bool { return w.is("protocol", "ipencap") }) {
				r.note(c.pos, "%s passed over: a tunnel is encrypted by its ipsec-secret only", c.menu)
			}
			r.skip(c.menu)
		}
		seen[c.menu] = true
	}
	for _, c := range addresses {
		r.address(c)
	}
	for _, c := range routes {
		r.route(c)
	}
	r.checkSecrets()
	slices.SortStableFunc(r.errs, func(a, b Error) int {
		return cmp.Or(cmp.Compare(a.Pos.Line, b.Pos.Line), cmp.Compare(a.Pos.Column, b.Pos.Column))
	})
	f := &File{Notes: r.notes}
	for _, t := range r.tunnels {
		f.Tunnels = append(f.Tunnels, t.Tunnel)
	}
	if len(r.skipped) > 0 {
		f.Notes = append(f.Notes, name+": passed over: "+r.countSkipped())
	}
	return f, r.errs
}

func (r *routerOS) fail(pos Position, format string, args ...any) {
	r.errs.add(pos, format, args...)
}

func (r *routerOS) note(pos Position, format string, args ...any) {
	r.notes = append(r.notes, pos.String()+": "+fmt.Sprintf(format, args...))
}

// skip counts a command, or a property of one, that has no meaning for a tunnel.
func (r *routerOS) skip(what string) { r.skipped[what]++ }

func (r *routerOS) countSkipped() string {
	var parts []string
	for _, what := range slices.Sorted(maps.Keys(r.skipped)) {
		parts = append(parts, fmt.Sprintf("%s %d", what, r.skipped[what]))
	}
	return strings.Join(parts, ", ")
}

// incomplete adds an error if c, a comment that the export is incomplete, may be about a menu that is read. complete:
// all of these precede c.
func (r *routerOS) incomplete(c command, complete bool) {
	if rest, ok := strings.CutPrefix(c.verb, "#error exporting"); ok { // "/ip/route" (timeout), or /ip route
		rest, _, _ = strings.Cut(rest, "(")
		path := strings.FieldsFunc(rest, func(c rune) bool { return c == '/' || c == '"' || unicode.IsSpace(c) })
		complete = len(path) > 0 && !isRead("/"+strings.Join(path, " "))
	}
	if !complete {
		r.fail(c.pos, "the export says that it is incomplete: want it with %s, %s and %s", menuTunnel, menuAddress, menuRoute)
		return
	}
	r.skip(strings.Fields(c.verb)[0])
}

// unresolved notes that c is about something that only the router can tell, such as [ find … ].
func (r *routerOS) unresolved(c command) {
	for _, w := range c.words {
		if c.menu == menuTunnel && w.key == "ipsec-secret" {
			r.fail(c.pos, "%s with ipsec-secret of a tunnel that is not told: want the tunnel's name behind %s", c.verb, c.verb)
			return
		}
	}
	r.note(c.pos, "%s %s passed over: the file does not tell what it is about", c.menu, c.verb)
}

// tunnel reads a command of /interface ipip.
func (r *routerOS) tunnel(c command) {
	switch c.verb {
	case "add":
		t := &ipip{Tunnel: Tunnel{Pos: c.pos}}
		r.tunnels = append(r.tunnels, t)
		r.setAll(t, c.words)
		for t.label == "" {
			r.unnamed++
			if label := "ipip-tunnel" + strconv.Itoa(r.unnamed); r.labels[label] == nil {
				r.rename(t, label)
			}
		}
	case "set", "enable", "disable", "remove":
		var t *ipip
		if len(c.words) > 0 && (c.words[0].key == "" || c.words[0].key == "numbers") {
			t = r.labels[c.words[0].value]
		}
		switch {
		case t == nil:
			r.unresolved(c)
		case c.verb == "set":
			r.setAll(t, c.words[1:])
		case c.verb == "remove":
			r.tunnels = slices.DeleteFunc(r.tunnels, func(other *ipip) bool { return other == t })
			delete(r.labels, t.label)
		default:
			t.set(Setting{"disabled", map[string]string{"enable": "no", "disable": "yes"}[c.verb], c.pos})
		}
	default:
		r.skip(c.menu + " " + c.verb)
	}
}

// is reports whether w is key=value, where "" is the key of a value alone.
func (w word) is(key, value string) bool {
	return w.key == key && w.value == value && w.raw == "" && !w.unset
}

func (r *routerOS) rename(t *ipip, label string) {
	if r.labels[t.label] == t {
		delete(r.labels, t.label)
	}
	t.label, r.labels[label] = label, t
}

// setAll sets the properties of t that words name.
func (r *routerOS) setAll(t *ipip, words []word) {
	seen := map[string]bool{}
	for _, w := range words {
		switch {
		case w.key == "", seen["ipsec-secret"] && !slices.Contains(tunnelProperties, w.key):
			// The word may be the rest of the secret: it is not shown.
			r.fail(w.pos, "not a property: want name=value, and a value with blanks in quotes")
		case !slices.Contains(tunnelProperties, w.key):
			r.fail(w.pos, "%s has no property %q that can be read: want %s", menuTunnel, w.key, strings.Join(tunnelProperties, ", "))
		case seen[w.key]:
			r.fail(w.pos, "%s twice: want it once", w.key)
		case w.raw != "":
			r.fail(w.pos, `%s: only a router can tell this value: want it without variables, brackets or unknown escapes; \$ is a dollar sign`, w.key)
		default:
			r.set(t, w)
		}
		seen[w.key] = true
	}
}

// set sets or unsets a property of t in the flag's notation.
func (r *routerOS) set(t *ipip, w word) {
	v := w.value
	switch {
	case w.key == "keepalive" && (w.unset || v == "no"):
		t.set(Setting{w.key, "off", w.pos})
		return
	case w.unset, w.key == "local-address" && v == "0.0.0.0", w.key == "ipsec-secret" && v == "":
		t.plain = t.plain || w.key == "ipsec-secret"
		t.unset(w.key)
		return
	case w.key == "comment" && !utf8.ValidString(v):
		// RouterOS keeps the bytes that it was given, and not their character set.
		r.note(w.pos, "comment passed over: it is not in UTF-8")
		t.unset(w.key)
		return
	case w.key == "comment":
		v = strings.Join(strings.FieldsFunc(v, unicode.IsControl), " ") // it may have several lines
	case w.key == "name" && v != "":
		r.rename(t, v)
	}
	if w.key != "ipsec-secret" && !utf8.ValidString(v) { // a secret is bytes
		r.fail(w.pos, "%s: %q is not in UTF-8: want ASCII", w.key, v)
		return
	}
	t.set(Setting{w.key, v, w.pos})
}

func (t *ipip) set(s Setting) {
	t.unset(s.Property)
	t.Settings = append(t.Settings, s)
}

func (t *ipip) unset(property string) {
	t.Settings = slices.DeleteFunc(t.Settings, func(s Setting) bool { return s.Property == property })
}

// checkSecrets refuses a tunnel that may have lost its secret: with one, allow-fast-path has to be no, and an
// export leaves secrets out (version 7 unless it is told to show them). It would send in the clear.
func (r *routerOS) checkSecrets() {
	for _, t := range r.tunnels {
		if t.plain || slices.ContainsFunc(t.Settings, func(s Setting) bool { return s.Property == "ipsec-secret" }) {
			continue
		}
		for _, s := range t.Settings {
			if s.Property == "allow-fast-path" && s.Value == "no" {
				t.refused = &Error{s.Pos, "allow-fast-path=no without ipsec-secret: the secret may have been left out of the export: " +
					"want an export with show-sensitive, or !ipsec-secret here if the tunnel is not encrypted"}
			}
		}
	}
}

// arguments are the properties of an address or a route.
type arguments map[string]word

func argumentsOf(c command) arguments {
	a := arguments{}
	for _, w := range c.words {
		if w.is("", "blackhole") {
			w.key = w.value
		}
		a[w.key] = w
	}
	return a
}

// adds reports whether c adds an address or a route that is not disabled. It notes or counts any other c.
func (r *routerOS) adds(c command) bool {
	switch c.verb {
	case "add":
		for _, w := range c.words {
			switch {
			case w.is("disabled", "yes"):
				r.skip(c.menu + " disabled")
				return false
			case w.raw != "" && (w.key == "interface" || w.key == "gateway"):
				r.unresolved(c)
				return false
			}
		}
		return true
	case "set", "enable", "disable", "remove":
		r.unresolved(c)
	default:
		r.skip(c.menu + " " + c.verb)
	}
	return false
}

// address reads a command of /ip address. Addresses of other interfaces tell which networks are not behind a tunnel.
func (r *routerOS) address(c command) {
	if !r.adds(c) {
		return
	}
	a := argumentsOf(c)
	t := r.labels[a["interface"].value]
	address := a["address"]
	p, ok := parsePrefix(address.value)
	n := reachable(p, a["network"].value)
	if _, taken := r.networks[n]; ok && !taken {
		r.networks[n] = t
	}
	switch {
	case t == nil:
		r.skip(c.menu + " of other interfaces")
		return
	case !ok:
		r.fail(cmp.Or(address.pos, c.pos), "address: want an IPv4 address, 10.255.0.1/30, or 10.255.0.1 with network=10.255.0.2")
		return
	}
	value := p.String()
	switch w, ok := a["network"]; {
	case p.IsSingleIP() && n.Addr() != p.Addr():
		value = p.Addr().String() + " peer " + n.Addr().String()
	case ok && w.value != n.Addr().String():
		r.note(w.pos, "network passed over: that of %s is %s", p, n.Addr())
	}
	t.Settings = append(t.Settings, Setting{"address", value, address.pos})
}

// reachable returns the subnet of an address: with /32 the peer that network= names.
func reachable(p netip.Prefix, networkAddress string) netip.Prefix {
	if peer, err := netip.ParseAddr(networkAddress); err == nil && peer.Is4() && p.IsSingleIP() {
		return netip.PrefixFrom(peer, 32)
	}
	return p.Masked()
}

// parsePrefix parses an address with the length of its subnet, or without: then it is 32.
func parsePrefix(v string) (netip.Prefix, bool) {
	if !strings.Contains(v, "/") {
		v += "/32"
	}
	p, err := netip.ParsePrefix(v)
	return p, err == nil && p.Addr().Is4()
}

// route reads a command of /ip route. It adds the route to each tunnel that is one of its gateways, or has one behind it.
func (r *routerOS) route(c command) {
	if !r.adds(c) {
		return
	}
	a := argumentsOf(c)
	var tunnels []*ipip
	gateways := []string{a["gateway"].value}
	if r.labels[gateways[0]] == nil { // a tunnel's name may have a comma
		gateways = strings.Split(gateways[0], ",")
	}
	for _, gateway := range gateways {
		if t := r.behind(gateway); t != nil && !slices.Contains(tunnels, t) {
			tunnels = append(tunnels, t)
		}
	}
	_, blackhole := a["blackhole"]
	if kind := a["type"].value; len(tunnels) == 0 || blackhole || kind != "" && kind != "unicast" {
		r.skip(c.menu + " by other gateways")
		return
	}
	value := "0.0.0.0/0"
	pos := a["gateway"].pos
	if w, ok := a["dst-address"]; ok {
		p, ok := parsePrefix(w.value)
		if !ok {
			r.fail(w.pos, "dst-address: want an IPv4 network, 10.20.0.0/16")
			return
		}
		value, pos = p.Masked().String(), w.pos
	}
	switch w := a["distance"]; {
	case w.raw != "" || w.value != "" && !isNumber(w.value):
		r.fail(w.pos, "distance: want a number")
		return
	case w.value != "" && strings.TrimLeft(w.value, "0") != "1": // RouterOS's default
		value += " metric " + w.value
	}
	switch w := cmp.Or(a["routing-table"], a["routing-mark"]); { // version 7, 6
	case w.raw == "" && isNumber(w.value):
		value += " table " + w.value
	case w.raw != "" || w.value != "" && w.value != "main":
		r.note(w.pos, "route %s passed over: it is in the routing table %q, which has no number", value, cmp.Or(w.value, w.raw))
		return
	}
	for _, t := range tunnels {
		t.Settings = append(t.Settings, Setting{"route", value, pos})
	}
	for key := range a {
		switch key {
		case "dst-address", "gateway", "distance", "routing-table", "routing-mark", "comment", "disabled", "type",
			"scope", "target-scope", "suppress-hw-offload":
		default:
			r.skip(c.menu + " " + cmp.Or(key, "argument"))
		}
	}
}

// behind returns the tunnel that gateway names, or that is the way to its address by the longest matching
// network, or nil. A gateway is 10.0.0.1, ipip1, 10.0.0.1%ipip1 or 10.0.0.1@main.
func (r *routerOS) behind(gateway string) *ipip {
	if t := r.labels[gateway]; t != nil {
		return t
	}
	gateway, _, _ = strings.Cut(gateway, "@")
	if _, device, ok := strings.Cut(gateway, "%"); ok {
		gateway = device
	}
	if t := r.labels[gateway]; t != nil {
		return t
	}
	address, err := netip.ParseAddr(gateway)
	if err != nil {
		return nil
	}
	for bits := 32; bits >= 0; bits-- {
		if n, err := address.Prefix(bits); err == nil {
			if t, ok := r.networks[n]; ok {
				return t
			}
		}
	}
	return nil
}

func isNumber(s string) bool {
	_, err := strconv.ParseUint(s, 10, 32)
	return err == nil
}
