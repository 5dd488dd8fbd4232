package netstate

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ipipd/test/netlab"
)

func TestPolicy(t *testing.T) {
	policy := func(selector string, more ...string) string {
		return "ip xfrm policy add " + selector + " " + strings.Join(more, " ")
	}
	const esp = "tmpl src 192.0.2.1 dst 198.51.100.1 proto esp mode transport"
	for _, c := range []struct {
		name     string
		commands []string
		want     string // a part of the reason; "" is none
	}{
		{"nothing", nil, ""},

		{"nft: a table without a chain", []string{"nft add table ip t"}, ""},
		{"nft: a chain on no hook", []string{"nft add table ip t", "nft add chain ip t c", "nft add rule ip t c drop"}, ""},
		{"nft: Debian's empty chains", []string{
			"nft add table inet filter",
			"nft add chain inet filter input { type filter hook input priority 0 ; }",
			"nft add chain inet filter forward { type filter hook forward priority 0 ; }",
			"nft add chain inet filter output { type filter hook output priority 0 ; policy accept ; }",
		}, ""},
		{"nft: output", []string{
			"nft add table ip t", "nft add chain ip t c { type filter hook output priority 0 ; }", "nft add rule ip t c counter",
		}, "nftables has rules in chain c of table t"},
		{"nft: inet output", []string{
			"nft add table inet t", "nft add chain inet t out { type filter hook output priority 0 ; }", "nft add rule inet t out counter",
		}, "nftables has rules in chain out of table t"},
		{"nft: postrouting", []string{
			"nft add table ip t", "nft add chain ip t c { type nat hook postrouting priority 100 ; }", "nft add rule ip t c masquerade",
		}, "nftables"},
		{"nft: prerouting", []string{
			"nft add table ip t", "nft add chain ip t c { type filter hook prerouting priority 0 ; }", "nft add rule ip t c counter",
		}, "nftables"},
		{"nft: input", []string{
			"nft add table ip t", "nft add chain ip t c { type filter hook input priority 0 ; }", "nft add rule ip t c ip protocol 4 drop",
		}, "nftables"},
		{"nft: an empty chain that drops", []string{
			"nft add table inet t", "nft add chain inet t c { type filter hook input priority 0 ; policy drop ; }",
		}, "nftables"},
		{"nft: forwarded packets are not ours", []string{
			"nft add table ip t", "nft add chain ip t c { type filter hook forward priority 0 ; policy drop ; }", "nft add rule ip t c drop",
		}, ""},
		{"nft: IPv6", []string{
			"nft add table ip6 t", "nft add chain ip6 t c { type filter hook output priority 0 ; }", "nft add rule ip6 t c drop",
		}, ""},
		{"nft: ingress of the device", []string{
			"nft add table netdev t", "nft add chain netdev t c { type filter hook ingress device eth0 priority 0 ; }", "nft add rule netdev t c counter",
		}, "nftables"},
		{"nft: ingress of another device", []string{
			"nft add table netdev t", "nft add chain netdev t c { type filter hook ingress device lo priority 0 ; }", "nft add rule netdev t c counter",
		}, ""},
		{"nft: ingress of several devices", []string{
			"nft add table netdev t", "nft add chain netdev t c { type filter hook ingress devices = { lo, eth0 } priority 0 ; }", "nft add rule netdev t c counter",
		}, "nftables"},
		{"nft: egress of the device", []string{
			"nft add table netdev t", "nft add chain netdev t c { type filter hook egress device eth0 priority 0 ; }", "nft add rule netdev t c counter",
		}, "nftables"},
		{"iptables over nftables", []string{"iptables-nft -A OUTPUT -p 4 -j ACCEPT"}, "nftables has rules in chain OUTPUT of table filter"},
		{"legacy iptables", []string{"iptables-legacy -A OUTPUT -p 4 -j DROP"}, "legacy iptables has tables here: filter"},

		{"IPsec out", []string{policy("src 192.0.2.1 dst 198.51.100.1 proto 4 dir out", esp)}, "an IPsec policy applies: 192.0.2.1/32 → 198.51.100.1/32, dir out"},
		{"IPsec in", []string{policy("src 198.51.100.1 dst 192.0.2.1 dir in", "tmpl src 198.51.100.1 dst 192.0.2.1 proto esp mode transport")}, "an IPsec policy applies"},
		{"IPsec for nets", []string{policy("src 192.0.2.0/24 dst 0.0.0.0/0 dir out", esp)}, "an IPsec policy applies"},
		{"IPsec that blocks", []string{policy("src 0.0.0.0/0 dst 198.51.100.1 dir out action block")}, "an IPsec policy applies"},
		{"IPsec on the device", []string{policy("src 0.0.0.0/0 dst 0.0.0.0/0 dev eth0 dir out action block")}, "an IPsec policy applies"},
		{"IPsec on another device", []string{policy("src 0.0.0.0/0 dst 0.0.0.0/0 dev lo dir out action block")}, ""},
		{"IPsec for forwarded packets", []string{policy("src 0.0.0.0/0 dst 0.0.0.0/0 dir fwd action block")}, ""},
		{"IPsec for another peer", []string{policy("src 192.0.2.1 dst 198.51.100.9 dir out", esp)}, ""},
		{"IPsec for another protocol", []string{policy("src 192.0.2.1 dst 198.51.100.1 proto udp dir out", esp)}, ""},
		{"IPsec for IPv6", []string{policy("src ::/0 dst ::/0 dir out action block")}, ""},
		{"IPsec by default", []string{"ip xfrm policy setdefault out block"}, "the default IPsec policy blocks"},

		{"tc: nothing filtered", []string{"tc qdisc add dev eth0 clsact"}, ""},
		{"tc: egress", []string{"tc qdisc add dev eth0 clsact", "tc filter add dev eth0 egress protocol ip u32 match u32 0 0"}, "tc has filters"},
		{"tc: ingress", []string{"tc qdisc add dev eth0 clsact", "tc filter add dev eth0 ingress protocol ip u32 match u32 0 0"}, ""},
		{"tc: an ingress qdisc", []string{"tc qdisc add dev eth0 ingress", "tc filter add dev eth0 parent ffff: protocol ip u32 match u32 0 0"}, ""},
		{"tc: another device", []string{"tc qdisc add dev lo clsact", "tc filter add dev lo egress protocol ip u32 match u32 0 0"}, ""},

		{"rule: of protocol 4", []string{"ip rule add ipproto 4 table 100"}, "a routing rule selects by the protocol"},
		{"rule: of another protocol", []string{"ip rule add ipproto udp table 100"}, ""},
		{"rule: not of protocol 4", []string{"ip rule add not ipproto 4 table 100"}, ""},
		{"rule: not of another protocol", []string{"ip rule add not ipproto udp table 100"}, "a routing rule selects by the protocol"},
		{"rule: of a TOS", []string{"ip rule add tos 0x10 table 100"}, "a routing rule selects by TOS"},
		{"rule: of a user", []string{"ip rule add uidrange 0-0 table 100"}, "a routing rule selects by the user"},
		{"rule: of a source and a mark", []string{"ip rule add from 192.0.2.0/24 fwmark 7 table 100"}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			ns, other := netlab.New(t), netlab.New(t)
			netlab.Veth(t, ns, other, netlab.End{Name: "eth0", Address: "192.0.2.1/24"}, netlab.End{Name: "eth0"})
			for _, command := range c.commands {
				words := strings.Fields(command)
				if words[0] == "nft" { // nft parses one argument
					words = []string{"nft", strings.TrimPrefix(command, "nft ")}
				}
				if out, err := ns.Try(words[0], words[1:]...); err != nil {
					t.Skipf("this system cannot %s: %s", command, strings.TrimSpace(out))
				}
			}
			got := ask(t, ns, Query{Remote: far, Local: here, UnderlayDevice: "eth0"}).Bypass
			if c.want == "" && got != "" || !strings.Contains(got, c.want) || strings.Contains(got, "\n") {
				t.Errorf("%q, want %q", got, c.want)
			}
		})
	}
}

