package config

import (
	"bytes"
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ipipd/internal/tunnel"
)

// entry returns a tunnel with these settings: each a property and its value.
func entry(t *testing.T, settings ...string) Entry {
	t.Helper()
	e := Entry{Config: tunnel.Default()}
	for i := 0; i < len(settings); i += 2 {
		if err := Set(&e.Config, Setting{Property: settings[i], Value: settings[i+1]}); err != nil {
			t.Fatal(err)
		}
	}
	if err := e.Config.Validate(); err != nil {
		t.Fatal(err)
	}
	return e
}

func exported(t *testing.T) []Entry {
	disabled := entry(t, "name", "ipip10", "remote-address", "vpn.example.net", "comment", "not yet", "keepalive", "off", "allow-fast-path", "no")
	disabled.Config.Disabled = true
	return []Entry{
		entry(t, "name", "ipip1", "local-address", "192.0.2.1", "remote-address", "198.51.100.1",
			"address", "10.255.0.1/30", "address", "10.255.0.9 peer 10.255.0.10", "route", "10.20.0.0/16", "route", "0.0.0.0/0 metric 200 table 100",
			"keepalive", "5,3", "keepalive-probe", "echo", "keepalive-target", "10.255.0.2", "fwmark", "16", "dscp", "46"),
		disabled,
		entry(t, "name", "to Riga: no. 5", "remote-address", "198.51.100.2", "ipsec-secret", `#1 "a" \b $c`, "ipsec-exchange", "ike2"),
		entry(t, "name", "0123", "remote-address", "198.51.100.3", "ipsec-secret-file", "/etc/ipipd/no", "comment", "no", "mtu", "1400", "clamp-tcp-mss", "no"),
	}
}

func TestWriteYAML(t *testing.T) {
	process := DefaultProcess()
	process.LogLevel, process.Threads = "debug", 2
	var b bytes.Buffer
	if err := WriteYAML(&b, process, exported(t)); err != nil {
		t.Fatal(err)
	}
	const want = `threads: 2
log-level: debug
tunnels:
- name: ipip1
  local-address: 192.0.2.1
  remote-address: 198.51.100.1
  dscp: 46
  keepalive: 5s,3
  keepalive-probe: echo
  keepalive-target: 10.255.0.2
  address: [10.255.0.1/30, 10.255.0.9/32 peer 10.255.0.10/32]
  route: [10.20.0.0/16, 0.0.0.0/0 metric 200 table 100]
  fwmark: 0x10
- name: ipip10
  comment: not yet
  remote-address: vpn.example.net
  allow-fast-path: no
  keepalive: off
  disabled: yes
- name: 'to Riga: no. 5'
  remote-address: 198.51.100.2
  ipsec-secret: '#1 "a" \b $c'
  ipsec-exchange: ike2
- name: "0123"
  comment: "no"
  remote-address: 198.51.100.3
  mtu: 1400
  clamp-tcp-mss: no
  ipsec-secret-file: /etc/ipipd/no
`
	if d := cmp.Diff(want, b.String()); d != "" {
		t.Error(d)
	}
	b.Reset()
	if err := WriteYAML(&b, DefaultProcess(), nil); err != nil || b.String() != "tunnels: []\n" {
		t.Errorf("%v, %q", err, &b)
	}
}

// Any value is read back as it was written, in YAML and for RouterOS.
func TestWriteYAML_quoting(t *testing.T) {
	for _, v := range []string{
		"a # b", "#", "a: b", "- a", "[a", "{a}", "*a", "&a", "!a", "|", ">", "%a", "@a", "`a`", `"a"`, "'a'", "a'b\"c", "no", "null", "~", "0x1f",
		"0123", "1e3", "2026-11-27", "00:00:10", "<<", "=", " a ", "a, b", "äöü ⇒ 日本", "\u00a0", "\u202e", "\u2028", "\ufeff", "a\\b", "---", "...", "?", "-",
		strings.Repeat("word ", 50) + ".",
	} {
		e := entry(t, "name", "a", "remote-address", "192.0.2.1", "comment", v, "ipsec-secret", v+"\x01\t\x7f")
		same(t, "x.yaml", e, func(b *bytes.Buffer, entries []Entry) error { return WriteYAML(b, DefaultProcess(), entries) })
		same(t, "x.rsc", e, writeRouterOS)
	}
}

