package config

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ipipd/internal/serviceuser"
)

// goodFiles are the files of testdata/good that are read without an error.
func goodFiles(t testing.TB) (files []string) {
	t.Helper()
	all, err := filepath.Glob("testdata/good/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range all {
		if !strings.HasSuffix(name, ".want.json") {
			files = append(files, name)
		}
	}
	if len(files) == 0 {
		t.Fatal("no files")
	}
	return files
}

// write makes files in a folder of their own, which it returns.
func write(t *testing.T, files map[string]string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// wrong returns the errors of Read of the paths, which must have some, without the folder's path.
func wrong(t *testing.T, dir string, paths ...string) string {
	t.Helper()
	file, configs, err := Read(paths...)
	var errs Errors
	if file != nil || configs != nil || !errors.As(err, &errs) {
		t.Fatalf("Read = %v, %v, %v, want Errors", file, configs, err)
	}
	return strings.ReplaceAll(err.Error(), dir+"/", "")
}

// The tunnels of a file are those of the .want.json beside it.
func TestRead_good(t *testing.T) {
	for _, name := range goodFiles(t) {
		t.Run(name, func(t *testing.T) {
			file, configs, err := Read(name)
			if err != nil {
				t.Fatal(err)
			}
			text, err := json.Marshal(file)
			if err != nil {
				t.Fatal(err)
			}
			wanted, err := os.ReadFile(strings.TrimSuffix(name, filepath.Ext(name)) + ".want.json")
			if err != nil {
				t.Fatal(err)
			}
			var got, want []map[string]any
			if err := errors.Join(json.Unmarshal(text, &got), json.Unmarshal(wanted, &want)); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(want, got); d != "" {
				t.Error(d)
			}
			for i, one := range want {
				if disabled := one["disabled"] == true; configs[i].Name != one["name"] || configs[i].Disabled != disabled {
					t.Errorf("configuration %d is of %q, disabled %v, want %q, %v", i, configs[i].Name, configs[i].Disabled, one["name"], disabled)
				}
			}
			if len(want) != len(configs) {
				t.Errorf("%d configurations, want %d", len(configs), len(want))
			}
		})
	}
}

func TestRead_values(t *testing.T) {
	_, configs, err := Read("testdata/good/untyped.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if got, want := string(configs[2].IPsec.Secret), "*hunter2, and: more"; got != want {
		t.Errorf("the secret is %q, want %q", got, want)
	}
	if configs[0].Keepalive.Interval != 0 || configs[1].Keepalive.Interval.Seconds() != 10 {
		t.Errorf("keepalive %v and %v, want off, and 10s of the defaults", configs[0].Keepalive, configs[1].Keepalive)
	}
}

// All errors come at once, each with what is accepted, in the order of the file.
func TestRead_errors(t *testing.T) {
	const one = "tunnels: [{name: a, remote-address: 192.0.2.1}]\n"
	const anchor = "an anchor or alias: want the value itself, in quotes if it begins with & or *"
	for name, tt := range map[string]struct{ text, want string }{
		"empty":           {"", "f:1:1: an empty file: want tunnels: and a list"},
		"only comments":   {"# none\n\n", "f:1:1: an empty file: want tunnels: and a list"},
		"null":            {"---\n", "f:2:1: want a mapping, key: value, for a file"},
		"no tunnels":      {"log-level: info\n", "f:1:1: tunnels: missing: want a list of tunnels, [] for none"},
		"tunnels null":    {"tunnels:\n", "f:1:9: tunnels: want a list of tunnels, [] for none"},
		"tunnels by name": {"tunnels: {ipip1: {}}\n", "f:1:10: tunnels: want a list of tunnels, [] for none"},
		"list":            {"- name: a\n", "f:1:1: want a mapping, key: value, for a file"},
		"defaults null":   {"defaults:\n" + one, "f:1:10: want a mapping, key: value, for defaults"},
		"a tunnel's text": {"tunnels: [ipip1]\n", "f:1:11: want a mapping, key: value, for a tunnel"},
		"peers": {
			"defaults: {remote-address: any}\ntunnels:\n- name: a\n  local-address: 192.0.2.1\n  peers:\n    10.20.0.1/16: 198.51.100.7\n    10.30.0.0/16: [198.51.100.7]\n    10.40.0.0/16:\n    10.50.0.0/33: 198.51.100.7\n    10.60.0.0/16: 224.0.0.5\n    10.70.0.0/16: ::1\n" +
				"- {name: b, local-address: 192.0.2.4, peers: [10.20.0.0/16: 198.51.100.7, 10.20.0.0/16: 198.51.100.8]}\n" +
				"- {name: c, remote-address: 192.0.2.2, peers: [10.20.0.0/16: 198.51.100.7]}\n" +
				"- {name: d, local-address: 192.0.2.3, peers: {10.20.0.0/16: 192.0.2.3}}\n" +
				"- {name: e, remote-address: {any: 1}, address: {a: b}}\n",
			`f:6:5: peers: "10.20.0.1/16=198.51.100.7" is not accepted: want an IPv4 network without host bits, 10.20.0.0/16
f:7:19: peers: a list or mapping: want one value
f:8:5: peers: "10.40.0.0/16=" is not accepted: want an IPv4 network and the address of its remote, 10.20.0.0/16=198.51.100.7
f:9:5: peers: "10.50.0.0/33=198.51.100.7" is not accepted: want an IPv4 network and the address of its remote, 10.20.0.0/16=198.51.100.7
f:10:5: peers: "10.60.0.0/16=224.0.0.5" is not accepted: want an IPv4 network and the address of its remote, 10.20.0.0/16=198.51.100.7; of one host: not 0.0.0.0, multicast or broadcast
f:11:5: peers: "10.70.0.0/16=::1" is not accepted: want an IPv4 network and the address of its remote, 10.20.0.0/16=198.51.100.7; IPv6 is not supported
f:12:75: peers: "10.20.0.0/16=198.51.100.8" is not accepted: want each network once, here or as a route
f:13:48: peers: "10.20.0.0/16=198.51.100.7" is not accepted: want remote-address any with it
f:14:47: peers: "10.20.0.0/16=192.0.2.3" is not accepted: want a remote other than local-address
f:15:29: remote-address: a list or mapping: want one value
f:15:48: address: a list or mapping: want one value`,
		},
		"unknown keys": {
			"log-levl: info\nmtu: 1\nname: a\n" +
				"defaults: {name: a, keepalve: off, log-level: info}\n" +
				"tunnels:\n- name: a\n  remote-address: r\n  colour: red\n  defaults: {}\n",
			`f:1:1: unknown key "log-levl": did you mean log-level?
f:2:1: unknown key "mtu" in a file: want it in a tunnel or in defaults
f:3:1: unknown key "name" in a file: want one in each tunnel
f:4:12: unknown key "name" in defaults: want one in each tunnel
f:4:21: unknown key "keepalve": did you mean keepalive?
f:4:36: unknown key "log-level" in defaults: want it at the top of the file
f:8:3: unknown key "colour" in a tunnel: want one of ` + strings.Join(tunnelKeys, ", ") + `
f:9:3: unknown key "defaults" in a tunnel: want it at the top of the file`,
		},
		"metrics-address": {"metrics-address: 9469\n" + one, `f:1:18: metrics-address: "9469" is not accepted: want off, an address and a port (127.0.0.1:9469, [::1]:9469; 0.0.0.0:9469 is every address of this host), :9469 for 127.0.0.1, or unix:/path`},
		"no space":        {"tunnels: [{name=a, remote-address:192.0.2.1}]\n", "f:1:12: name: no value: want a colon and a space behind the key\nf:1:20: remote-address: no value: want a colon and a space behind the key"},
		"key twice":       {"log-level: info\n'log-level': warn\n" + one, "f:2:1: log-level: twice: want it once; line 1 has it"},
		"key of a tunnel twice": {
			"tunnels:\n- name: a\n  remote-address: r\n  mtu: 1400\n  mtu: 1500\n",
			"f:5:3: mtu: twice: want it once; line 4 has it",
		},
		"values": {
			"threads: 0\ndefaults: {mtu: 1, disabled: true, route: [10.0.0.1/8]}\n" +
				"tunnels:\n- {name: a, remote-address: r, dscp: 64, address: [10.0.0.1/30, 10.0.0.1]}\n- {name: b/c, remote-address: ::1}\n",
			`f:1:10: threads: "0" is not accepted: want auto or 1..16
f:2:17: mtu: "1" is not accepted: want auto or 68..65515
f:2:30: disabled: "true" is not accepted: want yes or no
f:2:44: route: "10.0.0.1/8" is not accepted: want an IPv4 network without host bits, 10.0.0.0/8
f:4:38: dscp: "64" is not accepted: want inherit or 0..63
f:4:65: address: "10.0.0.1" is not accepted: want an IPv4 address and the length of its subnet, 10.255.0.1/30
f:5:10: name: "b/c" is not accepted: want 1 to 127 bytes of text on one line, without / and not . .. all or default
f:5:31: remote-address: "::1" is not accepted: want an IPv4 address, a DNS name or any; IPv6 is not supported`,
		},
		"kinds": {
			"log-level: [info]\ntunnels:\n- name: {a: b}\n- {name: a, remote-address: [r], address: {a: b}, route: [[10.0.0.0/8]]}\n",
			`f:1:12: log-level: a list or mapping: want one value
f:3:9: name: a list or mapping: want one value
f:4:29: remote-address: a list or mapping: want one value
f:4:43: address: a list or mapping: want one value
f:4:59: route: a list or mapping: want one value`,
		},
		"empty values": {
			"tunnels:\n- name: a\n  remote-address:\n  address:\n  route: ['']\n",
			`f:3:18: remote-address: "" is not accepted: want an IPv4 address, a DNS name or any
f:4:11: address: "" is not accepted: want an IPv4 address and the length of its subnet, 10.255.0.1/30
f:5:11: route: "" is not accepted: want an IPv4 network, 10.20.0.0/16`,
		},
		"missing": {
			"tunnels:\n- {}\n- name: a\n- {name: b, mtu: 1}\n",
			`f:2:3: name: missing: want one, by which a reload finds the tunnel
f:2:3: remote-address: missing: want an IPv4 address, a DNS name or any
f:3:3: remote-address: missing: want an IPv4 address, a DNS name or any
f:4:3: remote-address: missing: want an IPv4 address, a DNS name or any
f:4:18: mtu: "1" is not accepted: want auto or 68..65515`,
		},
		"twice": {
			`tunnels:
- {name: a, remote-address: r.example}
- {name: a, remote-address: R.example.}
- {name: b, remote-address: 192.0.2.1, local-address: 192.0.2.2}
- {name: c, remote-address: 192.0.2.1, local-address: 192.0.2.2}
- {name: c, remote-address: 192.0.2.1, local-address: 192.0.2.2, disabled: yes}
- {name: d, remote-address: 192.0.2.1, local-address: 192.0.2.3}
- {name: e, remote-address: 192.0.2.1}
`,
			`f:3:10: name: "a" is not accepted: want each name once; f:2:10 has it
f:3:29: remote-address: "R.example." is not accepted: want each pair of outer addresses once, here with local-address from the route; f:2:29 has it
f:5:29: remote-address: "192.0.2.1" is not accepted: want each pair of outer addresses once, here with local-address 192.0.2.2; f:4:29 has it
f:6:10: name: "c" is not accepted: want each name once; f:5:10 has it`,
		},
		"combinations": {
			`defaults: {keepalive-probe: echo}
tunnels:
- {name: a, remote-address: 192.0.2.1, local-address: 192.0.2.1}
- {name: b, remote-address: r2, underlay-device: b}
- {name: c, remote-address: r3}
- {name: d, remote-address: r4, address: [10.0.0.1/30, 10.0.1.1/30, 10.0.0.1/24]}
- {name: D, remote-address: rd, route: [10.0.0.0/8, 10.0.0.0/8]}
- {name: e, remote-address: r5, keepalive-probe: ech, keepalive-target: 10.0.0.2}
- {name: f, remote-address: r6, ipsec-exchange: ike2}
- {name: g, remote-address: r7, disabled: yes}
`,
			`f:3:29: remote-address: "192.0.2.1" is not accepted: want an address other than local-address
f:4:50: underlay-device: "b" is not accepted: want an interface other than the tunnel's own
f:5:3: keepalive-target: missing: want the inner IPv4 address that keepalive-probe echo asks
f:6:69: address: "10.0.0.1/24" is not accepted: want each address once
f:7:53: route: "10.0.0.0/8" is not accepted: want each route once
f:8:50: keepalive-probe: "ech" is not accepted: want reflect, empty or echo
f:9:3: ipsec-secret-file: missing: want the secret for ipsec-exchange "ike2", or no ipsec-exchange: without a secret nothing is encrypted
f:10:3: keepalive-target: missing: want the inner IPv4 address that keepalive-probe echo asks`,
		},
		"one fault, one error": {"tunnels: [{name: a, remote-adress: 192.0.2.1}]\n", `f:1:21: unknown key "remote-adress": did you mean remote-address?`},
		"alias":                {"x: &a 1\ntunnels:\n- name: &n a\n  remote-address: *n\n", `f:1:1: unknown key "x" in a file: want one of runtime-dir, threads, metrics-address, metrics-remotes, manage-sysctls, sandbox, log-level, log-format, defaults, tunnels` + "\nf:3:9: " + anchor + "\nf:4:19: " + anchor},
		"alias of nothing":     {"tunnels: *a\n", "f:1:10: " + anchor},
		"anchor of a list":     {"tunnels: [{name: a, remote-address: r, route: &r [10.0.0.0/8]}]", "f:1:47: " + anchor},
		"anchor of a key":      {"&a log-level: info\n" + one, "f:1:1: " + anchor},
		"merge key":            {"tunnels:\n- <<: {mtu: 1400}\n  name: a\n", "f:2:3: a merge key, <<: want each key written out, or what is common in defaults"},
		"tags": {
			"log-level: !!str info\ndefaults: !x {}\ntunnels: ! [{name: a}]\n",
			"f:1:12: a tag: want the value alone, in quotes if it begins with !\nf:2:11: a tag: want the value alone, in quotes if it begins with !\nf:3:10: a tag: want the value alone, in quotes if it begins with !",
		},
		"a key that is a list": {"[log-level]: info\n" + one, "f:1:1: a list or mapping as a key: want one of runtime-dir, threads, metrics-address, metrics-remotes, manage-sysctls, sandbox, log-level, log-format, defaults, tunnels"},
		"second document":      {one + "---\n" + one, "f:2:1: a second document: want one, and its tunnels in the first or in another file"},
		"end of a document":    {one + "---\n", "f:2:1: a second document: want one, and its tunnels in the first or in another file"},
		"brackets":             {strings.Repeat("[", 10_000), "f:1:9: more than 8 levels of nesting: want tunnels: and a list of mappings"},
		"nested blocks":        {strings.Repeat("- ", 10_000) + "a", "f:1:17: more than 8 levels of nesting: want tunnels: and a list of mappings"},
		"tab":                  {"tunnels:\n\t- name: a\n", "f:2:1: a tab in the indentation: want spaces"},
		"tab after spaces":     {"tunnels:\n  - name: a\n  \tmtu: 1400\n", "f:3:3: a tab in the indentation: want spaces"},
		"JSON with tabs":       {"\ufeff{\n\t\"tunnels\": []\n\t\"log-level\": \"info\"\n}\n", "f:3:2: not YAML: did not find expected ',' or '}' while parsing a flow mapping that begins in line 1"},
		"Latin-1":              {"# é\nlog-level: \"\xe9\"\n", "f:2:13: not UTF-8: want the file in UTF-8"},
		"UTF-16":               {"\xff\xfea\x00", "f:1:1: not UTF-8: want the file in UTF-8"},
		"NUL":                  {"# é\n# é\x00", "f:2:4: control character U+0000: want text, or an escape in double quotes"},
		"line separator":       {"log-level: a\u2028b", "f:1:13: control character U+2028: want text, or an escape in double quotes"},
		"carriage return":      {"a: 1\r\nb: 2\rc: 3", "f:2:5: control character U+000D: want text, or an escape in double quotes"},
		"not closed":           {"tunnels: [", "f:1:11: not YAML: did not find expected node content while parsing a flow node"},
		"quote not closed":     {"log-level: \"info\n\ntunnels: []\n", "f:4:1: not YAML: found unexpected end of stream while scanning a quoted scalar that begins in line 1"},
		"indentation":          {"tunnels:\n- name: a\n  mtu: 1\n ttl: 1\n", "f:4:2: not YAML: did not find expected key while parsing a block mapping that begins in line 1"},
		"long value":           {"tunnels: [{name: a, remote-address: r, comment: " + strings.Repeat("x", 5000) + "}]", "f:1:49: comment: a value of more than 4096 bytes"},
		"long key":             {strings.Repeat("x", 900) + ": 1\n" + one, "f:1:1: unknown key in a file: want one of runtime-dir, threads, metrics-address, metrics-remotes, manage-sysctls, sandbox, log-level, log-format, defaults, tunnels"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := write(t, map[string]string{"f": tt.text})
			if d := cmp.Diff(tt.want, wrong(t, dir, dir+"/f")); d != "" {
				t.Error(d)
			}
		})
	}
}

