package main

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ipipd/internal/config"
	"ipipd/internal/control"
	"ipipd/internal/tunnel"
)

// upFlags parses args as `up` does, without running it. o is nil if they are wrong.
func upFlags(t *testing.T, args ...string) (o *upOptions, status int, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	s := &streams{&out, &errs}
	root := newCmdRoot(s)
	for _, c := range root.Commands() {
		if c.Name() == "up" {
			root.RemoveCommand(c)
		}
	}
	up := newCmdUp(s, func(_ context.Context, got *upOptions) error {
		o = got
		return nil
	})
	root.AddCommand(up)
	unifyArgErrors(up)
	status = execute(context.Background(), root, append([]string{"up"}, args...), s)
	if out.Len() > 0 {
		t.Errorf("standard output: %q", out.String())
	}
	return o, status, errs.String()
}

// Wrong input gives exit status 2 and one line on standard error.
func TestFlagError_wrongInput(t *testing.T) {
	const remote = "--remote-address=198.51.100.1"
	const accepted = " is not accepted: want "
	for _, tt := range []struct {
		args []string
		want string
	}{
		{nil, `--remote-address: missing: want an IPv4 address, a DNS name or any; the smallest tunnel is ipipd up --remote-address 198.51.100.1 --address 10.255.0.1/30`},
		{[]string{"--remote-address", ""}, `--remote-address: ""` + accepted + `an IPv4 address, a DNS name or any`},
		{[]string{"--remote-address", "2001:db8::1"}, `--remote-address: "2001:db8::1"` + accepted + `an IPv4 address, a DNS name or any; IPv6 is not supported`},
		{[]string{remote, "--dscp", "64"}, `--dscp: "64"` + accepted + `inherit or 0..63`},
		{[]string{remote, "--dscp=64"}, `--dscp: "64"` + accepted + `inherit or 0..63`},
		{[]string{remote, "--mtu", "67"}, `--mtu: "67"` + accepted + `auto or 68..65515`},
		{[]string{remote, "--ttl", "0"}, `--ttl: "0"` + accepted + `inherit or 1..255`},
		{[]string{remote, "--dont-fragment", "yes"}, `--dont-fragment: "yes"` + accepted + `no or inherit`},
		{[]string{remote, "--clamp-tcp-mss", "true"}, `--clamp-tcp-mss: "true"` + accepted + `yes or no`},
		{[]string{remote, "--keepalive-probe", "x"}, `--keepalive-probe: "x"` + accepted + `reflect, empty or echo`},
		{[]string{remote, "--name", "a\nb"}, `--name: "a\nb"` + accepted + `1 to 127 bytes of text on one line, without / and not . .. all or default`},
		{[]string{remote, "--threads", "0"}, `--threads: "0"` + accepted + `auto or 1..16`},
		{[]string{remote, "--threads", "17"}, `--threads: "17"` + accepted + `auto or 1..16`},
		{[]string{remote, "--fwmark", "x"}, `--fwmark: "x"` + accepted + `0..4294967295, or 0x0..0xffffffff`},
		{[]string{remote, "--address", "10.0.0.1"}, `--address: "10.0.0.1"` + accepted + `an IPv4 address and the length of its subnet, 10.255.0.1/30`},
		{[]string{remote, "--route", "10.0.0.1/8"}, `--route: "10.0.0.1/8"` + accepted + `an IPv4 network without host bits, 10.0.0.0/8`},
		{[]string{remote, "--log-level", "trace"}, `--log-level: "trace"` + accepted + `debug, info, warn or error`},
		{[]string{remote, "--log-level", "info+1"}, `--log-level: "info+1"` + accepted + `debug, info, warn or error`},
		{[]string{remote, "--log-format", "xml"}, `--log-format: "xml"` + accepted + `text or json`},
		{[]string{remote, "--runtime-dir", ""}, `--runtime-dir: ""` + accepted + fmt.Sprintf("a folder, with a path of 1 to %d bytes", control.MaxDir)},
		{[]string{remote, "--local-address", "198.51.100.1"}, `--remote-address: "198.51.100.1"` + accepted + `an address other than local-address`},
		{[]string{remote, "--keepalive-probe", "echo"}, `--keepalive-target: missing: want the inner IPv4 address that keepalive-probe echo asks`},
		{[]string{remote, "--ipsec-secret", ""}, `--ipsec-secret: what was given is not accepted: want 1 to 4096 bytes of text on one line`},
		{[]string{remote, "--ipsec-secret"}, `--ipsec-secret: no value given: want text`},
		{[]string{remote, "--ipsec-secret", "hunter2", "--allow-fast-path", "yes"}, `--allow-fast-path: "yes"` + accepted + `no with ipsec-secret: the fast path does not encrypt`},
		{[]string{remote, "--ipsec-phase2", "aes128-sha1"}, `--ipsec-secret-file: missing: want the secret for ipsec-phase2 "aes128-sha1", or no ipsec-phase2: without a secret nothing is encrypted`},
		{[]string{remote, "--mtu"}, `--mtu: no value given: want auto or 68..65515`},
		{[]string{"--remote-adress", "198.51.100.1"}, `--remote-adress: unknown flag: did you mean --remote-address?`},
		{[]string{remote, "--help=x"}, `--help: "x"` + accepted + `true or false`},
	} {
		t.Run(strings.Join(tt.args, " "), func(t *testing.T) {
			o, status, stderr := upFlags(t, tt.args...)
			if o != nil {
				t.Error("up ran")
			}
			if status != 2 {
				t.Errorf("exit status %d, want 2", status)
			}
			if d := cmp.Diff("ipipd: "+tt.want+"\n", stderr); d != "" {
				t.Error(d)
			}
		})
	}
}

