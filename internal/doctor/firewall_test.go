package doctor

import (
	"net/netip"
	"strings"
	"testing"
)

// outer returns a packet received from the peer that begins a connection (ct state new).
func outer(protocol int) *firewallPacket {
	return &firewallPacket{in: true, device: "eth0", src: netip.MustParseAddr("198.51.100.1"), dst: netip.MustParseAddr("192.0.2.1"), protocol: protocol, port: 500}
}

// What the rules of widespread firewalls do with a packet of protocol 4 that begins a connection, and one that does not.
func TestRuleset_passage(t *testing.T) {
	const ufw = `*filter
:INPUT DROP [0:0]
:ufw-before-input - [0:0]
:ufw-not-local - [0:0]
:ufw-logging-deny - [0:0]
-A INPUT -j ufw-before-input
-A ufw-before-input -i lo -j ACCEPT
-A ufw-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-input -m conntrack --ctstate INVALID -j ufw-logging-deny
-A ufw-before-input -m conntrack --ctstate INVALID -j DROP
-A ufw-before-input -p icmp -m icmp --icmp-type 8 -j ACCEPT
-A ufw-before-input -j ufw-not-local
-A ufw-not-local -m addrtype --dst-type LOCAL -j RETURN
-A ufw-not-local -m addrtype --dst-type MULTICAST -j RETURN
-A ufw-not-local -m limit --limit 3/min --limit-burst 10 -j ufw-logging-deny
-A ufw-not-local -j DROP
-A ufw-logging-deny -m limit --limit 3/min --limit-burst 10 -j LOG --log-prefix "[UFW BLOCK] "
COMMIT
`
	const docker = `*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:DOCKER - [0:0]
-A FORWARD -o docker0 -j DOCKER
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A DOCKER -i docker0 -j RETURN
COMMIT
`
	iptables := func(text string) *ruleset { return &ruleset{parseIPTables("iptables", text)} }
	const drops = "*filter\n:INPUT DROP [0:0]\n:x - [0:0]\n"
	for _, x := range []struct {
		name               string
		rules              *ruleset
		new, old           bool // whether it certainly drops the packet of a new and of an established connection
		unsureNew, dropped string
	}{
		{"ufw", iptables(ufw), true, false, "", "INPUT"},
		{"docker", iptables(docker), false, false, "", ""},
		{"a goto ends the chain", iptables(drops + "-A INPUT -g x\n-A INPUT -j ACCEPT\nCOMMIT\n"), true, true, "", "INPUT"},
		{"a jump comes back", iptables(drops + "-A INPUT -j x\n-A INPUT -j ACCEPT\n-A x -p tcp -j DROP\nCOMMIT\n"), false, false, "", ""},
		{"return", iptables(drops + "-A INPUT -j x\n-A INPUT -j ACCEPT\n-A x -j RETURN\n-A x -j DROP\nCOMMIT\n"), false, false, "", ""},
		{"jumps in a circle", iptables(drops + "-A INPUT -j x\n-A x -j x\nCOMMIT\n"), true, true, "", "INPUT"},
		{"a set that is not known", iptables(drops + "-A INPUT -m set --match-set peers src -j ACCEPT\nCOMMIT\n"), false, false, "INPUT", ""},
		{"not", iptables(drops + "-A INPUT ! -s 10.0.0.0/8 ! -i wlan+ -p 4 -j ACCEPT\nCOMMIT\n"), false, false, "", ""},
		{"fragments", iptables("*raw\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -f -j DROP\nCOMMIT\n"), false, false, "", ""},
		{"ports", iptables("*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -p udp -m multiport --dports 53,500 -j DROP\nCOMMIT\n"), false, false, "", ""},
		{"cut off", iptables("*filter\n:INPUT\n-A\n-A INPUT\n-A nowhere -j DROP\n-A INPUT -p\n"), false, false, "", ""},
		{"firewalld", nftables(t, firewalld), true, false, "", "filter_INPUT"},
		{"flags of TCP", nftables(t, chainOf(`{"match":{"op":"==","left":{"&":[{"payload":{"protocol":"tcp","field":"flags"}},["fin","syn"]]},"right":"syn"}},{"drop":null}`)), false, false, "", ""},
		{"an option of TCP", nftables(t, chainOf(`{"match":{"op":"==","left":{"tcp option":{"name":"maxseg","field":"size"}},"right":500}},{"drop":null}`)), false, false, "", ""},
		{"ports in a set of addresses", nftables(t, chainOf(`{"match":{"op":"==","left":{"concat":[{"payload":{"protocol":"ip","field":"saddr"}},{"payload":{"protocol":"tcp","field":"dport"}}]},"right":"@x"}},{"drop":null}`)), false, false, "", ""},
		{"a mark", nftables(t, chainOf(`{"match":{"op":"==","left":{"meta":{"key":"mark"}},"right":7}},{"drop":null}`)), false, false, "input", ""},
		{"strange", nftables(t, chainOf(`{"match":7},{"vmap":null},{"jump":3},{"vmap":{"key":4,"data":{"set":[[1],[2,{"drop":null}]]}}}`)), false, false, "input", ""},
		{"another device", nftables(t, `{"chain":{"family":"netdev","table":"t","name":"i","hook":"ingress","dev":["eth1"],"policy":"drop"}}`), false, false, "", ""},
		{"this device", nftables(t, `{"chain":{"family":"netdev","table":"t","name":"i","hook":"ingress","dev":"eth0","policy":"drop"}}`), true, true, "", "i"},
		{"which device is not known", nftables(t, `{"chain":{"family":"netdev","table":"t","name":"i","hook":"ingress","policy":"drop"}}`), false, false, "i", ""},
		{"which device of inet is not known", nftables(t, `{"chain":{"family":"inet","table":"t","name":"i","hook":"ingress","policy":"drop"}}`), false, false, "i", ""},
	} {
		p := outer(4)
		base, _, unsure := x.rules.passage(p)
		if (base != nil) != x.new || base != nil && base.name != x.dropped {
			t.Errorf("%s: a new one: %+v", x.name, base)
		}
		if name := ""; unsure != nil && x.unsureNew != unsure.name || unsure == nil && x.unsureNew != name {
			t.Errorf("%s: unsure of %+v, want %q", x.name, unsure, x.unsureNew)
		}
		if unsure != nil && strings.Contains(unsure.unclear(), "nft list chain ") != (unsure.hook == "ingress") {
			t.Errorf("%s: %s", x.name, unsure.unclear())
		}
		p.established = true
		if base, _, _ := x.rules.passage(p); (base != nil) != x.old {
			t.Errorf("%s: an answer: %+v", x.name, base)
		}
	}
}