// same fails the test unless the tunnel that write writes is read back the same.
func same(t *testing.T, name string, e Entry, write func(*bytes.Buffer, []Entry) error) {
	t.Helper()
	var b bytes.Buffer
	if err := write(&b, []Entry{e}); err != nil {
		t.Fatal(err)
	}
	f, errs := parse(name, b.Bytes())
	if len(errs) > 0 || len(f.Tunnels) != 1 {
		t.Fatalf("%v\n%s", errs, &b)
	}
	got := entriesOf(t, f)[0]
	if changed := tunnel.Changes(&e.Config, &got.Config); len(changed) > 0 || !bytes.Equal(e.Config.IPsec.Secret, got.Config.IPsec.Secret) {
		t.Errorf("%v\n%s", changed, &b)
	}
}

func writeRouterOS(b *bytes.Buffer, entries []Entry) error {
	_, err := WriteRouterOS(b, DefaultProcess(), entries)
	return err
}

// A secret that is not UTF-8 cannot be written as YAML, but for RouterOS.
func TestWriteYAML_notUTF8(t *testing.T) {
	const want = "a: ipsec-secret: what was given is not accepted: want a secret in UTF-8, to be written as YAML: rsc can have this one"
	e := entry(t, "name", "a", "remote-address", "192.0.2.1", "ipsec-secret", "\xe7\xff mellon")
	if err := WriteYAML(&bytes.Buffer{}, DefaultProcess(), []Entry{e}); err == nil || err.Error() != want {
		t.Error(err)
	}
	same(t, "x.rsc", e, writeRouterOS)
}

// A file written without its secret is refused, with the position where the secret belongs.
func TestWriteYAML_hideSecret(t *testing.T) {
	e := entry(t, "name", "a", "remote-address", "192.0.2.1", "ipsec-secret", "mellon")
	e.HideSecret = true
	var b bytes.Buffer
	if err := WriteYAML(&b, DefaultProcess(), []Entry{e}); err != nil {
		t.Fatal(err)
	}
	dir := write(t, map[string]string{"a.yaml": b.String()})
	if got := wrong(t, dir, dir+"/a.yaml"); got != "a.yaml:4:17: ipsec-secret: what was given is not accepted: want 1 to 4096 bytes of text on one line" {
		t.Errorf("%s\n%s", got, &b)
	}
}

func TestWriteRouterOS(t *testing.T) {
	process := DefaultProcess()
	process.LogLevel = "debug"
	var b bytes.Buffer
	unsaid, err := WriteRouterOS(&b, process, exported(t))
	if err != nil {
		t.Fatal(err)
	}
	const want = `# the process: not in RouterOS: log-level=debug
# ipip1: not in RouterOS: keepalive-probe=echo keepalive-target=10.255.0.2 fwmark=0x10
# to Riga: no. 5: not in RouterOS: ipsec-exchange=ike2
# 0123: not in RouterOS: ipsec-secret-file="/etc/ipipd/no" (ipsec-secret has to be what is in it)
/interface ipip
add dscp=46 keepalive=5s,3 local-address=192.0.2.1 name=ipip1 remote-address=198.51.100.1
add allow-fast-path=no comment="not yet" disabled=yes !ipsec-secret !keepalive name=ipip10 remote-address=vpn.example.net
add allow-fast-path=no ipsec-secret="#1 \"a\" \\b \$c" name="to Riga: no. 5" remote-address=198.51.100.2
add allow-fast-path=no clamp-tcp-mss=no comment=no mtu=1400 name=0123 remote-address=198.51.100.3
/ip address
add address=10.255.0.1/30 interface=ipip1 network=10.255.0.0
add address=10.255.0.9 interface=ipip1 network=10.255.0.10
/ip route
add dst-address=10.20.0.0/16 gateway=ipip1
add distance=200 dst-address=0.0.0.0/0 gateway=ipip1 routing-table=100
`
	if d := cmp.Diff(want, b.String()); d != "" {
		t.Error(d)
	}
	if got := "# " + strings.Join(unsaid, "\n# ") + "\n"; !strings.HasPrefix(want, got) || len(unsaid) != 4 {
		t.Errorf("not said: %q", unsaid)
	}
	dir := write(t, map[string]string{"a.rsc": b.String()})
	f, configs, err := Read(dir + "/a.rsc")
	if err != nil || len(configs) != 3 || !configs[1].Disabled || len(f.Refused) != 1 || f.Refused[0].Pos.Line != 9 {
		t.Errorf("%v, %d configurations, refused %v: want only the one whose secret is in a file", err, len(configs), f.Refused)
	}
}

