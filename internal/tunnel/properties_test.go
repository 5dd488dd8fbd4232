package tunnel

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"ipipd/internal/netstate"
	"ipipd/keepalive"
)

func property(t *testing.T, name string) Property {
	t.Helper()
	for _, p := range Properties() {
		if p.Name == name {
			return p
		}
	}
	t.Fatalf("no property %q", name)
	return Property{}
}

// An error is one line with the property, the value and the accepted values.
func TestPropertySet_invalid(t *testing.T) {
	const (
		local   = "an IPv4 address of this host, or no local-address at all to follow the route"
		oneHost = "; of one host: not 0.0.0.0, multicast or broadcast"
		no6     = "; IPv6 is not supported"
	)
	for _, tt := range []struct{ name, value, want string }{
		{"name", "", wantName},
		{"name", strings.Repeat("x", 128), wantName},
		{"name", "a name of an interface/tunnel", wantName},
		{"name", "a name with \xff in it", wantName},
		{"name", "a/b", wantName},
		{"name", "a\nb", wantName},
		{"name", "a\x7fb", wantName},
		{"name", ".", wantName},
		{"name", "..", wantName},
		{"name", "all", wantName},
		{"name", "default", wantName},
		{"ipsec-secret-file", "", "the path of a file"},
		{"ipsec-exchange", "aggressive", "main, ike2 or auto"},
		{"ipsec-remote-id", "", "an IPv4 address, an FQDN or other text of up to 255 bytes"},
		{"ipsec-remote-id", "192.0.2.300", "an IPv4 address, an FQDN or other text of up to 255 bytes"},
		{"ipsec-remote-id", "2001:db8::1", "an IPv4 address, an FQDN or other text of up to 255 bytes; IPv6 is not supported"},
		{"ipsec-remote-id", "a\nb", "an IPv4 address, an FQDN or other text of up to 255 bytes"},
		{"ipsec-phase1", "aes128-sha1", "CIPHER-HASH-GROUP like aes128-sha1-modp2048 (hash or group is missing)"},
		{"ipsec-phase2", "des-md5", `CIPHER-HASH like aes128-sha1, or aes256gcm16 (no cipher "des")`},
		{"ipsec-pfs-group", "2", "none, modp1024, modp1536, modp2048, modp3072, curve25519, ecp256, modp4096, ecp384, ecp521"},
		{"ipsec-lifetime", "1d,9s", "PHASE1,PHASE2 or PHASE2, each a time of 10s..30d: 1d,30m"},
		{"ipsec-lifetime", "1d,", "PHASE1,PHASE2 or PHASE2, each a time of 10s..30d: 1d,30m"},
		{"ipsec-dpd", "never", "off, INTERVAL or INTERVAL,RETRIES, 8s,4"},
		{"comment", "two\nlines", "up to 255 bytes of text on one line"},
		{"comment", "\xff", "up to 255 bytes of text on one line"},
		{"comment", strings.Repeat("x", 256), "up to 255 bytes of text on one line"},
		{"local-address", "", local},
		{"local-address", "host.example", local},
		{"local-address", "192.0.2.256", local},
		{"local-address", "192.0.2.01", local},
		{"local-address", "192.0.2.1/24", local},
		{"local-address", "2001:db8::1", local + no6},
		{"local-address", "::ffff:192.0.2.1", local + no6},
		{"local-address", "0.0.0.0", local + oneHost},
		{"local-address", "224.0.0.5", local + oneHost},
		{"local-address", "255.255.255.255", local + oneHost},
		{"remote-address", "", wantRemote},
		{"remote-address", "192.0.2", wantRemote},
		{"remote-address", "192.0.2.1.1", wantRemote},
		{"remote-address", "300.0.2.1", wantRemote},
		{"remote-address", "192.0.2.1/24", wantRemote},
		{"remote-address", "192.0.2.1:4", wantRemote},
		{"remote-address", "host name", wantRemote},
		{"remote-address", "-host", wantRemote},
		{"remote-address", "host..example", wantRemote},
		{"remote-address", strings.Repeat("x", 64) + ".example", wantRemote},
		{"remote-address", "fe80::1%eth0", wantRemote + no6},
		{"remote-address", "0.0.0.0", wantRemote + oneHost},
		{"remote-address", "239.1.2.3", wantRemote + oneHost},
		{"remote-address", "255.255.255.255", wantRemote + oneHost},
		{"mtu", "", "auto or 68..65515"},
		{"mtu", "67", "auto or 68..65515"},
		{"mtu", "65516", "auto or 68..65515"},
		{"mtu", "0", "auto or 68..65515"},
		{"mtu", "-1", "auto or 68..65515"},
		{"mtu", "1480 ", "auto or 68..65515"},
		{"mtu", "99999999999999999999", "auto or 68..65515"},
		{"dscp", "64", "inherit or 0..63"},
		{"dscp", "-1", "inherit or 0..63"},
		{"dscp", "+1", "inherit or 0..63"},
		{"dscp", "0x10", "inherit or 0..63"},
		{"dscp", "ef", "inherit or 0..63"},
		{"dont-fragment", "yes", "no or inherit"},
		{"dont-fragment", "", "no or inherit"},
		{"clamp-tcp-mss", "true", "yes or no"},
		{"clamp-tcp-mss", "Yes", "yes or no"},
		{"allow-fast-path", "auto", "yes or no"},
		{"keepalive", "", keepalive.Syntax},
		{"keepalive", "0", keepalive.Syntax},
		{"keepalive", "10s,0", keepalive.Syntax},
		{"keepalive", "10s,", keepalive.Syntax},
		{"keepalive", "4294967296", keepalive.Syntax},
		{"keepalive-probe", "ping", "reflect, empty or echo"},
		{"keepalive-target", "peer", "an inner IPv4 address"},
		{"keepalive-target", "fd00::1", "an inner IPv4 address" + no6},
		{"keepalive-target", "224.0.0.1", "an inner IPv4 address" + oneHost},
		{"ttl", "0", "inherit or 1..255"},
		{"ttl", "256", "inherit or 1..255"},
		{"ttl", "auto", "inherit or 1..255"},
		{"address", "", wantAddress},
		{"address", "10.255.0.1", wantAddress},
		{"address", "10.255.0.1/33", wantAddress},
		{"address", "10.255.0.1/255.255.255.0", wantAddress},
		{"address", "10.255.0.1/30,10.255.0.5/30", wantAddress},
		{"address", "0.0.0.0/0", wantAddress + oneHost},
		{"address", "224.0.0.1/4", wantAddress + oneHost},
		{"address", "fd00::1/64", wantAddress + no6},
		{"address", "10.255.0.1 peer", wantAddress},
		{"address", "10.255.0.1 peer ", wantPeer},
		{"address", "10.255.0.1/30 peer 10.255.0.2", wantPeer},
		{"address", "10.255.0.1 peer 10.255.0.2/30", wantPeer},
		{"address", "10.255.0.1 peer 10.255.0.2 peer 10.255.0.3", wantPeer},
		{"address", "10.255.0.1 peer fd00::1", wantPeer + no6},
		{"address", "10.255.0.1 peer 224.0.0.1", wantPeer + oneHost},
		{"address", "10.255.0.1 peer 10.255.0.1", wantPeer},
		{"route", "default", "an IPv4 network: 0.0.0.0/0 is the default route"},
		{"route", "10.20.0.0", "an IPv4 network, 10.20.0.0/16"},
		{"route", "10.20.1.0/16", "an IPv4 network without host bits, 10.20.0.0/16"},
		{"route", "fd00::/8", "an IPv4 network, 10.20.0.0/16" + no6},
		{"route", "10.20.0.0/16 metric", wantRoute},
		{"route", "10.20.0.0/16 metric x", wantRoute},
		{"route", "10.20.0.0/16 metric 4294967296", wantRoute},
		{"route", "10.20.0.0/16 metric -1", wantRoute},
		{"route", "10.20.0.0/16 metric main", wantRoute},
		{"route", "10.20.0.0/16 table 0", wantRoute},
		{"route", "10.20.0.0/16 table vpn", wantRoute},
		{"route", "10.20.0.0/16 table 100 metric 200", wantRoute},
		{"route", "10.20.0.0/16 metric 200 metric 200", wantRoute},
		{"route", "10.20.0.0/16 metric 200 ", wantRoute},
		{"route", "10.20.0.0/16  metric 200", wantRoute},
		{"route", "10.20.0.0/16 via 10.255.0.2", wantRoute},
		{"peers", "", wantPeers}, {"peers", "10.20.0.0/16", wantPeers}, {"peers", "10.20.0.0/16=", wantPeers}, {"peers", "=198.51.100.7", wantPeers},
		{"peers", "10.20.0.0/16=127.0.0.1", wantPeers + "; of another host"}, {"peers", "10.20.0.0/16=0.1.2.3", wantPeers + "; of another host"},
		{"peers", "10.20.0.0/16 via 198.51.100.7", wantPeers}, {"peers", "10.20.0.0/16=198.51.100.7,", wantPeers}, {"peers", "10.20.0.0/16=198.51.100.7 metric 5", wantPeers},
		{"peers", "10.20.0.1/16=198.51.100.7", "an IPv4 network without host bits, 10.20.0.0/16"}, {"peers", "default=198.51.100.7", wantPeers},
		{"remote-address", "Any", "any in lower case"},
		{"accept-from", "", "any-peer, or IPv4 networks or addresses, 192.0.2.10,172.16.0.0/12"},
		{"accept-from", "any", "any-peer, or IPv4 networks or addresses, 192.0.2.10,172.16.0.0/12"},
		{"accept-from", "192.0.2.10,any-peer", "any-peer, or IPv4 networks or addresses, 192.0.2.10,172.16.0.0/12"},
		{"accept-to", "2001:db8::/32", "IPv4 networks or addresses, 203.0.113.5" + no6},
		{"accept-to", "203.0.113.5,", "IPv4 networks or addresses, 203.0.113.5"},
		{"underlay-device", "", "the name of an interface"},
		{"underlay-device", "eth0/1", "the name of an interface"},
		{"tun-queues", "0", "auto or 1..16"},
		{"tun-queues", "17", "auto or 1..16"},
		{"rps", "", "off, all, or the mask of at least one processor in hexadecimal, such as 3 or ff,ffffffff"},
		{"rps", "0", "off, all, or the mask of at least one processor in hexadecimal, such as 3 or ff,ffffffff"},
		{"rps", "0,00000000", "off, all, or the mask of at least one processor in hexadecimal, such as 3 or ff,ffffffff"},
		{"rps", "123456789", "off, all, or the mask of at least one processor in hexadecimal, such as 3 or ff,ffffffff"},
		{"rps", "3,", "off, all, or the mask of at least one processor in hexadecimal, such as 3 or ff,ffffffff"},
		{"rps", "0x3", "off, all, or the mask of at least one processor in hexadecimal, such as 3 or ff,ffffffff"},
		{"fwmark", "", "0..4294967295, or 0x0..0xffffffff"},
		{"fwmark", "4294967296", "0..4294967295, or 0x0..0xffffffff"},
		{"fwmark", "-1", "0..4294967295, or 0x0..0xffffffff"},
		{"fwmark", "0x", "0..4294967295, or 0x0..0xffffffff"},
		{"fwmark", "ff", "0..4294967295, or 0x0..0xffffffff"},
		{"fwmark", "0x1/0xff", "0..4294967295, or 0x0..0xffffffff"},
	} {
		t.Run(tt.name+"="+tt.value, func(t *testing.T) {
			c := Default()
			err := property(t, tt.name).Set(&c, tt.value)
			want := &ValueError{Property: tt.name, Value: tt.value, Want: tt.want}
			var got *ValueError
			if !errors.As(err, &got) {
				t.Fatalf("Set(%q) = %v, want a *ValueError", tt.value, err)
			}
			if d := cmp.Diff(want, got); d != "" {
				t.Error(d)
			}
			if strings.ContainsAny(err.Error(), "\n\r") {
				t.Errorf("more than one line: %q", err)
			}
		})
	}
}

