package doctor

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"ipipd/internal/ipv4"
)

// parseNFT reads the output of nft -j list ruleset (libnftables-json(5)). foreign are the tables, as
// "family name", with matches of iptables-nft, which nft cannot show.
func parseNFT(text []byte) (r *ruleset, foreign map[string]bool, err error) {
	var list struct {
		Nftables []map[string]json.RawMessage `json:"nftables"`
	}
	if err := json.Unmarshal(text, &list); err != nil {
		return nil, nil, fmt.Errorf("read what nft says: %w", err)
	}
	r, foreign = &ruleset{}, map[string]bool{}
	sets := map[string][]any{}
	var rules []*nftRule
	for _, object := range list.Nftables {
		var c struct {
			Family, Table, Name, Hook, Policy string
			Dev                               any
		}
		var set struct {
			Family, Table, Name string
			Elem                []any
		}
		var one nftRule
		switch {
		case object["chain"] != nil:
			if err = json.Unmarshal(object["chain"], &c); err == nil {
				r.chains = append(r.chains, &chain{tool: "nft", family: c.Family, table: c.Table, name: c.Name, hook: c.Hook,
					devices: texts(c.Dev), dropPolicy: c.Policy == "drop"})
			}
		case object["set"] != nil || object["map"] != nil:
			text := object["set"]
			if text == nil {
				text = object["map"]
			}
			if json.Unmarshal(text, &set) == nil { // else a match with it is maybe
				sets[set.Family+" "+set.Table+" @"+set.Name] = set.Elem
			}
		case object["rule"] != nil:
			if err = json.Unmarshal(object["rule"], &one); err == nil {
				rules = append(rules, &one)
			}
		}
		if err != nil {
			return nil, nil, fmt.Errorf("read what nft says: %w", err)
		}
	}
	for _, one := range rules {
		c := r.find(&chain{tool: "nft", family: one.Family, table: one.Table}, one.Chain)
		if c == nil {
			continue
		}
		one.sets = sets
		c.rules = append(c.rules, one.rule())
		if one.foreign {
			foreign[one.Family+" "+one.Table] = true
		}
	}
	return r, foreign, nil
}

// texts returns the strings of a JSON string, or array of strings.
func texts(v any) (all []string) {
	switch v := v.(type) {
	case string:
		return []string{v}
	case []any:
		for _, one := range v {
			all = append(all, texts(one)...)
		}
	}
	return all
}

// nftRule is a rule as nft writes it.
type nftRule struct {
	Family, Table, Chain, Comment string
	Handle                        int
	Expr                          []map[string]any

	sets    map[string][]any
	foreign bool
	out     rule
}

func (n *nftRule) rule() rule {
	n.out = rule{text: "rule handle " + strconv.Itoa(n.Handle), comment: n.Comment}
	for _, statement := range n.Expr {
		for kind, v := range statement {
			n.statement(kind, v)
		}
	}
	return n.out
}

// statement adds a statement of an nft rule to out. A rule has one verdict at most.
func (n *nftRule) statement(kind string, v any) {
	unknown := func(*firewallPacket) truth { return maybe }
	fields, _ := v.(map[string]any)
	switch kind {
	case "match":
		n.out.matches = append(n.out.matches, n.match(fields["left"], fields["op"], fields["right"]))
	case "limit", "quota", "ct count", "meter":
		n.out.matches = append(n.out.matches, unknown)
	case "xt":
		n.foreign = true
		if fields["type"] == "target" && (fields["name"] == "REJECT" || fields["name"] == "DROP") {
			n.out.verdict = verdict{action: drop}
		} else if fields["name"] != "comment" && fields["type"] != "target" {
			n.out.matches = append(n.out.matches, unknown)
		}
	case "vmap":
		n.out.verdict = n.vmap(fields)
	default:
		if verdict, ok := nftVerdict(kind, fields); ok {
			n.out.verdict = verdict
		}
	}
}

func nftVerdict(kind string, fields map[string]any) (verdict, bool) {
	target, _ := fields["target"].(string)
	switch kind {
	case "accept", "queue":
		return verdict{action: accept}, true
	case "drop", "reject":
		return verdict{action: drop}, true
	case "return":
		return verdict{action: back}, true
	case "jump":
		return verdict{action: jump, target: target}, true
	case "goto":
		return verdict{action: jumpAway, target: target}, true
	}
	return verdict{}, false
}