// All wrong values are told at once, in the order of the command line.
func TestCollectErrors(t *testing.T) {
	o, status, stderr := upFlags(t, "--mtu", "1", "--dscp", "46", "--ttl", "0", "--threads", "17", "--route", "default")
	const want = `ipipd: --mtu: "1" is not accepted: want auto or 68..65515
ipipd: --ttl: "0" is not accepted: want inherit or 1..255
ipipd: --threads: "17" is not accepted: want auto or 1..16
ipipd: --route: "default" is not accepted: want an IPv4 network: 0.0.0.0/0 is the default route
ipipd: --remote-address: missing: want an IPv4 address, a DNS name or any; the smallest tunnel is ipipd up --remote-address 198.51.100.1 --address 10.255.0.1/30
`
	if d := cmp.Diff(want, stderr); o != nil || status != 2 || d != "" {
		t.Errorf("exit status %d: %s", status, d)
	}
	_, status, stderr = upFlags(t, "--config", "x.yaml", "--mtu", "1400", "--threads", "0", "--dscp", "46")
	const wantConfig = `ipipd: --threads: "0" is not accepted: want auto or 1..16
ipipd: --mtu: given beside --config: want it in the file, of a tunnel or in defaults
ipipd: --dscp: given beside --config: want it in the file, of a tunnel or in defaults
`
	if d := cmp.Diff(wantConfig, stderr); status != 2 || d != "" {
		t.Errorf("exit status %d: %s", status, d)
	}
}

// The error for an unknown flag or stray argument lists what is accepted.
func TestFlagError_unknown(t *testing.T) {
	for _, tt := range []struct{ args, want []string }{
		{[]string{"--colour", "red"}, []string{"ipipd: --colour: unknown flag: ipipd up takes ", " --remote-address ", " --log-format"}},
		{[]string{"-x"}, []string{"ipipd: -x: unknown flag: ipipd up takes ", " --remote-address "}},
		{[]string{"ipip1"}, []string{`ipipd up: unexpected argument "ipip1": want only flags`, "a configuration is --config FILE"}},
		{[]string{"--remote-address=r2", "a\nb"}, []string{`unexpected argument "a\nb"`}},
		{[]string{"--col\nour"}, []string{"--col; our: unknown flag"}},
	} {
		_, status, stderr := upFlags(t, tt.args...)
		if status != 2 || strings.Count(stderr, "\n") != 1 {
			t.Errorf("%q: status %d, %q", tt.args, status, stderr)
		}
		for _, want := range tt.want {
			if !strings.Contains(stderr, want) {
				t.Errorf("%q: %q is not in %q", tt.args, want, stderr)
			}
		}
	}
}

func TestNewCmdUp_flags(t *testing.T) {
	for _, args := range [][]string{
		{"--name", "t0", "--local-address", "192.0.2.1", "--remote-address", "198.51.100.1", "--mtu", "1400", "--dscp", "46",
			"--address", "10.0.0.1/30", "--address", "10.0.1.1/24", "--fwmark", "0x10", "--runtime-dir", "/run/x", "--log-level", "debug", "--log-format", "json"},
		{"--name=t0", "--local-address=192.0.2.1", "--remote-address=198.51.100.1", "--mtu=1400", "--dscp=46",
			"--address=10.0.0.1/30", "--address=10.0.1.1/24", "--fwmark=16", "--runtime-dir=/run/x", "--log-level=debug", "--log-format=json"},
	} {
		o, status, stderr := upFlags(t, args...)
		if status != 0 || o == nil {
			t.Fatalf("status %d: %s", status, stderr)
		}
		got := map[string]string{}
		for _, p := range tunnel.Properties() {
			if v := p.Get(&o.Config); v != "" {
				got[p.Name] = v
			}
		}
		for _, p := range config.ProcessProperties() {
			got[p.Name] = p.Get(&o.processOptions)
		}
		want := map[string]string{
			"name": "t0", "local-address": "192.0.2.1", "remote-address": "198.51.100.1", "mtu": "1400", "dscp": "46",
			"dont-fragment": "no", "clamp-tcp-mss": "yes", "keepalive": "10s,10", "keepalive-probe": "reflect", "ttl": "255",
			"address": "10.0.0.1/30,10.0.1.1/24", "fwmark": "0x10",
			"runtime-dir": "/run/x", "log-level": "debug", "log-format": "json",
		}
		for name := range got {
			if _, ok := want[name]; !ok {
				delete(got, name) // a property that this test does not cover
			}
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Error(d)
		}
	}
}

func TestNewCmdUp_help(t *testing.T) {
	var out bytes.Buffer
	if status := run(context.Background(), []string{"up", "--help"}, &streams{&out, &out}); status != 0 {
		t.Fatalf("status %d", status)
	}
	for line := range strings.Lines(flagTable()) {
		name, ok := strings.CutPrefix(line, "| `--")
		if name, _, _ = strings.Cut(name, "`"); ok && !strings.Contains(out.String(), "--"+name+" ") {
			t.Errorf("--%s is not in the help", name)
		}
	}
}