// The remedy is a command or rule for the firewall that drops.
func TestAllow(t *testing.T) {
	ufw := parseIPTables("iptables", "*filter\n:INPUT DROP [0:0]\n:ufw-x - [0:0]\n-A INPUT -j ufw-x\nCOMMIT\n")
	plain := parseIPTables("iptables-legacy", "*mangle\n:INPUT DROP [0:0]\nCOMMIT\n")
	zones := nftables(t, firewalld).chains
	nft := nftables(t, chainOf(`{"drop":null}`)).chains
	peer := netip.MustParseAddr("198.51.100.1")
	for _, x := range []struct{ got, want string }{
		{allow(ufw[0], ufw[0], peer, true, "4"), "add to /etc/ufw/before.rules, ahead of COMMIT: -A ufw-before-input -s 198.51.100.1 -p 4 -j ACCEPT; then: ufw reload"},
		{allow(plain[0], plain[0], peer, false, "4"), "iptables-legacy -t mangle -I INPUT -d 198.51.100.1 -p 4 -j ACCEPT"},
		{allow(zones[0], zones[0], peer, true, "udp --dport 500"), "firewall-cmd --permanent --add-rich-rule='rule family=ipv4 source address=198.51.100.1 port port=500 protocol=udp accept' && firewall-cmd --reload"},
		{allow(zones[0], zones[0], peer, true, "4"), "firewall-cmd --permanent --add-rich-rule='rule family=ipv4 source address=198.51.100.1 protocol value=4 accept' && firewall-cmd --reload"},
		{allow(nft[0], nft[0], peer, true, "udp --dport 500"), "nft insert rule inet filter input ip saddr 198.51.100.1 udp dport 500 accept"},
	} {
		if x.got != x.want {
			t.Errorf("%s\nwant %s", x.got, x.want)
		}
	}
}

