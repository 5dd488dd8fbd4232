package doctor

import (
	"context"
	"errors"
	"io/fs"
	"net/netip"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"ipipd/internal/ipv4"
)

// commandTimeout bounds a command: with very many rules one takes seconds.
const commandTimeout = 10 * time.Second

// readRules reads the rules of nftables and of both kinds of iptables. iptables-legacy-save is not run
// unless its tables exist: it might load modules.
func (e *examination) readRules() {
	run := func(name string, args ...string) ([]byte, error) {
		ctx, cancel := context.WithTimeout(e.ctx, commandTimeout)
		defer cancel()
		return e.Command(ctx, name, args...)
	}
	e.rules = &ruleset{}
	foreign := map[string]bool{}
	text, err := run("nft", "-j", "list", "ruleset")
	if err == nil {
		e.rules, foreign, err = parseNFT(text)
	}
	if err != nil {
		e.rules = &ruleset{}
		e.skip(nil, "the rules of nftables are not known: %v", missing(err, "nft", "nftables"))
	}
	if err != nil || len(foreign) > 0 {
		text, err := run("iptables-nft-save")
		if err == nil {
			e.rules.chains = slices.DeleteFunc(e.rules.chains, func(c *chain) bool {
				return c.family == "ip" && foreign[c.family+" "+c.table]
			})
			e.rules.chains = append(e.rules.chains, parseIPTables("iptables", string(text))...)
		} else {
			e.skip(nil, "the rules of iptables are not known: %v", missing(err, "iptables-nft-save", "iptables"))
		}
	}
	tables, err := fs.ReadFile(e.Files, "proc/thread-self/net/ip_tables_names")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		e.skip(nil, "whether there are rules of legacy iptables is not known: %v", err)
	}
	if len(tables) == 0 {
		return
	}
	if text, err := run("iptables-legacy-save"); err == nil {
		e.rules.chains = append(e.rules.chains, parseIPTables("iptables-legacy", string(text))...)
	} else {
		e.skip(nil, "the rules of legacy iptables are not known: %v", missing(err, "iptables-legacy-save", "iptables"))
	}
}

// missing returns err, or, if the command is not installed, an error that names the package that has it.
func missing(err error, command, debian string) error {
	if errors.Is(err, exec.ErrNotFound) {
		return errors.New(command + " is not installed (package " + debian + ")")
	}
	return err
}

// hooksOfIPTables are the built-in chains that outer packets pass.
var hooksOfIPTables = map[string]string{
	"PREROUTING": "prerouting", "INPUT": "input", "OUTPUT": "output", "POSTROUTING": "postrouting",
}

// parseIPTables reads the output of iptables-save.
func parseIPTables(tool, text string) (chains []*chain) {
	table := ""
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(line, "*"):
			table = line[1:]
		case strings.HasPrefix(line, ":"):
			f := strings.Fields(line[1:])
			if len(f) < 2 {
				continue
			}
			c := &chain{tool: tool, family: "ip", table: table, name: f[0], dropPolicy: f[1] == "DROP"}
			if f[1] != "-" { // built in
				c.hook = hooksOfIPTables[f[0]]
			}
			chains = append(chains, c)
		case strings.HasPrefix(line, "-A "):
			words := splitQuoted(line)
			if len(words) < 2 {
				continue
			}
			i := slices.IndexFunc(chains, func(c *chain) bool { return c.table == table && c.name == words[1] })
			if i >= 0 {
				chains[i].rules = append(chains[i].rules, parseIPTablesRule(line, words[2:]))
			}
		}
	}
	return chains
}

// splitQuoted splits at blanks outside of double quotes, in which a backslash quotes.
func splitQuoted(line string) (words []string) {
	var word strings.Builder
	inside, begun, escaped := false, false, false
	for _, c := range line {
		switch {
		case escaped:
			word.WriteRune(c)
			escaped = false
		case inside && c == '\\':
			escaped = true
		case c == '"':
			inside, begun = !inside, true
		case c == ' ' && !inside:
			if begun {
				words = append(words, word.String())
			}
			word.Reset()
			begun = false
		default:
			word.WriteRune(c)
			begun = true
		}
	}
	if begun {
		words = append(words, word.String())
	}
	return words
}

