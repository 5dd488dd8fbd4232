package peerconfig

import (
	"bytes"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"ipipd/internal/config"
	"ipipd/internal/tunnel"
)

// configured returns a tunnel with these settings: each a property and its value.
func configured(t *testing.T, settings ...string) *Tunnel {
	t.Helper()
	c := tunnel.Default()
	for i := 0; i < len(settings); i += 2 {
		for _, p := range tunnel.Properties() {
			if p.Name == settings[i] {
				if err := p.Set(&c, settings[i+1]); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	return &Tunnel{Config: c}
}

func written(t *testing.T, system string, of *Tunnel) string {
	t.Helper()
	var b bytes.Buffer
	if err := Write(&b, system, of); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// read returns the only tunnel that a configuration has.
func read(t *testing.T, name, text string) *Tunnel {
	t.Helper()
	file := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	_, configs, err := config.Read(file)
	if err != nil || len(configs) != 1 {
		t.Fatalf("%v, %d tunnels\n%s", err, len(configs), text)
	}
	return &Tunnel{Config: configs[0], ShowSecret: true}
}

// The other end of the other end is this end.
func TestWrite_twice(t *testing.T) {
	for _, settings := range [][]string{
		{"address", "10.255.0.1/30"},
		{"address", "10.255.0.6/30", "address", "10.255.0.8/31", "address", "10.255.0.11/31", "mtu", "1400", "dscp", "46", "dont-fragment", "inherit", "clamp-tcp-mss", "no"},
		{"address", "10.255.0.1 peer 10.255.0.2", "keepalive", "3s,4"},
		{"keepalive", "off", "ipsec-secret", `"mellon" $1 \`},
	} {
		this := configured(t, append([]string{"name", "to Riga", "local-address", "192.0.2.1", "remote-address", "198.51.100.1"}, settings...)...)
		this.ShowSecret = true
		for system, name := range map[string]string{"mikrotik": "x.rsc", "ipipd": "x.yaml"} {
			there := read(t, name, written(t, system, this))
			if there.Config.LocalAddress.String() != "198.51.100.1" || there.Config.RemoteAddress != "192.0.2.1" {
				t.Errorf("%v: the outer addresses are not swapped: %+v", settings, there.Config)
			}
			again := read(t, name, written(t, system, there))
			if changed := tunnel.Changes(&this.Config, &again.Config); len(changed) > 0 || !bytes.Equal(again.Config.IPsec.Secret, this.Config.IPsec.Secret) {
				t.Errorf("%v for %s: %v differ", settings, system, changed)
			}
		}
	}
}

// opposite returns the inner address of the other end, where this end's tells it.
func TestOpposite(t *testing.T) {
	for _, tt := range []struct{ address, target, want string }{
		{"10.255.0.1/30", "", "10.255.0.2/30"},
		{"10.255.0.2/30", "", "10.255.0.1/30"},
		{"10.255.0.0/30", "", ""}, // the subnet's own address
		{"10.255.0.3/30", "", ""},
		{"10.255.0.0/31", "", "10.255.0.1/31"},
		{"10.255.0.1/31", "", "10.255.0.0/31"},
		{"10.255.0.1 peer 10.9.9.9", "", "10.9.9.9/32 peer 10.255.0.1/32"},
		{"10.255.0.1/24", "", ""},
		{"10.255.0.1/24", "10.255.0.77", "10.255.0.77/24"},
		{"10.255.0.1/24", "10.9.9.9", ""},
		{"10.255.0.1/32", "", ""},
		{"10.255.0.1/32", "10.255.0.2", ""},
	} {
		c := configured(t, "remote-address", "192.0.2.1", "address", tt.address).Config
		target, _ := netip.ParseAddr(tt.target)
		got, ok := opposite(c.Addresses[0], target)
		if want := tt.want; ok != (want != "") || ok && got.String() != want {
			t.Errorf("of %s, target %s: %v, %v, want %s", tt.address, tt.target, got, ok, want)
		}
	}
}

// No system's configuration has the secret unless ShowSecret is set. All but ipipd's then have a placeholder where the
// secret belongs.
func TestWrite_secret(t *testing.T) {
	this := configured(t, "name", "ipip1", "local-address", "192.0.2.1", "remote-address", "198.51.100.1", "ipsec-secret", "mellon-mellon-mellon")
	for _, system := range Systems {
		this.ShowSecret = false
		text := written(t, system, this)
		if strings.Contains(text, "mellon") {
			t.Errorf("%s has the secret:\n%s", system, text)
		}
		if system != "ipipd" && !strings.Contains(text, placeholder) && !strings.Contains(text, strings.ReplaceAll(placeholder, " ", "-")) {
			t.Errorf("%s has no place for the secret:\n%s", system, text)
		}
		this.ShowSecret = true
		if text := written(t, system, this); !strings.Contains(text, "mellon-mellon-mellon") {
			t.Errorf("%s has no secret:\n%s", system, text)
		}
	}
}

// A shell takes no part of a name or secret for a command.
func TestWrite_quoting(t *testing.T) {
	for _, name := range []string{"a'b", `a"b`, "a;reboot", "$(reboot)", "`reboot`", "to Riga; reboot", "a?b", "a*b", "-x", "ü"} {
		this := configured(t, "name", name, "local-address", "192.0.2.1", "remote-address", "198.51.100.1", "address", "10.255.0.1/30", "ipsec-secret", "'\"\\$(reboot)`reboot`; reboot")
		this.ShowSecret = true
		script := strings.ReplaceAll(written(t, "linux", this), "/etc/swanctl/conf.d", t.TempDir())
		out, err := exec.Command("sh", "-c", "ip() { :; }; nft() { :; }; swanctl() { :; }; reboot() { echo taken for a command; }\n"+script).CombinedOutput()
		if err != nil || len(out) > 0 {
			t.Errorf("%q: %v: %s\n%s", name, err, out, script)
		}
	}
	for name, want := range map[string]string{"-x": "x", "!": "ipip", "--": "ipip", "a.b": "a-b", "ipip1": "ipip1", "a,b;c": "a-b-c", "ü": "ipip-607474ca47"} {
		this := configured(t, "name", name, "local-address", "192.0.2.1", "remote-address", "198.51.100.1")
		if text := written(t, "linux", this); !strings.Contains(text, "\nip tunnel add "+want+" mode ipip ") {
			t.Errorf("the interface of %q is not called %s:\n%s", name, want, text)
		}
	}
	for word, want := range map[string]string{"": "''", "ipip1": "ipip1", "a b": "'a b'", "a'b": `'a'\''b'`, "$x": "'$x'"} {
		if got := shell(word); got != want {
			t.Errorf("shell(%q) = %s, want %s", word, got, want)
		}
	}
	for secret, want := range map[string]string{`a"b\c`: `"a\"b\\c"`, "0xab": "0x30786162", "0s": "0x3073", "\xff": "0xff", "mellon": `"mellon"`} {
		if got := swanctlSecret([]byte(secret)); got != want {
			t.Errorf("swanctlSecret(%q) = %s, want %s", secret, got, want)
		}
	}
}

// Write fails if this end's outer address, to which the other end would send, is not known.
func TestWrite_noLocalAddress(t *testing.T) {
	this := configured(t, "name", "ipip1", "remote-address", "vpn.example.net")
	if err := Write(&bytes.Buffer{}, "ipipd", this); err == nil || !strings.HasPrefix(err.Error(), "local-address: ") {
		t.Error(err)
	}
	this.Local, this.Remote = netip.IPv4Unspecified(), netip.IPv4Unspecified() // it waits for both
	if err := Write(&bytes.Buffer{}, "ipipd", this); err == nil || !strings.HasPrefix(err.Error(), "local-address: ") {
		t.Error(err)
	}
	this.Local, this.Remote, this.MTU = netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("198.51.100.1"), 1480
	if text := written(t, "ipipd", this); !strings.Contains(text, "\n  local-address: 198.51.100.1\n  remote-address: 192.0.2.1\n") {
		t.Error(text)
	}
}

func TestWrite_unknownSystem(t *testing.T) {
	this := configured(t, "name", "ipip1", "local-address", "192.0.2.1", "remote-address", "198.51.100.1")
	if err := Write(&bytes.Buffer{}, "juniper", this); err == nil {
		t.Error("no error")
	}
}

// Advice about probes that the system does not answer is given only where this end sends such probes.
func TestWrite_keepalive(t *testing.T) {
	for _, tt := range []struct {
		settings []string
		advised  bool
	}{
		{nil, true},
		{[]string{"keepalive-probe", "empty"}, true},
		{[]string{"keepalive", "off"}, false},
		{[]string{"keepalive-probe", "echo", "keepalive-target", "10.255.0.2"}, false},
	} {
		this := configured(t, append([]string{"name", "a", "local-address", "192.0.2.1", "remote-address", "198.51.100.1", "address", "10.255.0.1/30"}, tt.settings...)...)
		for _, system := range []string{"linux", "networkd", "cisco"} {
			if text := written(t, system, this); strings.Contains(text, "want keepalive-probe: echo and keepalive-target: 10.255.0.2 at this end\n") != tt.advised {
				t.Errorf("%s of %v:\n%s", system, tt.settings, text)
			}
		}
	}
}

// IOS takes an MSS of 500 to 1460.
func TestWrite_ciscoMSS(t *testing.T) {
	for mtu, want := range map[string]string{"540": " ip tcp adjust-mss 500\n", "539": " ! ip tcp adjust-mss 499: ", "1500": " ip tcp adjust-mss 1460\n", "9000": " ! ip tcp adjust-mss 8960: "} {
		this := configured(t, "name", "a", "local-address", "192.0.2.1", "remote-address", "198.51.100.1", "mtu", mtu)
		if text := written(t, "cisco", this); !strings.Contains(text, want) {
			t.Errorf("mtu %s:\n%s", mtu, text)
		}
	}
}

// For each remote that peers names a tunnel is written whose only remote is this end.
func TestWriteMany(t *testing.T) {
	of := configured(t, "name", "tunl0", "remote-address", "any", "local-address", "198.51.100.1", "address", "10.255.0.1/32",
		"peers", "10.20.0.0/16=198.51.100.7,10.30.0.0/16=198.51.100.8,10.21.0.0/16=198.51.100.7", "accept-from", "any-peer", "route", "10.99.0.0/16")
	for _, system := range Systems {
		text := written(t, system, of)
		first, second, ok := strings.Cut(text, "on 198.51.100.8, one of many remotes of the other end: 10.30.0.0/16 is sent to it")
		if !ok || !strings.Contains(first, "on 198.51.100.7, one of many remotes of the other end: 10.20.0.0/16, 10.21.0.0/16 is sent to it") || strings.Contains(second, "10.20") {
			t.Errorf("%s:\n%s", system, text)
		}
		if strings.Contains(text, "other than") || !strings.Contains(first, "inner address: one of 10.20.0.0/16, 10.21.0.0/16") || !strings.Contains(second, "inner address: one of 10.30.0.0/16") {
			t.Errorf("%s: the inner address is another:\n%s", system, text)
		}
		if system == "linux" && strings.Contains(text, "add tunl0 ") || system == "networkd" && strings.Contains(text, "Name=tunl0") {
			t.Errorf("%s: Linux has a tunl0 of its own:\n%s", system, text)
		}
	}
	of.Only = netip.MustParseAddr("198.51.100.8")
	one := read(t, "t.yaml", written(t, "ipipd", of)).Config
	if one.RemoteAddress != "198.51.100.1" || one.LocalAddress != of.Only || one.Keepalive.Interval != 0 {
		t.Errorf("%+v", one)
	}
	each := configured(t, "name", "tunl0", "remote-address", "any", "peers", "10.20.0.0/16=198.51.100.7,10.30.0.0/16=192.0.2.8")
	each.Locals = map[netip.Addr]netip.Addr{netip.MustParseAddr("198.51.100.7"): netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("192.0.2.8"): netip.MustParseAddr("192.0.2.1")}
	for remote, local := range each.Locals {
		each.Only = remote
		if one := read(t, "t.yaml", written(t, "ipipd", each)).Config; one.RemoteAddress != local.String() || one.LocalAddress != remote {
			t.Errorf("%v: %+v", remote, one)
		}
	}
	for _, c := range []struct {
		of   *Tunnel
		want string
	}{
		{&Tunnel{Config: of.Config, Only: netip.MustParseAddr("198.51.100.9")}, "remote 198.51.100.9 has no prefix in peers: the other ends are the gateways"},
		{configured(t, "name", "tunl0", "remote-address", "any", "peers", "10.20.0.0/16=198.51.100.7"), "local-address: not known: that of the route to 198.51.100.7"},
		{configured(t, "name", "tunl0", "remote-address", "any", "local-address", "198.51.100.1"), "remote-address is any, and peers names no remote: the other ends are the gateways"},
		{&Tunnel{Config: one, Only: of.Only}, `remote: "198.51.100.8" is not accepted: want a tunnel whose remote-address is any with it`},
	} {
		if err := Write(&bytes.Buffer{}, "linux", c.of); err == nil || !strings.HasPrefix(err.Error(), c.want) {
			t.Errorf("%v, want %s", err, c.want)
		}
	}
}