func TestHost_ingressFilters(t *testing.T) {
	const all = " protocol ip u32 match u32 0 0"
	for _, c := range []struct {
		name     string
		commands string
		want     bool
	}{
		{"nothing", "true", false},
		{"clsact without a filter", "tc qdisc add dev eth0 clsact", false},
		{"clsact with one on egress", "tc qdisc add dev eth0 clsact; tc filter add dev eth0 egress" + all, false},
		{"clsact with one on ingress", "tc qdisc add dev eth0 clsact; tc filter add dev eth0 ingress" + all, true},
		{"an ingress qdisc", "tc qdisc add dev eth0 ingress; tc filter add dev eth0 parent ffff:" + all, true},
		{"another device", "tc qdisc add dev lo clsact; tc filter add dev lo ingress" + all, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			ns, other := netlab.New(t), netlab.New(t)
			netlab.Veth(t, ns, other, netlab.End{Name: "eth0", Address: "192.0.2.1/24"}, netlab.End{Name: "eth0"})
			if out, err := ns.Try("sh", "-ec", c.commands); err != nil {
				t.Skipf("this system cannot %s: %s", c.commands, strings.TrimSpace(out))
			}
			got := ask(t, ns, Query{Remote: router, UnderlayDevice: "eth0"}).Ingress
			if strings.Contains(got, "tc has filters on the ingress") != c.want || !c.want && got != "" {
				t.Errorf("%q", got)
			}
		})
	}
}