// parseIPTablesRule reads what follows -A CHAIN, as iptables-save writes it. An option that is not known may match.
func parseIPTablesRule(line string, words []string) rule {
	r := rule{text: line}
	negated := false
	for i := 0; i < len(words); i++ {
		option, value := words[i], ""
		values := 0
		for i+1+values < len(words) && !isOption(words[i+1+values]) {
			values++
		}
		if values > 0 {
			value = words[i+1]
		}
		if option == "!" {
			negated = true
			continue
		}
		i += values
		var m match
		switch option {
		case "-m":
		case "--comment":
			r.comment = value
		case "-j", "-g":
			r.verdict = iptablesVerdict(value)
			if option == "-g" {
				r.action = jumpAway
			}
			i = len(words) // the rest are options of the target
		default:
			m = iptablesMatch(&r, option, value)
		}
		if m != nil {
			if negated {
				positive := m
				m = func(p *firewallPacket) truth { return positive(p).not() }
			}
			r.matches = append(r.matches, m)
		}
		negated = false
	}
	return r
}

func isOption(word string) bool {
	return word == "!" || len(word) > 1 && word[0] == '-' && (word[1] < '0' || word[1] > '9')
}

func iptablesVerdict(target string) verdict {
	switch target {
	case "ACCEPT", "NFQUEUE", "QUEUE":
		return verdict{action: accept}
	case "DROP", "REJECT":
		return verdict{action: drop}
	case "RETURN":
		return verdict{action: back}
	}
	// A chain of the operator's, or a target without verdict (LOG): then no chain is found, and it goes on.
	return verdict{action: jump, target: target}
}

func iptablesMatch(r *rule, option, value string) match {
	switch option {
	case "-p":
		number := protocolNumber(value)
		r.protocols = append(r.protocols, number)
		return func(p *firewallPacket) truth { return truthOf(value == "all" || number == p.protocol) }
	case "-s":
		return func(p *firewallPacket) truth { return anyAddress(p.src, value) }
	case "-d":
		return func(p *firewallPacket) truth { return anyAddress(p.dst, value) }
	case "-i", "-o":
		prefix, any := strings.CutSuffix(value, "+")
		incoming := option == "-i"
		return func(p *firewallPacket) truth {
			return truthOf(p.in == incoming && (value == p.device || any && strings.HasPrefix(p.device, prefix)))
		}
	case "--ctstate", "--state":
		states := strings.Split(value, ",")
		return func(p *firewallPacket) truth {
			return truthOf(p.established && slices.Contains(states, "ESTABLISHED") || !p.established && slices.Contains(states, "NEW"))
		}
	case "--dst-type", "--src-type":
		return func(p *firewallPacket) truth {
			for one := range strings.SplitSeq(value, ",") {
				if typeOf(p, option == "--src-type", one) == yes {
					return yes
				}
			}
			return no
		}
	case "-f": // second and further fragments
		return func(*firewallPacket) truth { return no }
	case "--dport", "--sport", "--dports", "--sports", "--ports":
		return func(p *firewallPacket) truth {
			if p.protocol != ipv4.ProtocolUDP {
				return no
			}
			for one := range strings.SplitSeq(value, ",") {
				low, high, ranged := strings.Cut(one, ":")
				first, err1 := strconv.Atoi(low)
				last := first
				var err2 error
				if ranged {
					last, err2 = strconv.Atoi(high)
				}
				if err1 == nil && err2 == nil && first <= p.port && p.port <= last {
					return yes
				}
			}
			return no
		}
	}
	return func(*firewallPacket) truth { return maybe }
}

// anyAddress compares with addresses and prefixes, separated by commas.
func anyAddress(a netip.Addr, list string) (t truth) {
	for one := range strings.SplitSeq(list, ",") {
		switch addressIn(a, one) {
		case yes:
			return yes
		case maybe:
			t = maybe
		}
	}
	return t
}