// vmap reads a verdict map.
func (n *nftRule) vmap(fields map[string]any) (v verdict) {
	v.action = byCase
	for _, one := range n.elements(fields["data"]) {
		pair, _ := one.([]any)
		if len(pair) != 2 {
			continue
		}
		what, _ := pair[1].(map[string]any)
		for kind, arguments := range what {
			target, _ := arguments.(map[string]any)
			if then, ok := nftVerdict(kind, target); ok {
				v.when = append(v.when, verdictCase{n.match(fields["key"], "==", pair[0]), then})
			}
		}
	}
	return v
}

// elements returns the elements of a set, {"set": …} or a named one; nil if v is neither.
func (n *nftRule) elements(v any) []any {
	switch v := v.(type) {
	case string:
		return n.sets[n.Family+" "+n.Table+" "+v]
	case map[string]any:
		all, _ := v["set"].([]any)
		return all
	}
	return nil
}

// match reads a comparison.
func (n *nftRule) match(left, op, right any) match {
	equal := n.equal(left, right)
	switch op {
	case "==", "in":
		return equal
	case "!=":
		return func(p *firewallPacket) truth { return equal(p).not() }
	}
	return func(*firewallPacket) truth { return maybe }
}

func (n *nftRule) equal(left, right any) match {
	unknown := func(*firewallPacket) truth { return maybe }
	fields, _ := left.(map[string]any)
	part := func(of, name string) string {
		inner, _ := fields[of].(map[string]any)
		text, _ := inner[name].(string)
		return text
	}
	key := part("meta", "key")
	protocol, field := part("payload", "protocol"), part("payload", "field")
	switch {
	case key == "l4proto", protocol == "ip" && field == "protocol":
		n.out.protocols = append(n.out.protocols, n.protocols(right)...)
		return n.among(right, func(p *firewallPacket, v any) truth { return truthOf(protocolNumber(v) == p.protocol) })
	case key == "nfproto":
		return n.among(right, func(_ *firewallPacket, v any) truth { return truthOf(v == "ipv4") })
	case key == "protocol":
		return n.among(right, func(_ *firewallPacket, v any) truth { return truthOf(v == "ip") })
	case key == "iifname", key == "iif", key == "oifname", key == "oif":
		incoming := key[0] == 'i'
		return n.among(right, func(p *firewallPacket, v any) truth {
			name, ok := v.(string)
			if !ok {
				return maybe
			}
			prefix, any := strings.CutSuffix(name, "*")
			return truthOf(p.in == incoming && (name == p.device || any && strings.HasPrefix(p.device, prefix)))
		})
	case part("ct", "key") == "state":
		return n.among(right, func(p *firewallPacket, v any) truth {
			return truthOf(v == "established" && p.established || v == "new" && !p.established)
		})
	case part("ct", "key") == "status": // of translated connections: the outer packets are not
		return n.among(right, func(_ *firewallPacket, v any) truth {
			if v == "dnat" || v == "snat" {
				return no
			}
			return maybe
		})
	case part("fib", "result") == "type":
		flags, _ := fields["fib"].(map[string]any)
		source := slices.Contains(texts(flags["flags"]), "saddr")
		return n.among(right, func(p *firewallPacket, v any) truth { return typeOf(p, source, fmt.Sprint(v)) })
	case protocol == "ip" && field == "saddr":
		return n.among(right, func(p *firewallPacket, v any) truth { return addressIn(p.src, v) })
	case protocol == "ip" && field == "daddr":
		return n.among(right, func(p *firewallPacket, v any) truth { return addressIn(p.dst, v) })
	case (protocol == "udp" || protocol == "th") && (field == "dport" || field == "sport"):
		return n.among(right, func(p *firewallPacket, v any) truth {
			return truthOf(p.protocol == ipv4.ProtocolUDP && portIn(p.port, v))
		})
	}
	if other := otherProtocol(left); other != "" {
		number := protocolNumber(other)
		return func(p *firewallPacket) truth {
			if p.protocol == number {
				return maybe
			}
			return no
		}
	}
	return unknown
}

// otherProtocol returns the protocol whose header an expression reads, so that it matches no packet of another; or "".
func otherProtocol(left any) string {
	switch v := left.(type) {
	case []any:
		for _, one := range v {
			if p := otherProtocol(one); p != "" {
				return p
			}
		}
	case map[string]any:
		for kind, inner := range v {
			switch fields, _ := inner.(map[string]any); kind {
			case "payload":
				if p, _ := fields["protocol"].(string); slices.Contains(headers, p) {
					return p
				}
			case "tcp option":
				return "tcp"
			case "concat", "&", "|", "^", "<<", ">>":
				return otherProtocol(inner)
			}
		}
	}
	return ""
}