func TestParseChain(t *testing.T) {
	for _, c := range []struct {
		name    string
		message []byte
		want    chain
		on      map[string]bool
	}{
		{"an ingress chain with a prefix", []byte{
			0x05, 0x00, 0x00, 0x01, // nfgenmsg: NFPROTO_NETDEV, version 0, generation
			0x06, 0x00, 0x01, 0x00, 't', 0x00, 0x00, 0x00, // NFTA_CHAIN_TABLE "t"
			0x06, 0x00, 0x03, 0x00, 'c', 0x00, 0x00, 0x00, // NFTA_CHAIN_NAME "c"
			0x28, 0x00, 0x04, 0x80, // NFTA_CHAIN_HOOK, nested, 36 bytes
			0x08, 0x00, 0x01, 0x00, 0x00, 0x00, 0x00, 0x01, // NFTA_HOOK_HOOKNUM egress
			0x08, 0x00, 0x02, 0x00, 0xff, 0xff, 0xff, 0xf6, // NFTA_HOOK_PRIORITY -10
			0x14, 0x00, 0x04, 0x80, // NFTA_HOOK_DEVS, nested, 16 bytes
			0x07, 0x00, 0x01, 0x00, 'l', 'o', 0x00, 0x00, // NFTA_DEVICE_NAME "lo"
			0x07, 0x00, 0x02, 0x00, 'e', 't', 'h', 0x00, // NFTA_DEVICE_PREFIX "eth"
			0x08, 0x00, 0x05, 0x00, 0x00, 0x00, 0x00, 0x00, // NFTA_CHAIN_POLICY drop
			0x08, 0x00, 0x06, 0x00, 0x00, 0x00, 0x00, 0x02, // NFTA_CHAIN_USE 2
		}, chain{family: 5, table: "t", name: "c", base: true, hook: 1, devices: []string{"lo", "eth*"}, rules: 2},
			map[string]bool{"lo": true, "eth0": true, "eth12": true, "lo1": false, "wlan0": false}},
		{"a chain that others jump to", []byte{
			0x02, 0x00, 0x00, 0x01,
			0x06, 0x00, 0x01, 0x00, 't', 0x00, 0x00, 0x00,
			0x06, 0x00, 0x03, 0x00, 'c', 0x00, 0x00, 0x00,
			0x08, 0x00, 0x06, 0x00, 0x00, 0x00, 0x00, 0x02,
		}, chain{family: 2, table: "t", name: "c", rules: 2, policy: policyAccept}, nil},
	} {
		got, err := parseChain(c.message)
		if diff := cmp.Diff(c.want, got, cmp.AllowUnexported(chain{})); err != nil || diff != "" {
			t.Errorf("%s: %v (-want +got):\n%s", c.name, err, diff)
		}
		for ifname, want := range c.on {
			if got.isOn(ifname) != want {
				t.Errorf("%s: on %s: %v", c.name, ifname, !want)
			}
		}
	}
}