// However a secret goes wrong, it is in no error.
func TestRead_secret(t *testing.T) {
	for _, text := range []string{
		"tunnels: [{name: a, ipsec-secret: hunter2, allow-fast-path: yes, remote-address: r}]",
		"tunnels:\n- name: a\n  ipsec-secret: *hunter2\n",
		"tunnels:\n- name: a\n  ipsec-secret: &hunter2\n",
		"tunnels:\n- name: a\n  ipsec-secret: !hunter2\n",
		"tunnels:\n- name: a\n  ipsec-secret: !hunter2{ x\n",
		"tunnels:\n- name: a\n  ipsec-secret: @hunter2\n",
		"tunnels:\n- name: a\n  ipsec-secret: \"hunter2\n",
		"tunnels:\n- name: a\n  ipsec-secret: \"\\hunter2\"\n",
		"tunnels:\n- name: a\n  ipsec-secret: x: hunter2\n",
		"tunnels:\n- name: a\n  ipsec-secret: [hunter2]\n",
		"tunnels:\n- name: a\n  ipsec-secret: {hunter2: hunter2}\n",
		"tunnels:\n- name: a\n  ipsec-secret:\n    hunter2:\n",
		"tunnels:\n- name: a\n  ipsec-secret: |\n    hunter2\n",
		"tunnels:\n- name: a\n  ipsec-secret: x" + strings.Repeat("hunter2", 1000) + "\n",
		"tunnels:\n- name: a\n  ipsec-secert: hunter2\n",
		"tunnels:\n- name: a\n  ipsec-secret: x\n  ipsec-secret: hunter2\n",
		"tunnels:\n- name: a\n  ipsec-secret hunter2:\n",
		"tunnels:\n- name: a\n  ipsec-secret=hunter2: x\n",
		"tunnels: [{name: a, ipsec-secret hunter2}]",
		"tunnels: [{name: a, ipsec-secret=hunter2}]",
		"tunnels: [{name: a, ipsec-secret:hunter2}]",
		"tunnels: [{name: a, ipsec-secret: x,hunter2}]",
		"tunnels: [{name: a, ipsec-secret: x,hunter2: y}]",
		"tunnels: [{name: a, ipsec-secret x,hunter2}]",
		"tunnels: [ipsec-secret, hunter2]",
		"tunnels:\n- name: a\n  ipsec-secret:\n  hunter2:\n",
		"ipsec-secret: hunter2\ntunnels: []",
		"tunnels: hunter2",
		"hunter2",
	} {
		dir := write(t, map[string]string{"f": text})
		if got := wrong(t, dir, dir+"/f"); strings.Contains(got, "hunter") {
			t.Errorf("%q: %s", text, got)
		}
	}
}

