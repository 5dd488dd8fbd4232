package config

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ipipd/internal/tunnel"
)

// Each export in testdata has beside it, as JSON, the tunnels or the error that is read of it.
func TestParseRouterOS_exports(t *testing.T) {
	// Exports with a tunnel that is refused, since its secret may have been left out, by its line.
	refused := map[string]int{"fast-path-off": 8}
	files, err := filepath.Glob("testdata/routeros/*.rsc")
	if err != nil || len(files) == 0 {
		t.Fatalf("no exports: %v", err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".rsc")
		t.Run(name, func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			text, err := os.ReadFile(strings.TrimSuffix(file, "rsc") + "json")
			if err != nil {
				t.Fatal(err)
			}
			got, errs := parseRouterOS(file, data)
			var fault struct {
				Error string
				Line  int
			}
			if json.Unmarshal(text, &fault) == nil {
				if len(errs) != 1 || errs[0].Message != fault.Error || errs[0].Pos.Line != fault.Line {
					t.Errorf("errors %v, want %+v", errs, fault)
				}
				return
			}
			if errs != nil {
				t.Errorf("errors %v", errs)
			}
			got.configs()
			if line := refused[name]; line != 0 && (len(got.Refused) != 1 || got.Refused[0].Pos.Line != line) || line == 0 && got.Refused != nil {
				t.Errorf("refused %v, want one of line %d", got.Refused, line)
			}
			var want []any
			if err := json.Unmarshal(text, &want); err != nil {
				t.Fatal(err)
			}
			var have []any
			for _, tunnel := range got.Tunnels {
				have = append(have, printed(t, tunnel))
			}
			if diff := cmp.Diff(want, have); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
}

// printed returns a tunnel's settings as print --json has them: in the notation of its property's Get.
func printed(t *testing.T, settings Tunnel) map[string]any {
	t.Helper()
	properties := map[string]tunnel.Property{}
	for _, p := range tunnel.Properties() {
		properties[p.Name] = p
	}
	out := map[string]any{}
	for _, s := range settings.Settings {
		p, ok := properties[s.Property]
		if !ok {
			t.Fatalf("no property %q", s.Property)
		}
		value := s.Value
		config := tunnel.Default()
		if err := p.Set(&config, value); err != nil {
			t.Fatal(err)
		}
		if !p.Secret {
			value = p.Get(&config)
		}
		if !p.Repeatable {
			out[s.Property] = value
			continue
		}
		list, _ := out[s.Property].([]any)
		out[s.Property] = append(list, value)
	}
	return out
}

// readable returns a file's tunnels: a line for each setting, and -- between two tunnels.
func readable(f *File) string {
	var tunnels []string
	for _, t := range f.Tunnels {
		var lines []string
		for _, s := range t.Settings {
			lines = append(lines, fmt.Sprintf("%d:%d %s=%s", s.Pos.Line, s.Pos.Column, s.Property, s.Value))
		}
		tunnels = append(tunnels, strings.Join(lines, "\n"))
	}
	return strings.Join(tunnels, "\n--\n")
}

const two = "/interface ipip\nadd name=a remote-address=192.0.2.1\nadd name=b remote-address=192.0.2.2\n"

const twoRead = "2:5 name=a\n2:12 remote-address=192.0.2.1\n--\n3:5 name=b\n3:12 remote-address=192.0.2.2"

func TestParseRouterOS_tunnel(t *testing.T) {
	for _, tt := range []struct{ name, in, want string }{
		{"every property", "/interface ipip add allow-fast-path=yes clamp-tcp-mss=no comment=c disabled=yes dont-fragment=inherit " +
			"dscp=46 keepalive=00:00:10,5 local-address=192.0.2.9 mtu=auto name=long-name-of-a-tunnel remote-address=vpn.example.net",
			"1:21 allow-fast-path=yes\n1:41 clamp-tcp-mss=no\n1:58 comment=c\n1:68 disabled=yes\n1:81 dont-fragment=inherit\n" +
				"1:103 dscp=46\n1:111 keepalive=00:00:10,5\n1:132 local-address=192.0.2.9\n1:156 mtu=auto\n" +
				"1:165 name=long-name-of-a-tunnel\n1:192 remote-address=vpn.example.net"},
		{"unset", "/interface ipip add !keepalive !dscp name=a", "1:21 keepalive=off\n1:38 name=a"},
		{"keepalive of the newest manual", "/interface ipip add keepalive=no", "1:21 keepalive=off"},
		{"no local address", "/interface ipip add local-address=0.0.0.0 name=a", "1:43 name=a"},
		{"set", two + "set a mtu=1400 name=c\nset b !remote-address\nset c mtu=1300", "2:12 remote-address=192.0.2.1\n4:16 name=c\n6:7 mtu=1300\n--\n3:5 name=b"},
		{"set numbers", two + "set numbers=b mtu=1400", twoRead + "\n4:15 mtu=1400"},
		{"set another", two + "set 0 mtu=1400\nset [ find name=a ] mtu=1400\nset mtu=1400\nset", twoRead},
		{"set before add", "/interface ipip set a mtu=1400\n" + two, strings.NewReplacer("2:", "3:", "3:", "4:").Replace(twoRead)},
		{"disable, enable", two + "disable a\ndisable b\nenable b", "2:5 name=a\n2:12 remote-address=192.0.2.1\n4:1 disabled=yes\n--\n" +
			"3:5 name=b\n3:12 remote-address=192.0.2.2\n6:1 disabled=no"},
		{"remove", two + "remove b", "2:5 name=a\n2:12 remote-address=192.0.2.1"},
		{"secret", "/interface ipip add name=a allow-fast-path=no ipsec-secret=\"\\E9 \\$x\"", "1:21 name=a\n1:28 allow-fast-path=no\n1:47 ipsec-secret=\xe9 $x"},
		{"said to be plain", "/interface ipip add allow-fast-path=no !ipsec-secret", "1:21 allow-fast-path=no"},
		{"said to be plain later", two + "set a allow-fast-path=no\nset a ipsec-secret=\"\"", "2:5 name=a\n2:12 remote-address=192.0.2.1\n4:7 allow-fast-path=no\n--\n3:5 name=b\n3:12 remote-address=192.0.2.2"},
		{"comment of two lines", `/interface ipip add comment="one\r\ntwo"`, "1:21 comment=one two"},
		{"comment in UTF-8", `/interface ipip add comment="Liga\C3\A7\C3\A3o"`, "1:21 comment=Ligação"},
		{"comment in UTF-8, raw", "/interface ipip add comment=Ligação mtu=1400", "1:21 comment=Ligação\n1:37 mtu=1400"},
		{"comment in another character set", "/interface ipip add comment=\"Liga\xe7\xe3o\" mtu=1400", "1:39 mtu=1400"},
		{"other menus", "/interface ipipv6\nadd name=a\n/interface gre\nadd name=b\n/ipv6 address add address=2001:db8::1", ""},
		{"commands that show", two + "print\nexport", twoRead},
		{"script", ":if ([:len [/interface find]] > 0) do={\n/interface ipip add name=a\n# }\n}\n/system script add source={\n/interface ipip add name=b }", ""},
		{"nothing", "", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f, errs := parseRouterOS("x.rsc", []byte(tt.in))
			if diff := cmp.Diff(tt.want, readable(f)); diff != "" || errs != nil {
				t.Errorf("errors %v, (-want +got)\n%s", errs, diff)
			}
		})
	}
}

// What an address or a route adds to the first of two tunnels, and to the second.
func TestParseRouterOS_addresses(t *testing.T) {
	const (
		peer = "/ip address add address=10.255.0.1 interface=a network=10.255.0.2\n"
		net  = "/ip address add address=10.255.1.1/24 interface=b\n"
		lan  = "/ip address add address=10.255.1.129/25 interface=ether1\n"
	)
	const peerRead, netRead = "address=10.255.0.1 peer 10.255.0.2", "address=10.255.1.1/24"
	for _, tt := range []struct{ name, in, a, b string }{
		{"peer", peer, peerRead, ""},
		{"network of a subnet", "/ip address add address=10.255.1.1/24 interface=b network=10.255.1.0", "", netRead},
		{"network of another subnet", "/ip address add address=10.255.1.1/24 interface=b network=10.9.0.0", "", netRead},
		{"one address", "/ip address add address=10.255.0.1 interface=a network=10.255.0.1", "address=10.255.0.1/32", ""},
		{"without network", "/ip address add address=10.255.0.1/32 interface=a", "address=10.255.0.1/32", ""},
		{"network in IPv6", "/ip address add address=10.255.0.1 interface=a network=::1", "address=10.255.0.1/32", ""},
		{"gateway in a subnet of two interfaces", net + "/ip address add address=10.255.1.9/24 interface=ether1\n/ip route add gateway=10.255.1.2", "", netRead + "\nroute=0.0.0.0/0"},
		{"two addresses", net + "/ip address add address=10.255.2.1/24 interface=b comment=x", "", netRead + "\naddress=10.255.2.1/24"},
		{"disabled", "/ip address add disabled=yes address=10.255.1.1/24 interface=b\n/ip route add gateway=10.255.1.2", "", ""},
		{"not disabled", "/ip address add disabled=no address=10.255.1.1/24 interface=b", "", netRead},
		{"other interface", "/ip address add address=nonsense interface=ether1\n" + lan, "", ""},
		{"interface that only the router knows", "/ip address add address=10.255.1.1/24 interface=$x", "", ""},
		{"default route by the interface", "/ip route add gateway=a", "route=0.0.0.0/0", ""},
		{"route by the peer", peer + net + "/ip route add dst-address=10.20.0.0/16 gateway=10.255.0.2", peerRead + "\nroute=10.20.0.0/16", netRead},
		{"route by the subnet", peer + net + "/ip route add dst-address=10.20.0.0/16 gateway=10.255.1.2", peerRead, netRead + "\nroute=10.20.0.0/16"},
		{"routes before addresses", "/ip route add dst-address=10.20.0.0/16 gateway=10.255.1.2\n" + net, "", netRead + "\nroute=10.20.0.0/16"},
		{"gateway in the smaller subnet of another interface", net + lan + "/ip route add gateway=10.255.1.130", "", netRead},
		{"gateway in the larger subnet of another interface", net + "/ip address add address=10.255.9.9/16 interface=ether1\n" +
			"/ip route add gateway=10.255.1.130", "", netRead + "\nroute=0.0.0.0/0"},
		{"other gateway", net + "/ip route add gateway=192.0.2.254\n/ip route add gateway=ether1\n/ip route add dst-address=10.0.0.0/8", "", netRead},
		{"gateway that only the router knows", "/ip route add gateway=$a", "", ""},
		{"gateway with an interface", "/ip route add gateway=10.9.9.9%a,10.255.1.2@main", "route=0.0.0.0/0", ""},
		{"two gateways", "/ip route add gateway=a,b,a", "route=0.0.0.0/0", "route=0.0.0.0/0"},
		{"host, host bits", "/ip route add dst-address=10.20.0.1 gateway=a\n/ip route add dst-address=10.20.0.1/16 gateway=a", "route=10.20.0.1/32\nroute=10.20.0.0/16", ""},
		{"distance", "/ip route add gateway=a distance=1\n/ip route add gateway=b distance=200", "route=0.0.0.0/0", "route=0.0.0.0/0 metric 200"},
		{"table", "/ip route add gateway=a distance=2 routing-table=100\n/ip route add gateway=b routing-mark=7", "route=0.0.0.0/0 metric 2 table 100", "route=0.0.0.0/0 table 7"},
		{"table main", "/ip route add gateway=a routing-table=main", "route=0.0.0.0/0", ""},
		{"table without a number", "/ip route add gateway=a routing-table=vpn\n/ip route add gateway=a routing-mark=vpn", "", ""},
		{"disabled route", "/ip route add gateway=a disabled=yes", "", ""},
		{"unicast", "/ip route add gateway=a type=unicast", "route=0.0.0.0/0", ""},
		{"unreachable", "/ip route add gateway=a type=unreachable\n/ip route add gateway=a blackhole\n/ip route add blackhole=yes gateway=a", "", ""},
		{"set", net + "/ip address set [ find interface=b ] address=10.255.2.1/24\n/ip address remove 0\n/ip route set 0 gateway=a\n/ip route print", "", netRead},
		{"tunnel without a name", "/interface ipip add mtu=1400\n/ip address add address=10.255.3.1/24 interface=ipip-tunnel1", "", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f, errs := parseRouterOS("x.rsc", []byte(two+tt.in))
			if errs != nil {
				t.Fatal(errs)
			}
			var got []string
			for _, tunnel := range f.Tunnels {
				var lines []string
				for _, s := range tunnel.Settings {
					if s.Property == "address" || s.Property == "route" {
						lines = append(lines, s.Property+"="+s.Value)
					}
				}
				got = append(got, strings.Join(lines, "\n"))
			}
			want := []string{tt.a, tt.b}
			if len(got) == 3 {
				want = append(want, "address=10.255.3.1/24")
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
}

func TestParseRouterOS_errors(t *testing.T) {
	const may = "1:21 allow-fast-path=no without ipsec-secret"
	for _, tt := range []struct {
		name, in string
		want     []string
	}{
		{"secret left out", "/interface ipip add allow-fast-path=no name=a", []string{may}},
		{"secret left out, disabled", "/interface ipip add allow-fast-path=no name=a disabled=yes", []string{may}},
		{"secret left out, set later", two + "set b allow-fast-path=no", []string{"4:7 allow-fast-path=no without ipsec-secret"}},
		{"secret of an unknown tunnel", two + "set [ find name=a ] ipsec-secret=x", []string{"4:1 set with ipsec-secret of a tunnel that is not told"}},
		{"secret of a former name", two + "set a name=c\nset a ipsec-secret=x", []string{"5:1 set with ipsec-secret"}},
		{"secret of a removed tunnel", two + "remove a\nset a ipsec-secret=x", []string{"5:1 set with ipsec-secret"}},
		{"secret that only the router knows", "/interface ipip add ipsec-secret=$x", []string{"1:21 ipsec-secret: only a router can tell this value"}},
		{"variable in quotes", `/interface ipip add name="a$x"`, []string{"1:21 name: only a router"}},
		{"expression", `/interface ipip add name=[/system identity get name] mtu=(1500 - 20)`, []string{"1:21 name: only a router", "1:54 mtu: only a router"}},
		{"unknown escape", `/interface ipip add name="a\q" comment="\E"`, []string{"1:21 name: only a router", "1:32 comment: only a router"}},
		{"unknown property", "/interface ipip add nme=a copy-from=b", []string{`1:21 /interface ipip has no property "nme"`, `1:27 /interface ipip has no property "copy-from"`}},
		{"property twice", "/interface ipip add name=a name=b", []string{"1:28 name twice"}},
		{"no property", "/interface ipip add name= a", []string{"1:27 not a property"}},
		{"secret with a blank", "/interface ipip add ipsec-secret=one two=three", []string{"1:38 not a property"}},
		{"name not in UTF-8", `/interface ipip add name="\E7"`, []string{`1:21 name: "\xe7" is not in UTF-8`}},
		{"secret beside an empty name", two + "set a name=\nset [ find ] ipsec-secret=x", []string{"5:1 set with ipsec-secret"}},
		{"no command", "/interface ipip\nname=a", []string{"2:1 not a command of RouterOS"}},
		{"text between commands", "/interface ipip\n-- more --\nadd name=a", []string{"3:1 not a command of RouterOS"}},
		{"text", strings.Repeat("a b c\n", 4), []string{"3:1 not a menu of RouterOS", "4:1 not a menu of RouterOS"}},
		{"no menu", "/ip address of add a=b", []string{"1:1 not a command of RouterOS"}},
		{"prompt", "[admin@MikroTik] > /interface ipip export", []string{"1:1 the prompt of a terminal"}},
		{"address", two + "/ip address add address=10.255.0.300/24 interface=a\n/ip address add interface=a", []string{"4:17 address: want", "5:1 address: want"}},
		{"dst-address", two + "/ip route add dst-address=2001:db8::/32 gateway=a", []string{"4:15 dst-address: want"}},
		{"distance", two + "/ip route add distance=far gateway=a\n/ip route add distance=$x gateway=a", []string{"4:15 distance: want", "5:15 distance: want"}},
		{"quote", "/interface ipip\nadd comment=\"a\nadd comment=\"b\" mtu=1\n", []string{"2:13 a quoted value that is not closed"}},
		{"quote, continued", "/interface ipip\nadd comment=\"a\\\n    b\nadd mtu=1\n", []string{"2:13 a quoted value that is not closed"}},
		{"bracket", "/interface ipip\nset [find name=$x mtu=1\nset (a mtu=[$b", []string{"3:12 an expression that is not closed"}},
		{"brace", "/system script\nadd source={ \"}\" \n# }\n", []string{"2:12 a block that is not closed"}},
		{"continuation", "/ip\\\n", []string{"1:4 file ends inside a continued line"}},
		{"continuation in quotes", "/ip address\r\nadd comment=\"a\\\r\n   ", []string{"2:15 file ends inside a continued line"}},
		{"menu left out", two + "#error exporting \"/ip/route\" (timeout)\n", []string{"4:1 the export says that it is incomplete"}},
		{"menu left out, version 6", "#error exporting /interface ipip\r\n", []string{"1:1 the export says"}},
		{"which menu left out", "#error exporting\n", []string{"1:1 the export says"}},
		{"interrupted", two + "/ip address add\n/ip socks set a=b\n#interrupted", []string{"6:1 the export says"}},
		{"interrupted before a route", two + "/ip address add\n#interrupted\n/ip socks\n#interrupted", []string{"5:1 the export says", "7:1 the export says"}},
		{"interrupted before an address", two + "/ip route add\n/ip socks\n#interrupted", []string{"6:1 the export says"}},
		{"interrupted before a tunnel", "/ip address add\n/ip route add\n/ip socks\n#interrupted", []string{"4:1 the export says"}},
		{"interrupted in a menu", two + "/ip address add\n/ip route\nadd\n#interrupted", []string{"7:1 the export says"}},
		{"UTF-16", "\xff\xfe/\x00i\x00", []string{"1:4 a zero byte"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f, errs := parseRouterOS("x.rsc", []byte(tt.in))
			for _, tunnel := range f.Tunnels {
				if tunnel.refused != nil {
					errs = append(errs, *tunnel.refused)
				}
			}
			var got []string
			for i, err := range errs {
				text := fmt.Sprintf("%d:%d %s", err.Pos.Line, err.Pos.Column, err.Message)
				if i < len(tt.want) && strings.HasPrefix(text, tt.want[i]) {
					text = tt.want[i]
				}
				got = append(got, text)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
}

// A file without an extension, such as a pipe, is an export of RouterOS if it begins with a menu, and YAML otherwise.
func TestParse_noExtension(t *testing.T) {
	for text, want := range map[string]bool{
		"/interface ipip add name=a remote-address=192.0.2.1":                                      true,
		"\ufeff# by RouterOS 7.16.2\r\n#\r\n\r\n  /interface ipip\r\nadd remote-address=192.0.2.1": true,
		"interface ipip add remote-address=192.0.2.1":                                              true,
		"ip address add address=192.0.2.1/24 interface=a":                                          true,
		"# tunnels\ntunnels: []":                                                                   false,
		"{\"tunnels\": []}":                                                                        false,
		"interface: a":                                                                             false,
		"":                                                                                         false,
		"# nothing":                                                                                false,
	} {
		if got := beginsWithMenu([]byte(text)); got != want {
			t.Errorf("%q: %v, want %v", text, got, want)
		}
	}
	if f, errs := parse("/dev/fd/63", []byte("ip address\n/interface ipip add remote-address=192.0.2.1")); len(errs) > 0 || len(f.Tunnels) != 1 {
		t.Errorf("%v", errs)
	}
	if f, errs := parse("a.yaml", []byte("/interface ipip add remote-address=192.0.2.1")); len(errs) == 0 {
		t.Errorf("a file with an extension is read as what it begins like: %v", f)
	}
}

// A tunnel that may have lost its secret is read and refused: it has no configuration.
func TestRead_refused(t *testing.T) {
	file := filepath.Join(t.TempDir(), "export.rsc")
	const in = "/interface ipip\nadd allow-fast-path=no name=a remote-address=192.0.2.1\n" +
		"add name=b remote-address=192.0.2.2\nadd allow-fast-path=no disabled=yes name=c remote-address=192.0.2.3\n"
	if err := os.WriteFile(file, []byte(in), 0o600); err != nil {
		t.Fatal(err)
	}
	f, configs, err := Read(file)
	if err != nil || len(f.Tunnels) != 3 || len(configs) != 1 || configs[0].Name != "b" {
		t.Fatalf("%v, %v, %v", f, configs, err)
	}
	if len(f.Refused) != 1 || f.Refused[0].Pos.String() != file+":2:5" {
		t.Errorf("refused %v", f.Refused)
	}
}

// Every command that is passed over is counted, and what may matter is told with its line.
func TestParseRouterOS_notes(t *testing.T) {
	const in = two + `/ip firewall nat
add action=masquerade
add action=drop
/system identity set name=x
/ip ipsec policy add protocol=ipencap
/interface ipip
set [ find name=a ] mtu=1400
set a comment="\E7"
print
/ip address
add address=192.0.2.9/24 interface=ether1
add address=10.255.0.1/24 interface=a disabled=yes
add address=10.255.0.1/24 interface=a network=10.255.9.0
/ip route
add gateway=a pref-src=10.255.0.1 scope=30
add gateway=a routing-table=vpn
add gateway=192.0.2.254
#error exporting /ip socks
/ip socks
set
#interrupted
`
	want := []string{
		"x.rsc:8:1: /ip ipsec policy passed over: a tunnel is encrypted by its ipsec-secret only",
		"x.rsc:10:1: /interface ipip set passed over: the file does not tell what it is about",
		"x.rsc:11:7: comment passed over: it is not in UTF-8",
		"x.rsc:16:39: network passed over: that of 10.255.0.1/24 is 10.255.0.0",
		`x.rsc:19:15: route 0.0.0.0/0 passed over: it is in the routing table "vpn", which has no number`,
		"x.rsc: passed over: #error 1, #interrupted 1, /interface ipip print 1, /ip address disabled 1, " +
			"/ip address of other interfaces 1, /ip firewall nat 2, /ip ipsec policy 1, /ip route by other gateways 1, " +
			"/ip route pref-src 1, /ip socks 1, /system identity 1",
	}
	f, errs := parseRouterOS("x.rsc", []byte(in))
	if diff := cmp.Diff(want, f.Notes); diff != "" || errs != nil {
		t.Errorf("errors %v, (-want +got)\n%s", errs, diff)
	}
}