// No output of nft or iptables-save makes the parsers panic.
func FuzzParseNFT(f *testing.F) {
	f.Add(firewalld, "*filter\n:INPUT DROP [0:0]\n-A INPUT ! -s 1.2.3.4 -m comment --comment \"a \\\" b\" -j x\n")
	f.Fuzz(func(t *testing.T, nft, iptables string) {
		rules := &ruleset{parseIPTables("iptables", iptables)}
		if parsed, _, err := parseNFT([]byte(nft)); err == nil {
			rules.chains = append(rules.chains, parsed.chains...)
		}
		for _, established := range []bool{false, true} {
			p := outer(4)
			p.established = established
			rules.passage(p)
		}
	})
}

func nftables(t *testing.T, objects string) *ruleset {
	t.Helper()
	r, _, err := parseNFT([]byte(`{"nftables":[` + objects + `]}`))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// chainOf returns nft's JSON for an input chain with one rule.
func chainOf(statements string) string {
	return `{"chain":{"family":"inet","table":"filter","name":"input","hook":"input","policy":"accept"}},` +
		`{"rule":{"family":"inet","table":"filter","chain":"input","handle":2,"expr":[` + statements + `]}}`
}

// firewalld is nft's JSON for the rules of firewalld, shortened.
const firewalld = `{"chain":{"family":"inet","table":"firewalld","name":"filter_INPUT","type":"filter","hook":"input","prio":10,"policy":"accept"}},
{"chain":{"family":"inet","table":"firewalld","name":"filter_INPUT_ZONES"}},
{"chain":{"family":"inet","table":"firewalld","name":"filter_IN_public"}},
{"rule":{"family":"inet","table":"firewalld","chain":"filter_INPUT","handle":1,"expr":[{"match":{"op":"in","left":{"ct":{"key":"state"}},"right":{"set":["established","related"]}}},{"accept":null}]}},
{"rule":{"family":"inet","table":"firewalld","chain":"filter_INPUT","handle":2,"expr":[{"match":{"op":"in","left":{"ct":{"key":"status"}},"right":"dnat"}},{"accept":null}]}},
{"rule":{"family":"inet","table":"firewalld","chain":"filter_INPUT","handle":3,"expr":[{"match":{"op":"==","left":{"meta":{"key":"iifname"}},"right":"lo"}},{"accept":null}]}},
{"rule":{"family":"inet","table":"firewalld","chain":"filter_INPUT","handle":4,"expr":[{"match":{"op":"in","left":{"ct":{"key":"state"}},"right":"invalid"}},{"drop":null}]}},
{"rule":{"family":"inet","table":"firewalld","chain":"filter_INPUT","handle":5,"expr":[{"match":{"op":"==","left":{"fib":{"result":"type","flags":["daddr"]}},"right":"broadcast"}},{"accept":null}]}},
{"rule":{"family":"inet","table":"firewalld","chain":"filter_INPUT","handle":6,"expr":[{"jump":{"target":"filter_INPUT_ZONES"}}]}},
{"rule":{"family":"inet","table":"firewalld","chain":"filter_INPUT","handle":7,"expr":[{"reject":{"type":"icmpx","expr":"admin-prohibited"}}]}},
{"rule":{"family":"inet","table":"firewalld","chain":"filter_INPUT_ZONES","handle":8,"expr":[{"match":{"op":"==","left":{"meta":{"key":"iifname"}},"right":"eth0"}},{"goto":{"target":"filter_IN_public"}}]}},
{"rule":{"family":"inet","table":"firewalld","chain":"filter_INPUT_ZONES","handle":9,"expr":[{"accept":null}]}},
{"rule":{"family":"inet","table":"firewalld","chain":"filter_IN_public","handle":10,"expr":[{"match":{"op":"==","left":{"payload":{"protocol":"tcp","field":"dport"}},"right":22}},{"accept":null}]}},
{"rule":{"family":"inet","table":"firewalld","chain":"filter_IN_public","handle":11,"expr":[{"match":{"op":"==","left":{"meta":{"key":"l4proto"}},"right":{"set":["icmp","ipv6-icmp"]}}},{"accept":null}]}}`
