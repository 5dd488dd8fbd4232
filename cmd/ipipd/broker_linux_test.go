package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ipipd/test/netlab"
)

// threadStatus returns fields of /proc/PID/task/TID/status, which have to be the same for each thread of the process.
func threadStatus(t *testing.T, pid int, names ...string) string {
	t.Helper()
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil || len(threads) < 3 {
		t.Fatalf("%d threads, %v", len(threads), err)
	}
	found := ""
	for _, thread := range threads {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/status", pid, thread.Name()))
		if err != nil {
			continue // it has ended
		}
		var values []string
		for _, name := range names {
			for line := range strings.Lines(string(text)) {
				if value, ok := strings.CutPrefix(line, name+":"); ok {
					values = append(values, name+" "+strings.TrimSpace(value))
				}
			}
		}
		if one := strings.Join(values, ", "); found == "" {
			found = one
		} else if one != found {
			t.Errorf("thread %s: %s, others: %s", thread.Name(), one, found)
		}
	}
	return found
}

// confined is what status says of a process without a capability.
const confined = "CapInh 0000000000000000, CapPrm 0000000000000000, CapEff 0000000000000000, CapBnd 0000000000000000, CapAmb 0000000000000000, NoNewPrivs 1, Seccomp 2"

func capabilitiesOf(t *testing.T, pid int) string {
	t.Helper()
	return threadStatus(t, pid, "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp")
}

const brokerConfig = `
tunnels:
  - {name: near, remote-address: 192.0.2.2, address: [10.255.0.1/30], keepalive: off}
`

// brokerReload is a configuration that takes privileges: addresses, routes, an alternative name, IKE and ESP.
const brokerReload = `
tunnels:
  - {name: near, remote-address: 192.0.2.2, address: [10.255.0.1/30, 10.255.1.1/32 peer 10.255.1.2/32], route: [10.20.0.0/16, 10.30.0.0/16 metric 5 table 100], mtu: 1300, rps: all, keepalive: off}
  - {name: an encrypted tunnel, remote-address: 192.0.2.2, local-address: 192.0.2.3, address: [10.254.0.1/30], ipsec-secret: two-ends-of-a-tunnel-know-it}
`