// Several files are one configuration: the defaults of each are for all tunnels, and what may be given once may be in
// one of them only. A folder is its files in order of name.
func TestRead_folder(t *testing.T) {
	dir := write(t, map[string]string{
		"10.yaml":      "tunnels: [{name: ten, remote-address: 192.0.2.10, mtu: 1400}]",
		"2.json":       `{"tunnels": [{"name": "two", "remote-address": "192.0.2.2"}]}`,
		"9.yml":        "defaults: {mtu: 1300}\nlog-level: warn\ntunnels: [{name: nine, remote-address: 192.0.2.9}]",
		"README":       "no configuration",
		".hidden.yaml": "no configuration",
		"9.yml~":       "no configuration",
	})
	if err := os.Mkdir(dir+"/folder.yaml", 0o700); err != nil {
		t.Fatal(err)
	}
	file, configs, err := Read(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, c := range configs {
		got = append(got, c.Name, map[int]string{1300: "1300", 1400: "1400"}[c.MTU])
	}
	if d := cmp.Diff([]string{"ten", "1400", "two", "1300", "nine", "1300"}, got); d != "" {
		t.Error(d)
	}
	want := []Setting{{"log-level", "warn", Position{dir + "/9.yml", 2, 12}}}
	if d := cmp.Diff(want, file.Process); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff([]string{dir + "/10.yaml", dir + "/2.json", dir + "/9.yml"}, file.Files); d != "" {
		t.Error(d)
	}

	other := write(t, map[string]string{"other": "log-level: info\ndefaults: {mtu: 1300}\ntunnels:\n- {name: two, remote-address: r}\n- {name: b, remote-address: 192.0.2.10}"})
	errs := strings.ReplaceAll(wrong(t, dir, dir, other+"/other"), other+"/", "")
	if d := cmp.Diff(`other:1:12: log-level: twice: 9.yml:2:12 has it
other:2:17: mtu: twice: 9.yml:1:17 has a default for it
other:4:10: name: "two" is not accepted: want each name once; 2.json:1:23 has it
other:5:29: remote-address: "192.0.2.10" is not accepted: want each pair of outer addresses once, here with local-address from the route; 10.yaml:1:39 has it`, errs); d != "" {
		t.Error(d)
	}
}

func TestRead_noFile(t *testing.T) {
	dir := t.TempDir()
	if _, _, err := Read(dir + "/none.yaml"); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), dir+"/none.yaml") {
		t.Errorf("got %v, want that there is no such file", err)
	}
	if _, _, err := Read(dir); err == nil || err.Error() != dir+": no configuration in this folder: want files named *.yaml, *.yml, *.json, *.rsc" {
		t.Errorf("an empty folder: %v", err)
	}
}