// headers are protocols with a header of their own.
var headers = []string{"tcp", "udp", "udplite", "sctp", "dccp", "icmp", "icmpv6", "igmp", "ip6", "ah", "comp", "th", "gre", "vxlan"}

// typeOf compares the type (RTN_LOCAL, …) of a packet's source or destination, one of which is this host's.
func typeOf(p *firewallPacket, source bool, name string) truth {
	local := p.in != source
	switch strings.ToLower(name) {
	case "local":
		return truthOf(local)
	case "unicast":
		return truthOf(!local)
	}
	return no
}

// among returns a match by test of right: of the value, or, if it is a set, of any of its elements.
func (n *nftRule) among(right any, test func(*firewallPacket, any) truth) match {
	values := []any{right}
	if name, ok := right.(string); ok && strings.HasPrefix(name, "@") {
		if values, ok = n.sets[n.Family+" "+n.Table+" "+name]; !ok {
			return func(*firewallPacket) truth { return maybe }
		}
	}
	return func(p *firewallPacket) (all truth) {
		for _, v := range flatten(values) {
			switch test(p, v) {
			case yes:
				return yes
			case maybe:
				all = maybe
			}
		}
		return all
	}
}

// flatten returns the values in lists, in sets, and in elements with a timeout or comment.
func flatten(values []any) (all []any) {
	for _, v := range values {
		switch inner := v.(type) {
		case []any:
			all = append(all, flatten(inner)...)
			continue
		case map[string]any:
			if list, ok := inner["set"].([]any); ok {
				all = append(all, flatten(list)...)
				continue
			}
			if element, ok := inner["elem"].(map[string]any); ok {
				all = append(all, flatten([]any{element["val"]})...)
				continue
			}
		}
		all = append(all, v)
	}
	return all
}

func (n *nftRule) protocols(right any) (all []int) {
	for _, v := range flatten([]any{right}) {
		all = append(all, protocolNumber(v))
	}
	return all
}

// protocolNumber returns the protocol of a number, or of a name of /etc/protocols; -1 if it is not known.
func protocolNumber(v any) int {
	switch v := v.(type) {
	case float64:
		return int(v)
	case string:
		switch v {
		case "ipencap", "ipv4", "IP-ENCAP":
			return ipv4.ProtocolIPIP
		case "ipip", "IPIP":
			return 94
		case "esp":
			return ipv4.ProtocolESP
		case "udp":
			return ipv4.ProtocolUDP
		}
		if n, err := strconv.Atoi(v); err == nil {
			return n
		}
	}
	return -1
}

// addressIn compares with an address, prefix or range.
func addressIn(a netip.Addr, v any) truth {
	switch v := v.(type) {
	case string:
		if b, err := netip.ParseAddr(v); err == nil {
			return truthOf(a == b)
		}
		if b, err := netip.ParsePrefix(v); err == nil {
			return truthOf(b.Contains(a))
		}
	case map[string]any:
		if p, ok := v["prefix"].(map[string]any); ok {
			first, err := netip.ParseAddr(fmt.Sprint(p["addr"]))
			bits, ok := p["len"].(float64)
			if err == nil && ok {
				return truthOf(netip.PrefixFrom(first, int(bits)).Contains(a))
			}
		}
		if r, ok := v["range"].([]any); ok && len(r) == 2 {
			first, err1 := netip.ParseAddr(fmt.Sprint(r[0]))
			last, err2 := netip.ParseAddr(fmt.Sprint(r[1]))
			if err1 == nil && err2 == nil {
				return truthOf(first.Compare(a) <= 0 && a.Compare(last) <= 0)
			}
		}
	}
	return maybe
}

// portIn compares with a port, its name, or a range.
func portIn(port int, v any) bool {
	switch v := v.(type) {
	case float64:
		return int(v) == port
	case string:
		return v == "isakmp" && port == 500
	case map[string]any:
		if r, ok := v["range"].([]any); ok && len(r) == 2 {
			first, ok1 := r[0].(float64)
			last, ok2 := r[1].(float64)
			return ok1 && ok2 && int(first) <= port && port <= int(last)
		}
	}
	return false
}