// Under keep no thread of the process has a capability, and yet all that a configuration may change while it runs works;
// what the configuration does not name is refused.
func TestStartBroker(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: network namespaces, /dev/net/tun and raw sockets")
	}
	t.Parallel()
	a, b := netlab.New(t), netlab.New(t)
	netlab.Veth(t, a, b, netlab.End{Name: "eth0", Address: "192.0.2.1/24"}, netlab.End{Name: "eth0", Address: "192.0.2.2/24"})
	a.Run("ip", "address", "add", "192.0.2.3/24", "dev", "eth0")
	dir := shortDir(t)
	in := func(name string) string { return filepath.Join(dir, name) }
	configure := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(in(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	configure("far.yaml", `
tunnels:
  - {name: far, remote-address: 192.0.2.1, address: [10.255.0.2/30]}
  - {name: far2, remote-address: 192.0.2.3, address: [10.254.0.2/30], ipsec-secret: two-ends-of-a-tunnel-know-it}
`)
	b.Start(exec.Command("ipipd", "up", "--config", in("far.yaml"), "--runtime-dir", in("far")))
	configure("near.yaml", brokerConfig)
	k := startKept(t, func(cmd *exec.Cmd) (err error) { a.Do(func() { err = cmd.Start() }); return err },
		"ipipd", "up", "--config", in("near.yaml"), "--runtime-dir", in("near"), "--sandbox", "strict")
	pid := awaitProcess(t, k, 1)
	if got := capabilitiesOf(t, pid); got != confined {
		t.Errorf("%s, want %s", got, confined)
	}
	pings := func(address string) {
		t.Helper()
		netlab.Eventually(t, address+" answers", func() bool {
			_, err := a.Try("ping", "-c", "1", "-W", "1", address)
			return err == nil
		})
	}
	ipipd := func(args ...string) (string, error) {
		return a.Try("ipipd", append(args, "--runtime-dir", in("near"))...)
	}
	shows := func(text string) {
		t.Helper()
		netlab.Eventually(t, text+" is shown", func() bool {
			out, err := ipipd("print", "near")
			return err == nil && strings.Contains(out, text)
		})
	}
	pings("10.255.0.2")
	shows("no-new-privs, no capability, ipipd keep does what takes one")

	// To read the rules of a packet filter takes a privilege, too.
	if out, err := ipipd("print", "near"); err == nil && strings.Contains(out, "fast-path: active") {
		if _, err := exec.LookPath("nft"); err == nil {
			a.Run("nft", "add", "table", "ip", "t")
			a.Run("nft", "add chain ip t c { type filter hook input priority 0; policy drop; }")
			shows("fast-path: nftables has rules in chain c of table t")
			a.Run("nft", "delete", "table", "ip", "t")
			shows("fast-path: active")
		}
	}

	if out, err := ipipd("set", "near", "fwmark=7"); err == nil || !strings.Contains(out, "near: fwmark: no tunnel had one when ipipd was started, so that under ipipd keep") {
		t.Errorf("%v: %s", err, out)
	}
	if out, err := ipipd("set", "near", "dscp=46"); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	if out, err := ipipd("set", "near", "address=10.99.0.1/30"); err == nil || !strings.Contains(out, "ipipd keep does for its process only what the configuration says: put it there and reload, or start it with --sandbox off: the address 10.99.0.1/30 of near") {
		t.Errorf("%v: %s", err, out)
	}
	if out := a.Run("ip", "address", "show", "near"); strings.Contains(out, "10.99.0.1") {
		t.Errorf("an address that the configuration does not have: %s", out)
	}
	k.logs(`what the process asks for is not done: its configuration does not name it" what="the address 10.99.0.1/30 of near"`)

	configure("near.yaml", brokerReload)
	if out, err := ipipd("reload"); err != nil {
		t.Fatal(out)
	}
	out := a.Run("ip", "address") + a.Run("ip", "route", "show", "table", "all")
	for _, want := range []string{"10.255.1.1 peer 10.255.1.2/32", "10.20.0.0/16 dev near", "10.30.0.0/16 dev near table 100", "mtu 1300", "altname an encrypted tunnel"} {
		if !strings.Contains(out, want) {
			t.Errorf("%s is missing in\n%s", want, out)
		}
	}
	pings("10.255.0.2")
	pings("10.254.0.2")
	configure("near.yaml", brokerConfig)
	if out, err := ipipd("reload"); err != nil {
		t.Fatal(out)
	}
	if out := a.Run("ip", "address") + a.Run("ip", "route"); strings.Contains(out, "10.255.1.1") || strings.Contains(out, "10.20.0.0") || strings.Contains(out, "encrypted") {
		t.Errorf("it is still there: %s", out)
	}
	a.Run("ip", "link", "delete", "near")
	pings("10.255.0.2") // it is made again
	if got := capabilitiesOf(t, pid); got != confined {
		t.Errorf("%s, want %s", got, confined)
	}
	if strings.Contains(k.log.String(), "is started again") {
		t.Error("the process has died")
	}

	// The next process has none, either.
	_ = unix.Kill(pid, unix.SIGKILL)
	if got := capabilitiesOf(t, awaitNext(t, k)); got != confined {
		t.Errorf("%s, want %s", got, confined)
	}
	pings("10.255.0.2")
	k.signal(unix.SIGTERM)
	k.ends(0)
	netlab.Eventually(t, "the interface is gone", func() bool { _, err := a.Try("ip", "link", "show", "near"); return err != nil })
}

// awaitNext waits until the process that was started last is confined, and returns its PID.
func awaitNext(t *testing.T, k *kept) (pid int) {
	t.Helper()
	netlab.Eventually(t, "the next process is confined", func() bool {
		log := k.log.String()
		_, after, again := strings.Cut(log, "is started again")
		_, after, started := strings.Cut(after, `is started" pid=`)
		digits, _, _ := strings.Cut(after, " ")
		pid, _ = strconv.Atoi(digits)
		return again && started && strings.Contains(after, "tunnel is ready")
	})
	return pid
}

// To mark packets takes NET_RAW, which the process keeps and shows. With --sandbox off it keeps all that it may need.
func TestStartBroker_capabilities(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: network namespaces, /dev/net/tun and raw sockets")
	}
	t.Parallel()
	const netAdmin, netRaw = 1 << unix.CAP_NET_ADMIN, 1 << unix.CAP_NET_RAW
	for name, c := range map[string]struct {
		flags []string
		want  uint64
		says  string
	}{
		"marks":  {[]string{"--fwmark", "7", "--allow-fast-path", "no"}, netRaw, "CAP_NET_RAW stays, ipipd keep does what takes one"},
		"off":    {[]string{"--sandbox", "off"}, netAdmin | netRaw, "CAP_NET_ADMIN, CAP_NET_RAW"},
		"script": {nil, netAdmin | netRaw, "CAP_NET_ADMIN, CAP_NET_RAW"}, // a script's configuration is not known
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a, b := netlab.New(t), netlab.New(t)
			program := "ipipd"
			if name == "script" {
				program = filepath.Join(t.TempDir(), "program")
				if err := os.WriteFile(program, []byte("#!/bin/sh\nshift\nexec ipipd up \"$@\"\n"), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			k := newKeptTunnel(t, a, b, program, append([]string{"--remote-address", "192.0.2.2", "--address", "10.255.0.1/30"}, c.flags...)...)
			pid := k.ready(1)
			k.pings()
			got, err := strconv.ParseUint(strings.TrimPrefix(threadStatus(t, pid, "CapEff"), "CapEff "), 16, 64)
			if err != nil || got&(netAdmin|netRaw) != c.want || name == "marks" && got != c.want {
				t.Errorf("CapEff %x, want %x, %v", got, c.want, err)
			}
			if out := a.Run("ipipd", "print", "near", "--runtime-dir", filepath.Join(k.dir, "near")); !strings.Contains(out, c.says) {
				t.Errorf("%s\nwant %s", out, c.says)
			}
			k.signal(unix.SIGTERM)
			k.ends(0)
		})
	}
}