// FuzzParseChain_andOthers: no message of another kernel version makes a parser panic.
func FuzzParseChain_andOthers(f *testing.F) {
	f.Add([]byte{0x05, 0x00, 0x00, 0x01, 0x06, 0x00, 0x01, 0x00, 't', 0x00, 0x00, 0x00})
	f.Add([]byte{2, 32, 0, 0, 254, 3, 0, 1, 0, 0, 0, 0, 8, 0, 1, 0, 198, 51, 100, 1, 8, 0, 4, 0, 2, 0, 0, 0})
	f.Add([]byte{2, 32, 0, 0, 254, 3, 0, 1, 0, 0, 0, 0, 20, 0, 9, 0, 16, 0, 0, 0, 2, 0, 0, 0, 8, 0, 5, 0, 198, 51, 100, 1}) // RTA_MULTIPATH
	f.Fuzz(func(t *testing.T, b []byte) {
		parseChain(b)
		parseRoute(b)
		parseNeighbour(b)
		ruleSelector(b)
		parseQdisc(b)
		parseTaps(b)
		parseLink(b)
		parseXfrmPolicy(b)
		parseNexthop(b)
		new(Host).parseFollowed(b, 2, 0)
		eachMessage(b, func(message) {})
	})
}

func BenchmarkPolicy(b *testing.B) {
	ns, other := netlab.New(b), netlab.New(b)
	netlab.Veth(b, ns, other, netlab.End{Name: "eth0", Address: "192.0.2.1/24"}, netlab.End{Name: "eth0"})
	h := openHost(b, ns)
	b.ReportAllocs()
	for b.Loop() {
		if p := h.readPolicy(policy{}, allParts); p.bypassBlocker(2, "eth0", here, far) != "" {
			b.Fatal(p)
		}
	}
}

// With AnyLocal an inbound IPsec policy for the remote applies, whatever its destination address.
func TestHostReceived(t *testing.T) {
	ns := netlab.New(t)
	ns.Run("sh", "-ec", "ip link add u0 type veth peer name u1; ip address add 192.0.2.1/24 dev u0; ip link set u0 up; ip link set u1 up")
	try(t, ns, "ip xfrm policy add src 192.0.2.9 dst 203.0.113.5 proto 4 dir in action block")
	h := openHost(t, ns)
	q := Query{Remote: [4]byte{192, 0, 2, 9}}
	if a := follow(t, h, ns, q).Answer(); a.Ingress != "" || a.Bypass != "" {
		t.Errorf("at one address: %q, %q", a.Ingress, a.Bypass)
	}
	q.AnyLocal = true
	if a := follow(t, h, ns, q).Answer(); !strings.HasPrefix(a.Ingress, "an IPsec policy applies: 192.0.2.9/32 → 203.0.113.5/32") || a.Bypass != "" {
		t.Errorf("at any: %q, %q", a.Ingress, a.Bypass)
	}
	q.Remote[3] = 8
	if a := follow(t, h, ns, q).Answer(); a.Ingress != "" {
		t.Errorf("from another one: %q", a.Ingress)
	}
}

// Options.Bypass is the reason wherever there is a route.
func TestHost_bypass(t *testing.T) {
	ns := netlab.New(t)
	ns.Run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
	ns.Run("ip", "address", "add", "192.0.2.1/24", "dev", "eth0")
	for _, link := range []string{"eth0", "eth1"} {
		ns.Run("ip", "link", "set", link, "up")
	}
	var h *Host
	var err error
	ns.Do(func() { h, err = Open(Options{Bypass: "not wanted"}) })
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	if a := follow(t, h, ns, Query{Remote: [4]byte{192, 0, 2, 2}}).Answer(); a.Err != nil || a.Bypass != "not wanted" {
		t.Errorf("%v, %q", a.Err, a.Bypass)
	}
}
