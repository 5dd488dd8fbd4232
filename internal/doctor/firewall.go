package doctor

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"ipipd/internal/ipv4"
)

// Local firewall rules are read into a ruleset, whichever program wrote them, which is evaluated
// for a packet. A match that is not understood may match or not (maybe), so that a packet that is
// found to be dropped is dropped for certain.

// truth is whether a rule matches.
type truth uint8

const (
	no truth = iota
	yes
	maybe
)

func truthOf(b bool) truth {
	if b {
		return yes
	}
	return no
}

func (t truth) not() truth {
	switch t {
	case no:
		return yes
	case yes:
		return no
	}
	return maybe
}

// firewallPacket is a packet that rules are evaluated for: an outer packet, or one of IKE.
type firewallPacket struct {
	in          bool // received
	device      string
	src, dst    netip.Addr
	protocol    int
	port        int  // UDP, at both ends
	established bool // else it begins a connection
}

// match is one condition of a rule.
type match func(*firewallPacket) truth

// verdict is what a rule does with a packet that matches.
type verdict struct {
	action action
	target string // of jump and goto
	when   []verdictCase
}

type action uint8

const (
	goOn action = iota // no verdict: count, log, mark
	accept
	drop
	jump
	jumpAway // goto
	back     // return
	byCase   // a verdict map: the verdict of the first of when that matches
)

type verdictCase struct {
	match
	verdict
}

// rule is a rule of a chain. text tells an operator which one it is.
type rule struct {
	matches []match
	verdict
	text, comment string
	// protocols are the numbers of the IP protocols that it names.
	protocols []int
}

// hooks that outer packets pass, as nftables calls them.
var hooksIn, hooksOut = []string{"ingress", "prerouting", "input"}, []string{"output", "postrouting", "egress"}

// chain is a chain of a table. hook is "" if it is only jumped to.
type chain struct {
	tool, family, table, name, hook string
	devices                         []string // of ingress and egress, if known
	dropPolicy                      bool
	rules                           []rule
}

// where names the chain, its table and its tool.
func (c *chain) where() string {
	if c.tool == "nft" {
		return fmt.Sprintf("nftables: table %s %s, chain %s", c.family, c.table, c.name)
	}
	return fmt.Sprintf("%s: table %s, chain %s", c.tool, c.table, c.name)
}

// ofUnknown reports whether the chain's devices are not known: the JSON of some releases of nft lacks them.
func (c *chain) ofUnknown() bool {
	return (c.hook == "ingress" || c.hook == "egress") && len(c.devices) == 0
}

// unclear says why it is not known what the chain does.
func (c *chain) unclear() string {
	if c.ofUnknown() {
		return fmt.Sprintf("%s is of a device that nft -j does not name: nft list chain %s %s %s", c.where(), c.family, c.table, c.name)
	}
	return c.where() + " has matches that are not understood here"
}

// ruleset is all chains of a host.
type ruleset struct{ chains []*chain }

func (r *ruleset) find(like *chain, name string) *chain {
	for _, c := range r.chains {
		if c.tool == like.tool && c.family == like.family && c.table == like.table && c.name == name {
			return c
		}
	}
	return nil
}

// outcomes says what may become of a packet in a chain.
type outcomes struct {
	accepted, dropped, goesOn bool
	dropper                   *chain // the first chain that drops it
	rule                      *rule  // dropper's rule; nil: its policy
}

func (o *outcomes) add(more outcomes) {
	o.accepted = o.accepted || more.accepted
	o.goesOn = o.goesOn || more.goesOn
	if more.dropped && !o.dropped {
		o.dropped, o.dropper, o.rule = true, more.dropper, more.rule
	}
}

// walk evaluates chains for one packet, each chain once.
type walk struct {
	*ruleset
	*firewallPacket
	known map[*chain]outcomes
}

// run returns what a chain can do with the packet; goesOn: it comes to the chain's end. (The kernel refuses loops.)
func (w *walk) run(c *chain) outcomes {
	if known, ok := w.known[c]; ok {
		return known
	}
	w.known[c] = outcomes{goesOn: true}
	o := w.rules(c)
	w.known[c] = o
	return o
}

func (w *walk) rules(c *chain) (all outcomes) {
	for i := range c.rules {
		rule := &c.rules[i]
		matched := yes
		for _, m := range rule.matches {
			if matched = and(matched, m(w.firewallPacket)); matched == no {
				break
			}
		}
		if matched == no {
			continue
		}
		done, ends := w.apply(c, rule, &rule.verdict)
		if matched == maybe {
			done.goesOn = done.goesOn && ends
			all.add(done)
			continue
		}
		all.add(done)
		if ends {
			return all
		}
	}
	all.goesOn = true
	return all
}

// and returns whether both conditions match.
func and(a, b truth) truth {
	switch {
	case a == no || b == no:
		return no
	case a == maybe || b == maybe:
		return maybe
	}
	return yes
}