func TestValueErrorError(t *testing.T) {
	c := Default()
	err := property(t, "dscp").Set(&c, "64")
	if got, want := err.Error(), `dscp: "64" is not accepted: want inherit or 0..63`; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// A secret is in no output: Get, errors, JSON or formatted Config.
func TestPropertyGet_secret(t *testing.T) {
	c := Default()
	p := property(t, "ipsec-secret")
	if err := p.Set(&c, "hunter2\n"); err == nil || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("got %v", err)
	}
	if err := p.Set(&c, "hunter2"); err != nil {
		t.Fatal(err)
	}
	c.RemoteAddress = "r2"
	text, err := json.Marshal(NewStatus(&c))
	if err != nil {
		t.Fatal(err)
	}
	for _, shown := range []string{p.Get(&c), string(text), fmt.Sprintf("%v %+v %#v", c, c, c), fmt.Sprintf("%s %q %x", c.IPsec.Secret, c.IPsec.Secret, c.IPsec.Secret)} {
		if strings.Contains(shown, "hunter2") || strings.Contains(shown, "68756e74657232") {
			t.Errorf("it is in %s", shown)
		}
	}
	if !strings.Contains(string(text), `"ipsec-secret":"(secret)"`) {
		t.Errorf("that there is one is not in %s", text)
	}
}