func TestRead_size(t *testing.T) {
	dir := write(t, map[string]string{
		"f": "tunnels: []\n#" + strings.Repeat("x", maxSize-13),
		"g": "tunnels: []\n#" + strings.Repeat("x", maxSize-12),
	})
	if _, _, err := Read(dir + "/f"); err != nil {
		t.Errorf("a file of 10 MB: %v", err)
	}
	if got, want := wrong(t, dir, dir+"/g"), "g:1:1: a file of more than 10 MB: want the tunnels in several"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestErrorsError_more(t *testing.T) {
	text := "tunnels:\n" + strings.Repeat("- x\n", 25)
	dir := write(t, map[string]string{"f": text})
	lines := strings.Split(wrong(t, dir, dir+"/f"), "\n")
	if len(lines) != 21 || !strings.HasPrefix(lines[19], "f:21:3: ") || lines[20] != "and 5 more" {
		t.Errorf("%d lines, the last two %q", len(lines), lines[len(lines)-2:])
	}
	dir = write(t, map[string]string{"f": "tunnels:\n" + strings.Repeat("- x\n", 2*maxErrors)})
	if got := wrong(t, dir, dir+"/f"); !strings.HasSuffix(got, "\nand at least 980 more") {
		t.Errorf("got %s", got)
	}
}

func TestSuggest(t *testing.T) {
	names := []string{"mtu", "ttl", "keepalive", "keepalive-probe"}
	for misspelt, want := range map[string]string{
		"keepalve": "keepalive", "keep-alive": "keepalive", "keepalive-prob": "keepalive-probe",
		"mtt": "", "alive": "", "": "",
	} {
		if got := Suggest(misspelt, names); got != want {
			t.Errorf("Suggest(%q) = %q, want %q", misspelt, got, want)
		}
	}
}

// Exposed has a file with a secret that others can read, and none whose secrets are in other files.
func TestRead_exposed(t *testing.T) {
	const secret = "tunnels: [{name: a, remote-address: 192.0.2.1, ipsec-secret: mellon, disabled: yes}]\n"
	for _, tt := range []struct {
		name, text string
		mode       os.FileMode
		exposed    bool
	}{
		{"a.yaml", secret, 0o600, false},
		{"a.yaml", secret, 0o640, true},
		{"a.yaml", secret, 0o604, true},
		{"a.yaml", "defaults: {ipsec-secret: mellon}\ntunnels: []\n", 0o644, true},
		{"a.rsc", "/interface ipip add name=a remote-address=192.0.2.1 ipsec-secret=mellon\n", 0o644, true},
		{"a.yaml", "tunnels: [{name: a, remote-address: 192.0.2.1, ipsec-secret-file: /etc/secret}]\n", 0o644, false},
	} {
		path := filepath.Join(write(t, map[string]string{tt.name: tt.text}), tt.name)
		if err := os.Chmod(path, tt.mode); err != nil {
			t.Fatal(err)
		}
		f, _, err := Read(path)
		if err != nil || (len(f.Exposed) == 1 && f.Exposed[0] == path) != tt.exposed {
			t.Errorf("%s with mode %o: %v, %v", tt.text, tt.mode, f, err)
		}
	}
}

// A file with a secret may be readable by the group of the service, and by no other group.
func TestConceal(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: to change the group of a file")
	}
	before := serviceuser.GID
	t.Cleanup(func() { serviceuser.GID = before })
	serviceuser.GID = func() int { return 4242 }
	path := filepath.Join(write(t, map[string]string{"a.yaml": "tunnels: [{name: a, remote-address: 192.0.2.1, ipsec-secret: mellon, disabled: yes}]\n"}), "a.yaml")
	for _, tt := range []struct {
		gid     int
		mode    os.FileMode
		exposed bool
		want    string
	}{{4242, 0o640, false, "chmod 640 "}, {4242, 0o644, true, "chmod 640 "}, {0, 0o640, true, "chmod 600 "}} {
		if err := errors.Join(os.Chown(path, 0, tt.gid), os.Chmod(path, tt.mode)); err != nil {
			t.Fatal(err)
		}
		f, _, err := Read(path)
		if err != nil || len(f.Exposed) == 1 != tt.exposed || Conceal(path) != tt.want+path {
			t.Errorf("group %d, mode %o: %v, %v, %q", tt.gid, tt.mode, f, err, Conceal(path))
		}
	}
}