// A gateway can be an interface of any name. Metrics that a distance cannot say, 1 and more than 255, are in a comment.
func TestWriteRouterOS_routes(t *testing.T) {
	for _, name := range []string{"a@b", "a%b", "a,b", "10.255.0.2", "a b", "[a]", "$a", "ü"} {
		e := entry(t, "name", name, "remote-address", "192.0.2.1", "route", "10.20.0.0/16", "route", "0.0.0.0/0 metric 0", "route", "10.20.0.0/16 metric 2000")
		same(t, "x.rsc", e, writeRouterOS)
	}
	var b bytes.Buffer
	if _, err := WriteRouterOS(&b, DefaultProcess(), []Entry{entry(t, "name", "a", "remote-address", "192.0.2.1", "route", "10.20.0.0/16 metric 1", "route", "10.30.0.0/16 metric 256")}); err != nil {
		t.Fatal(err)
	}
	if want := "# a: not in RouterOS: route=\"10.20.0.0/16 metric 1\" (its distance is 1 without one) " +
		"route=\"10.30.0.0/16 metric 256\" (its distance is 255 at most)\n"; !strings.HasPrefix(b.String(), want) {
		t.Error(b.String())
	}
}

// RouterOS has no interface with many remotes.
func TestWriteRouterOS_any(t *testing.T) {
	var b bytes.Buffer
	e := entry(t, "name", "a", "remote-address", "any", "local-address", "192.0.2.1", "peers", "10.20.0.0/16=198.51.100.7", "route", "10.30.0.0/16")
	unsaid, err := WriteRouterOS(&b, DefaultProcess(), []Entry{e})
	if want := "# a: left out: not in RouterOS: an interface with many remotes, remote-address=any\n"; err != nil || b.String() != want || len(unsaid) != 1 {
		t.Errorf("%v, %q, want %q", err, b.String(), want)
	}
	same(t, "x.yaml", e, func(b *bytes.Buffer, entries []Entry) error { return WriteYAML(b, DefaultProcess(), entries) })
}

// A Snapshot is read back from JSON the same, whatever bytes a secret has; a property of another version is an error.
func TestSnapshot(t *testing.T) {
	want := Snapshot{Process: DefaultProcess(), Tunnels: exported(t)}
	want.Process.LogLevel = "debug"
	want.Tunnels = append(want.Tunnels, entry(t, "name", "a", "remote-address", "192.0.2.1", "ipsec-secret", "\xe7\xff mellon"))
	data, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	var got Snapshot
	if err := json.Unmarshal(data, &got); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, want %+v", got, want)
	}
	if err := json.Unmarshal([]byte(`{"tunnels":[{"settings":[{"property":"colour","value":"cmVk"}]}]}`), &got); err == nil {
		t.Error("a property of another version is taken")
	}
}