// goodValues maps each property's accepted values to what Get returns for them.
var goodValues = map[string]map[string]string{
	"name": {"ipip1": "ipip1", "fifteen-bytes-x": "fifteen-bytes-x", "-": "-", "...": "...",
		"sixteen-bytes-xx": "sixteen-bytes-xx", "a b": "a b", "a:b": "a:b", "ipip%d": "ipip%d", "é": "é", strings.Repeat("x", 127): strings.Repeat("x", 127)},
	"comment":         {"": "", "to Riga, räkna med 40 ms": "to Riga, räkna med 40 ms"},
	"local-address":   {"192.0.2.1": "192.0.2.1", "127.0.0.1": "127.0.0.1"},
	"remote-address":  {"198.51.100.1": "198.51.100.1", "r2.example.": "r2.example.", "r2": "r2", "4.example": "4.example", "a_b.example": "a_b.example", "any": "any"},
	"mtu":             {"auto": "auto", "68": "68", "65515": "65515"},
	"dscp":            {"inherit": "inherit", "0": "0", "63": "63"},
	"dont-fragment":   {"no": "no", "inherit": "inherit"},
	"clamp-tcp-mss":   {"yes": "yes", "no": "no"},
	"allow-fast-path": {"yes": "yes", "no": "no"},
	"keepalive":       {"10s,10": "10s,10", "10,10": "10s,10", "00:00:10,10": "10s,10", "10s": "10s,10", "off": "off", "1m30s,3": "1m30s,3"},
	"keepalive-probe": {"reflect": "reflect", "empty": "empty", "echo": "echo"},
	"keepalive-target": {
		"10.255.0.2": "10.255.0.2"},
	"ttl": {"inherit": "inherit", "1": "1", "255": "255"},
	"address": {"10.255.0.1/30": "10.255.0.1/30", "10.255.0.1/32": "10.255.0.1/32",
		"10.255.0.1 peer 10.255.0.2": "10.255.0.1/32 peer 10.255.0.2/32", "10.255.0.1/32 peer 10.255.0.2/32": "10.255.0.1/32 peer 10.255.0.2/32"},
	"route": {"10.20.0.0/16": "10.20.0.0/16", "0.0.0.0/0": "0.0.0.0/0", "0.0.0.0/0 metric 200 table 100": "0.0.0.0/0 metric 200 table 100",
		"10.20.0.0/16 table 4294967295": "10.20.0.0/16 table 4294967295", "10.20.0.0/16 metric 4294967295": "10.20.0.0/16 metric 4294967295",
		"10.20.0.0/16 metric 0 table main": "10.20.0.0/16", "10.20.0.0/16 table 254": "10.20.0.0/16"},
	"peers": {"10.20.0.0/16=198.51.100.7": "10.20.0.0/16=198.51.100.7", "10.255.0.2=198.51.100.7": "10.255.0.2/32=198.51.100.7", "0.0.0.0/0=198.51.100.7": "0.0.0.0/0=198.51.100.7",
		"10.20.0.0/16=198.51.100.7,10.30.0.0/16=198.51.100.8": "10.20.0.0/16=198.51.100.7,10.30.0.0/16=198.51.100.8"},
	"accept-from":       {"any-peer": "any-peer", "192.0.2.10": "192.0.2.10/32", "172.16.0.0/12,192.0.2.10": "172.16.0.0/12,192.0.2.10/32", "172.16.9.9/12": "172.16.0.0/12"},
	"accept-to":         {"203.0.113.5": "203.0.113.5/32", "203.0.113.0/24": "203.0.113.0/24"},
	"underlay-device":   {"eth0": "eth0", "eth0.5": "eth0.5"},
	"tun-queues":        {"auto": "auto", "1": "1", "16": "16"},
	"rps":               {"off": "off", "all": "all", "3": "3", "f0,00000000": "f0,00000000"},
	"ipsec-secret":      {"hunter2": "(secret)"},
	"ipsec-secret-file": {"/etc/ipipd/secret": "/etc/ipipd/secret"},
	"ipsec-exchange":    {"main": "main", "ike2": "ike2", "auto": "auto"},
	"ipsec-remote-id":   {"10.0.0.7": "10.0.0.7", "b.example": "b.example", "site b": "site b"},
	"ipsec-phase1":      {"aes128-sha1-modp2048,3des-sha1-modp1024": "aes128-sha1-modp2048,3des-sha1-modp1024", "aes256gcm16-prfsha256-ecp256": "aes256gcm16-sha256-ecp256"},
	"ipsec-phase2":      {"aes256-sha1": "aes256-sha1", "aes256gcm16,aes128-sha256": "aes256gcm16,aes128-sha256"},
	"ipsec-pfs-group":   {"none": "none", "modp2048": "modp2048", "ecp256": "ecp256"},
	"ipsec-lifetime":    {"1d,30m": "1d,30m", "10m": "1d,10m", "08:00:00,3600": "8h,1h"},
	"ipsec-dpd":         {"8s,4": "8s,4", "2m,5": "2m,5", "30": "30s,4", "off": "off"},
	"fwmark":            {"0": "0", "255": "0xff", "0xFF": "0xff", "4294967295": "0xffffffff"},
}