// apply returns what a verdict does with the packet. ends: the chain's later rules do not see it.
func (w *walk) apply(c *chain, of *rule, v *verdict) (o outcomes, ends bool) {
	switch v.action {
	case accept:
		return outcomes{accepted: true}, true
	case drop:
		return outcomes{dropped: true, dropper: c, rule: of}, true
	case back:
		return outcomes{goesOn: true}, true
	case jump, jumpAway:
		to := w.find(c, v.target)
		if to == nil {
			return outcomes{}, false
		}
		o = w.run(to)
		if v.action == jumpAway {
			return o, true
		}
		ends = !o.goesOn
		o.goesOn = false
		return o, ends
	case byCase:
		for i := range v.when {
			one := &v.when[i]
			t := one.match(w.firewallPacket)
			if t == no {
				continue
			}
			done, over := w.apply(c, of, &one.verdict)
			o.add(done)
			if t == yes {
				return o, over
			}
		}
	}
	return o, false
}

// passage evaluates all hooks of the packet's direction. base is the first base chain that drops it
// for certain, by its outcomes; if there is none, unsure is the first that may drop it. Both nil: it passes.
func (r *ruleset) passage(p *firewallPacket) (base *chain, by outcomes, unsure *chain) {
	w := walk{r, p, map[*chain]outcomes{}}
	hooks := hooksOut
	if p.in {
		hooks = hooksIn
	}
	for _, hook := range hooks {
		for _, c := range r.chains {
			if c.hook != hook || c.family != "ip" && c.family != "inet" && c.family != "netdev" {
				continue
			}
			if len(c.devices) > 0 && !slices.Contains(c.devices, p.device) {
				continue
			}
			o := w.run(c)
			if o.goesOn {
				o.goesOn = false
				if c.dropPolicy {
					o.add(outcomes{dropped: true, dropper: c})
				} else {
					o.accepted = true
				}
			}
			switch {
			case o.dropped && !o.accepted && !c.ofUnknown():
				return c, o, nil
			case o.dropped && unsure == nil:
				unsure = c
			}
		}
	}
	return nil, outcomes{}, unsure
}

// firewall evaluates the local rules for the outer packets of each tunnel.
func (e *examination) firewall() {
	if len(e.tunnels) == 0 {
		return
	}
	e.readRules()
	if e.rules == nil || len(e.rules.chains) == 0 {
		return
	}
	plain := false
	for _, s := range e.tunnels {
		plain = plain || !s.encrypted
		if !s.encrypted {
			e.passes(s, firewallPacket{protocol: ipv4.ProtocolIPIP}, "protocol 4", "4")
			continue
		}
		e.passes(s, firewallPacket{protocol: ipv4.ProtocolUDP, port: 500}, "IKE (UDP 500)", "udp --dport 500")
		e.passes(s, firewallPacket{protocol: ipv4.ProtocolESP}, "ESP (protocol 50)", "esp")
	}
	if plain {
		e.protocol94()
	}
}

// paths returns the subjects with a path whose remotes packets are sent to, or received from: s itself, or one for
// each of many remotes that was looked up.
func (s *subject) paths(in bool) (all []*subject) {
	ways := append(slices.Clip(s.remotes), s)
	if in {
		ways = append(ways, s.senders...)
	}
	for _, one := range ways {
		if one.hasPath() && one.local.IsValid() {
			all = append(all, one)
		}
	}
	return all
}

// blocked is what the rules do to packets of one direction, of some remotes.
type blocked struct {
	base    *chain // nil: only unsure may drop them
	by      outcomes
	unsure  *chain
	begins  bool // only packets that begin a connection are dropped
	remotes []string
	first   netip.Addr
}

// blocked returns the chains that drop, or may drop, packets of one direction, each with the remotes concerned.
func (e *examination) blocked(s *subject, p firewallPacket) (all []*blocked) {
	for _, one := range s.paths(p.in) {
		p.device, p.src, p.dst = one.device(), one.local, one.remote
		if p.in {
			p.src, p.dst = one.remote, one.local
		}
		b := &blocked{first: one.remote}
		for _, p.established = range []bool{true, false} {
			b.begins = !p.established
			if b.base, b.by, b.unsure = e.rules.passage(&p); b.base != nil || b.unsure != nil {
				break
			}
		}
		if b.base == nil && b.unsure == nil {
			continue
		}
		i := slices.IndexFunc(all, func(o *blocked) bool {
			return o.base == b.base && o.unsure == b.unsure && o.begins == b.begins && o.by.dropper == b.by.dropper && o.by.rule == b.by.rule
		})
		if i < 0 {
			i, all = len(all), append(all, b)
		}
		all[i].remotes = append(all[i].remotes, one.remote.String())
	}
	return all
}