func TestConfigurationOf(t *testing.T) {
	file := filepath.Join(t.TempDir(), "ipipd.yaml")
	if err := os.WriteFile(file, []byte(brokerConfig), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		command []string
		name    string // of the tunnel; "-": none
	}{
		{[]string{"ipipd", "up", "--remote-address", "192.0.2.1", "--name", "t1"}, "t1"},
		{[]string{"/usr/bin/ipipd", "up", "--config", file}, "near"},
		{[]string{"ipipd", "up", "--config", "-"}, "-"},
		{[]string{"ipipd", "up", "--remote-address", "192.0.2.1", "--an-option-of-a-later-version"}, "-"},
		{[]string{"ipipd", "up", "--help"}, "-"},
		{[]string{"ipipd", "print"}, "-"},
		{[]string{"a-script", "up", "--remote-address", "192.0.2.1"}, "-"},
		{[]string{"ipipd"}, "-"},
		{[]string{"sh", "-c", "ipipd up"}, "-"},
	} {
		read := configurationOf(c.command)
		if read == nil {
			if c.name != "-" {
				t.Errorf("%q: none, want %s", c.command, c.name)
			}
			continue
		}
		configs, err := read()
		if err != nil || len(configs) != 1 || configs[0].Name != c.name {
			t.Errorf("%q: %d tunnels, %v, want %s", c.command, len(configs), err, c.name)
		}
	}
}