// Set accepts what Get returns.
func TestPropertyGet_roundTrip(t *testing.T) {
	for _, p := range Properties() {
		if len(goodValues[p.Name]) == 0 {
			t.Errorf("%s: no values to test with", p.Name)
		}
		for value, shown := range goodValues[p.Name] {
			c := Default()
			if err := p.Set(&c, value); err != nil {
				t.Errorf("Set: %v", err)
				continue
			}
			if got := p.Get(&c); got != shown {
				t.Errorf("%s: %q is shown as %q, want %q", p.Name, value, got, shown)
			}
			if shown == "" || p.Secret {
				continue
			}
			again := Default()
			if err := p.Set(&again, p.Get(&c)); err != nil {
				t.Errorf("Set of what Get shows: %v", err)
			}
			if d := cmp.Diff(c, again, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); d != "" {
				t.Error(d)
			}
		}
	}
}

// Reset restores the default of a property, and touches no other.
func TestPropertyReset(t *testing.T) {
	for _, p := range Properties() {
		for value := range goodValues[p.Name] {
			want := Default()
			want.Comment, want.FwMark = "another", 7
			if p.Name == "comment" || p.Name == "fwmark" {
				want = Default()
			}
			c := *want.clone()
			if err := p.Set(&c, value); err != nil {
				t.Fatal(err)
			}
			p.Reset(&c)
			if d := cmp.Diff(want, c, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); d != "" {
				t.Errorf("%s after %q: %s", p.Name, value, d)
			}
		}
	}
}