// passes adds findings if the packets of a tunnel do not pass. flag is what iptables's -p takes.
func (e *examination) passes(s *subject, p firewallPacket, what, flag string) {
	for _, p.in = range []bool{true, false} {
		for _, b := range e.blocked(s, p) {
			direction := "sent to " + named(b.remotes)
			if p.in {
				direction = "received from " + named(b.remotes)
			}
			switch {
			case b.base == nil && b.begins:
				e.skip(s, "whether %s %s passes that begins a connection is not known: %s", what, direction, b.unsure.unclear())
			case b.base == nil:
				e.skip(s, "whether %s %s passes is not known: %s", what, direction, b.unsure.unclear())
			case b.begins && p.in:
				e.found(FirewallConntrack, s, fmt.Sprintf("%s %s is let in only as an answer: %s", what, direction, place(&b.by)),
					"the tunnel works once this end has sent something, until conntrack forgets it (after 600 s without a packet, 120 s of UDP); the peer cannot begin",
					allow(b.base, b.by.dropper, b.first, true, flag))
			default:
				e.dropped(s, b, p.in, what, direction, flag)
			}
		}
	}
}

func (e *examination) dropped(s *subject, b *blocked, in bool, what, direction, flag string) {
	comment := ""
	if b.by.rule != nil {
		comment = b.by.rule.comment
	}
	if strings.HasPrefix(b.by.dropper.name, "cali-") && strings.Contains(comment, "IPIP") {
		e.found(CalicoDrops, s, fmt.Sprintf("Calico drops %s %s: %s", what, direction, place(&b.by)),
			"it takes protocol 4 for its own overlay, from hosts of its cluster only",
			fmt.Sprintf("calicoctl patch felixconfiguration default -p '{\"spec\":{\"externalNodesList\":[\"%v\"]}}'", b.first))
		return
	}
	e.found(FirewallDrops, s, fmt.Sprintf("%s %s is dropped: %s", what, direction, place(&b.by)),
		"no packet of the tunnel passes", allow(b.base, b.by.dropper, b.first, in, flag))
}

// place says which rule, or which chain's policy, drops the packet.
func place(o *outcomes) string {
	switch {
	case o.rule == nil:
		return o.dropper.where() + ", its policy"
	case o.rule.text == "":
		return o.dropper.where()
	}
	return o.dropper.where() + ", " + o.rule.text
}

// allow returns the command that adds a rule for the packets ahead of all other rules of the base chain.
func allow(base, dropper *chain, remote netip.Addr, in bool, flag string) string {
	side, option, way := "daddr", "-d", "output"
	if in {
		side, option, way = "saddr", "-s", "input"
	}
	ufw := func(r rule) bool { return strings.HasPrefix(r.target, "ufw-") }
	switch {
	case strings.HasPrefix(dropper.name, "ufw-"), slices.ContainsFunc(base.rules, ufw):
		return fmt.Sprintf("add to /etc/ufw/before.rules, ahead of COMMIT: -A ufw-before-%s %s %v -p %s -j ACCEPT; then: ufw reload",
			way, option, remote, flag)
	case base.table == "firewalld" && in:
		what := "protocol value=" + flag
		if port, ok := strings.CutPrefix(flag, "udp --dport "); ok {
			what = "port port=" + port + " protocol=udp"
		}
		rule := fmt.Sprintf("rule family=ipv4 source address=%v %s accept", remote, what)
		return "firewall-cmd --permanent --add-rich-rule='" + rule + "' && firewall-cmd --reload"
	case base.tool == "nft":
		word := "ip protocol " + flag
		if port, ok := strings.CutPrefix(flag, "udp --dport "); ok {
			word = "udp dport " + port
		}
		return fmt.Sprintf("nft insert rule %s %s %s ip %s %v %s accept", base.family, base.table, base.name, side, remote, word)
	}
	table := ""
	if base.table != "filter" {
		table = "-t " + base.table + " "
	}
	return fmt.Sprintf("%s %s-I %s %s %v -p %s -j ACCEPT", base.tool, table, base.name, option, remote, flag)
}

// protocol94 looks for rules that name protocol 94, which /etc/protocols calls ipip, where none
// names 4.
func (e *examination) protocol94() {
	var at *chain
	var of *rule
	for _, c := range e.rules.chains {
		for i := range c.rules {
			r := &c.rules[i]
			if slices.Contains(r.protocols, ipv4.ProtocolIPIP) {
				return
			}
			if slices.Contains(r.protocols, 94) && at == nil {
				at, of = c, r
			}
		}
	}
	if at == nil {
		return
	}
	e.found(FirewallProtocol94, nil, fmt.Sprintf("a rule names protocol 94, and none names 4: %s, %s", at.where(), of.text),
		"/etc/protocols calls 94 \"ipip\"; IP in IP (RFC 2003) is protocol 4, \"ipencap\" there",
		"write 4 instead of ipip in that rule")
}