func TestProperties_defaults(t *testing.T) {
	c := Default()
	for _, p := range Properties() {
		if got := p.Get(&c); got != "" && got != p.Default {
			t.Errorf("%s: the default is %q, documented as %q", p.Name, got, p.Default)
		}
	}
}

func TestProperties_words(t *testing.T) {
	for _, p := range Properties() {
		for _, w := range p.Words {
			c := Default()
			if err := p.Set(&c, w); err != nil {
				t.Error(err)
			}
		}
	}
}

func TestPropertySet_repeatable(t *testing.T) {
	c := Default()
	p := property(t, "address")
	for _, v := range []string{"10.0.0.1/30", "10.0.1.1/24"} {
		if err := p.Set(&c, v); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := p.Get(&c), "10.0.0.1/30,10.0.1.1/24"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestConfigValidate(t *testing.T) {
	for _, tt := range []struct {
		name   string
		values []string // property, value, …
		want   string
	}{
		{"complete", []string{"remote-address", "r2"}, ""},
		{"loopback", []string{"remote-address", "127.0.0.2", "local-address", "127.0.0.1"}, ""},
		{"echo", []string{"remote-address", "r2", "keepalive-probe", "echo", "keepalive-target", "10.0.0.2", "address", "10.0.0.1/30"}, ""},
		{"no remote", nil, "remote-address: missing: want an IPv4 address, a DNS name or any"},
		{"to itself", []string{"remote-address", "192.0.2.1", "local-address", "192.0.2.1"},
			`remote-address: "192.0.2.1" is not accepted: want an address other than local-address`},
		{"over itself", []string{"remote-address", "r2", "name", "t0", "underlay-device", "t0"},
			`underlay-device: "t0" is not accepted: want an interface other than the tunnel's own`},
		{"address twice", []string{"remote-address", "r2", "address", "10.0.0.1/30", "address", "10.0.0.1/24"},
			`address: "10.0.0.1/24" is not accepted: want each address once`},
		{"route twice", []string{"remote-address", "r2", "route", "10.0.0.0/8", "route", "10.0.0.0/8"},
			`route: "10.0.0.0/8" is not accepted: want each route once`},
		{"route of two metrics and two tables", []string{"remote-address", "r2", "route", "10.0.0.0/8", "route", "10.0.0.0/8 metric 2", "route", "10.0.0.0/8 table 2"}, ""},
		{"route twice in main", []string{"remote-address", "r2", "route", "10.0.0.0/8 metric 2", "route", "10.0.0.0/8 metric 2 table main"},
			`route: "10.0.0.0/8 metric 2" is not accepted: want each route once`},
		{"peer twice", []string{"remote-address", "r2", "address", "10.0.0.1 peer 10.0.0.2", "address", "10.0.0.1 peer 10.0.0.3"},
			`address: "10.0.0.1/32 peer 10.0.0.3/32" is not accepted: want each address once`},
		{"echo without target", []string{"remote-address", "r2", "keepalive-probe", "echo", "address", "10.0.0.1/30"},
			`keepalive-target: missing: want the inner IPv4 address that keepalive-probe echo asks`},
		{"echo without address", []string{"remote-address", "r2", "keepalive-probe", "echo", "keepalive-target", "10.0.0.2"},
			`address: missing: want the inner address that keepalive-probe echo asks from, as ` + wantAddress},
		{"echo to itself", []string{"remote-address", "r2", "keepalive-probe", "echo", "keepalive-target", "10.0.0.1", "address", "10.0.0.1/30"},
			`keepalive-target: "10.0.0.1" is not accepted: want an address of the other end, not of this one`},
		{"secret", []string{"remote-address", "r2", "ipsec-secret", "x", "allow-fast-path", "no"}, ""},
		{"secret file", []string{"remote-address", "r2", "ipsec-secret-file", "/x", "ipsec-exchange", "ike2"}, ""},
		{"two secrets", []string{"remote-address", "r2", "ipsec-secret", "x", "ipsec-secret-file", "/x"},
			`ipsec-secret: what was given is not accepted: want either that or ipsec-secret-file`},
		{"secret and fast path", []string{"remote-address", "r2", "ipsec-secret", "x", "allow-fast-path", "yes"},
			`allow-fast-path: "yes" is not accepted: want no with ipsec-secret: the fast path does not encrypt`},
		{"ipsec without secret", []string{"remote-address", "r2", "ipsec-exchange", "ike2"},
			`ipsec-secret-file: missing: want the secret for ipsec-exchange "ike2", or no ipsec-exchange: without a secret nothing is encrypted`},
		{"remote-id of our own", []string{"remote-address", "r2", "ipsec-secret", "x", "local-address", "192.0.2.1", "ipsec-remote-id", "192.0.2.1"},
			`ipsec-remote-id: "192.0.2.1" is not accepted: want the identity of the other end, not local-address`},
		{"remote-id without secret", []string{"remote-address", "r2", "ipsec-remote-id", "b.example"},
			`ipsec-secret-file: missing: want the secret for ipsec-remote-id "b.example", or no ipsec-remote-id: without a secret nothing is encrypted`},
		{"target without echo", []string{"remote-address", "r2", "keepalive-target", "10.0.0.2"},
			`keepalive-target: "10.0.0.2" is not accepted: want keepalive-probe echo with it`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := Default()
			for i := 0; i < len(tt.values); i += 2 {
				if err := property(t, tt.values[i]).Set(&c, tt.values[i+1]); err != nil {
					t.Fatal(err)
				}
			}
			got := ""
			if err := c.Validate(); err != nil {
				got = err.Error()
			}
			if got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
}

func TestConfigValidate_literals(t *testing.T) {
	for _, tt := range []struct {
		change func(*Config)
		want   string
	}{
		{func(c *Config) { c.MTU = 40 }, `mtu: "40" is not accepted: want auto or 68..65515`},
		{func(c *Config) { c.DSCP = 64 }, `dscp: "64" is not accepted: want inherit or 0..63`},
		{func(c *Config) { c.TTL = -1 }, `ttl: "-1" is not accepted: want inherit or 1..255`},
		{func(c *Config) { c.Name = "a/b" }, `name: "a/b" is not accepted: want ` + wantName},
		{func(c *Config) { c.RemoteAddress = "::1" }, `remote-address: "::1" is not accepted: want an IPv4 address, a DNS name or any; IPv6 is not supported`},
		{func(c *Config) {
			c.Addresses = []netstate.InterfaceAddress{{Prefix: netip.MustParsePrefix("10.0.0.1/8")}, {Prefix: netip.MustParsePrefix("fd00::1/8")}}
		}, `address: "fd00::1/8" is not accepted: want ` + wantAddress + `; IPv6 is not supported`},
	} {
		c := Default()
		c.RemoteAddress = "198.51.100.1"
		tt.change(&c)
		if err := c.Validate(); err == nil || err.Error() != tt.want {
			t.Errorf("got  %v\nwant %s", err, tt.want)
		}
	}
}

func TestStatusMarshalJSON(t *testing.T) {
	c := Default()
	c.Name, c.RemoteAddress = "ipip1", "r2.example"
	c.Addresses = []netstate.InterfaceAddress{{Prefix: netip.MustParsePrefix("10.255.0.1/30")}}
	s := NewStatus(&c)
	s.Running, s.ActualMTU, s.CurrentRemoteAddress, s.KeepaliveState = true, 1480, "198.51.100.1", "up"
	s.LastHeard = time.Date(2025, 1, 2, 3, 4, 5, 0, time.UTC)
	s.FastPath, s.CandidateRemoteAddress = "active", "198.51.100.2"
	s.RxPacket, s.RxByte = 1, 84
	text, err := json.Marshal([]Status{s})
	if err != nil {
		t.Fatal(err)
	}
	const want = `[{"name":"ipip1","comment":"","local-address":"","remote-address":"r2.example","mtu":"auto","dscp":"inherit",` +
		`"dont-fragment":"no","clamp-tcp-mss":"yes","allow-fast-path":"yes","keepalive":"10s,10","keepalive-probe":"reflect","keepalive-target":"","ttl":"255",` +
		`"address":["10.255.0.1/30"],"route":[],"peers":[],"accept-from":[],"accept-to":[],"underlay-device":"","fwmark":"0","tun-queues":"auto","rps":"off","ipsec-secret":"",` +
		`"disabled":false,"running":true,"warnings":[],"actual-mtu":1480,"current-local-address":"","current-remote-address":"198.51.100.1","candidate-remote-address":"198.51.100.2",` +
		`"keepalive-state":"up","fast-path":"active","last-heard":"2025-01-02T03:04:05Z","rx-packet":1,"rx-byte":84,"tx-packet":0,"tx-byte":0,"drops":{},"process-drops":{}}]`
	if d := cmp.Diff(want, string(text)); d != "" {
		t.Error(d)
	}

	var back []Status
	if err := json.Unmarshal(text, &back); err != nil {
		t.Fatal(err)
	}
	s.Drops, s.ProcessDrops, s.Warnings = map[string]uint64{}, map[string]uint64{}, []Warning{}
	if d := cmp.Diff([]Status{s}, back); d != "" {
		t.Errorf("what comes back is not what went: %s", d)
	}
}

func TestStatusUnmarshalJSON_otherVersion(t *testing.T) {
	var s Status
	err := json.Unmarshal([]byte(`{"name":"a","new":"x","list":["y","z"],"object":{},"number":3,"running":true}`), &s)
	if err != nil {
		t.Fatal(err)
	}
	want := Status{Settings: []Setting{{"name", "a", false}, {"new", "x", false}, {"list", "y,z", true}}, State: State{Running: true}}
	if d := cmp.Diff(want, s); d != "" {
		t.Error(d)
	}
}
