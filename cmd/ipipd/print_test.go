package main

import (
	"bytes"
	"context"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"ipipd/internal/control"
	"ipipd/internal/tunnel"
)

// exampleStatus returns a status, with property names and values in set.
func exampleStatus(name, remote string, set ...string) tunnel.Status {
	c := tunnel.Default()
	c.Name, c.RemoteAddress = name, remote
	for i := 0; i < len(set); i += 2 {
		for _, p := range tunnel.Properties() {
			if p.Name == set[i] {
				if err := p.Set(&c, set[i+1]); err != nil {
					panic(err)
				}
			}
		}
	}
	s := tunnel.NewStatus(&c)
	// Later properties are not in the golden outputs.
	s.Settings = slices.DeleteFunc(s.Settings, func(v tunnel.Setting) bool { return !slices.Contains(goldenSettings, v.Name) })
	s.Running, s.ActualMTU = true, 1480
	s.CurrentLocalAddress, s.CurrentRemoteAddress, s.KeepaliveState = "192.0.2.1", "198.51.100.1", "up"
	return s
}

var goldenSettings = []string{
	"name", "comment", "local-address", "remote-address", "mtu", "dscp", "dont-fragment", "clamp-tcp-mss", "keepalive",
	"keepalive-probe", "keepalive-target", "ttl", "address", "route", "underlay-device", "fwmark", "tun-queues", "rps",
}

func golden(t *testing.T, want, got string) {
	t.Helper()
	if d := cmp.Diff(strings.TrimPrefix(want, "\n"), got); d != "" {
		t.Error(d)
	}
}

// The table has the format of RouterOS's print.
func TestPrintTable(t *testing.T) {
	down := exampleStatus("tunnel-to-riga", "r2.example", "local-address", "203.0.113.200", "comment", "for emergencies")
	down.Running, down.ActualMTU = false, 1400
	off := exampleStatus("ipip3", "198.51.100.3")
	off.Running, off.Disabled = false, true
	var b bytes.Buffer
	if err := printTable(&b, []tunnel.Status{exampleStatus("ipip1", "198.51.100.1"), off, down}); err != nil {
		t.Fatal(err)
	}
	golden(t, `
Flags: X - disabled, R - running
#    NAME            MTU   LOCAL-ADDRESS  REMOTE-ADDRESS
0 R  ipip1           1480  192.0.2.1      198.51.100.1
1 X  ipip3           1480  192.0.2.1      198.51.100.3
;;; for emergencies
2    tunnel-to-riga  1400  203.0.113.200  r2.example
`, b.String())
}

func TestPrintTable_alignsNumbers(t *testing.T) {
	var b bytes.Buffer
	printTable(&b, slices.Repeat([]tunnel.Status{exampleStatus("t", "198.51.100.1")}, 11))
	lines := strings.Split(b.String(), "\n")
	golden(t, ` 0 R  t     1480  192.0.2.1      198.51.100.1`, lines[2])
	golden(t, `10 R  t     1480  192.0.2.1      198.51.100.1`, lines[12])
}

func TestPrintDetail(t *testing.T) {
	s := exampleStatus("ipip1", "r2.example", "address", "10.255.0.1/30", "address", "10.1.0.1/24", "comment", "to Riga")
	s.RxPacket, s.RxByte, s.TxPacket, s.TxByte = 12, 1008, 13, 1092
	s.LastHeard = time.Date(2025, 1, 2, 3, 4, 5, 0, time.Local)
	s.Drops = map[string]uint64{"loop": 1, "inner-ttl-zero": 12}
	s.ProcessDrops = map[string]uint64{"unknown-peer": 3}
	s.Restored = map[string]uint64{"route": 2}
	s.Warnings = []tunnel.Warning{
		{Code: "peer-mtu", Severity: "warning", Text: "it is longer: it matters", Detail: "1500\n\x1b[2J", Remedy: "shorten it", Since: s.LastHeard.Add(-time.Minute)},
		{Code: "fragments", Severity: "note", Text: "there are some", Remedy: "none needed", Since: s.LastHeard},
	}
	var b bytes.Buffer
	if err := printDetail(&b, &s, s.LastHeard.Add(4*time.Second+999*time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	golden(t, `
                  name: ipip1
               comment: to Riga
         local-address:
        remote-address: r2.example
                   mtu: auto
                  dscp: inherit
         dont-fragment: no
         clamp-tcp-mss: yes
             keepalive: 10s,10
       keepalive-probe: reflect
      keepalive-target:
                   ttl: 255
               address: 10.255.0.1/30,10.1.0.1/24
                 route:
       underlay-device:
                fwmark: 0
            tun-queues: auto
                   rps: off
              disabled: no
               running: yes
               warning: peer-mtu (warning, for 1m4s): it is longer: it matters: 1500; ?[2J; remedy: shorten it
               warning: fragments (note, for 4s): there are some; remedy: none needed
            actual-mtu: 1480
 current-local-address: 192.0.2.1
current-remote-address: 198.51.100.1
       keepalive-state: up
            last-heard: 2025-01-02 03:04:05 (4s ago)
             rx-packet: 12
               rx-byte: 1008
             tx-packet: 13
               tx-byte: 1092
                 drops: inner-ttl-zero=12,loop=1
              restored: route=2
         process-drops: unknown-peer=3
        inner-ttl-zero: TTL 0 is never encapsulated (RFC 2003, 3.1); remedy: look for a routing loop
                  loop: an outer packet of the tunnel was routed into it, or one that came from its remote end (RFC 2003, 3.2); remedy: give the remote a route that does not go through the tunnel, or `+"`--underlay-device`"+`
          unknown-peer: no tunnel of this process has these outer addresses (RFC 2003, 6.2); remedy: compare local and remote address of both ends. It is counted where a process has several tunnels; with one the kernel answers such a packet with ICMP protocol unreachable and counts it: `+"`nstat -az IpInUnknownProtos`"+`
`, b.String())
}

func TestPrintJSON(t *testing.T) {
	var b bytes.Buffer
	if err := printJSON[tunnel.Status](&b, nil); err != nil {
		t.Fatal(err)
	}
	golden(t, "[]\n", b.String())
	b.Reset()
	if err := printJSON(&b, []tunnel.Status{exampleStatus("ipip1", "198.51.100.1")}); err != nil {
		t.Fatal(err)
	}
	golden(t, `
[
  {
    "name": "ipip1",
    "comment": "",
    "local-address": "",
    "remote-address": "198.51.100.1",
    "mtu": "auto",
    "dscp": "inherit",
    "dont-fragment": "no",
    "clamp-tcp-mss": "yes",
    "keepalive": "10s,10",
    "keepalive-probe": "reflect",
    "keepalive-target": "",
    "ttl": "255",
    "address": [],
    "route": [],
    "underlay-device": "",
    "fwmark": "0",
    "tun-queues": "auto",
    "rps": "off",
    "disabled": false,
    "running": true,
    "warnings": [],
    "actual-mtu": 1480,
    "current-local-address": "192.0.2.1",
    "current-remote-address": "198.51.100.1",
    "keepalive-state": "up",
    "rx-packet": 0,
    "rx-byte": 0,
    "tx-packet": 0,
    "tx-byte": 0,
    "drops": {},
    "process-drops": {}
  }
]
`, b.String())
}

// command runs the program.
func command(args ...string) (status int, stdout, stderr string) {
	var out, errs bytes.Buffer
	status = run(context.Background(), args, &streams{&out, &errs})
	return status, out.String(), errs.String()
}

// serveStatus serves s on a control socket in dir.
func serveStatus(t *testing.T, dir string, s tunnel.Status) {
	t.Helper()
	server, err := control.Listen(t.Context(), dir, s.Name())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	go server.Serve(control.Handler{
		Status: func(name string) (any, error) {
			if name == "" {
				return []tunnel.Status{s}, nil
			}
			return s, nil
		},
		Down: func(string) { go server.Close() },
	})
}

// shortDir returns a directory with a path short enough for sockets in it (sun_path).
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ipipd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func TestPrintRun_noTunnels(t *testing.T) {
	dir := filepath.Join(shortDir(t), "none")
	status, out, errs := command("print", "--runtime-dir", dir)
	golden(t, `
Flags: X - disabled, R - running
#  NAME  MTU  LOCAL-ADDRESS  REMOTE-ADDRESS
`, out)
	if status != 0 || errs != "" {
		t.Errorf("status %d, %q", status, errs)
	}
	if status, out, errs := command("print", "--json", "--runtime-dir", dir); status != 0 || out != "[]\n" || errs != "" {
		t.Errorf("--json: status %d, %q, %q", status, out, errs)
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("print made the folder")
	}
}

// Exit status 1 and one line on standard error.
func TestPrintRun_noSuchTunnel(t *testing.T) {
	dir := shortDir(t)
	for _, args := range [][]string{{"print", "NOSUCH"}, {"print", "NOSUCH", "--json"}, {"down", "NOSUCH"}} {
		status, out, errs := command(append(args, "--runtime-dir", dir)...)
		if want := "ipipd: no tunnel named NOSUCH in " + dir + ": ipipd print lists those there are\n"; status != 1 || out != "" || errs != want {
			t.Errorf("%q: status %d, %q, %q", args, status, out, errs)
		}
	}
}

func TestPrintRun_notADirectory(t *testing.T) {
	file := filepath.Join(shortDir(t), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"print"}, {"print", "--json"}, {"print", "t-one"}, {"down", "t-one"}} {
		status, out, errs := command(append(args, "--runtime-dir", file)...)
		if status != 1 || out != "" || strings.Count(errs, "\n") != 1 || !strings.HasSuffix(errs, ": not a directory: give the folder that ipipd up has as its --runtime-dir\n") {
			t.Errorf("%q: status %d, %q, %q", args, status, out, errs)
		}
	}
}

// The output is sorted by name and number; stale sockets are removed.
func TestPrintRun_sortedWithoutStale(t *testing.T) {
	dir := shortDir(t)
	for _, name := range []string{"ipip10", "ipip2", "a"} {
		serveStatus(t, dir, exampleStatus(name, "198.51.100.1"))
	}
	stale := filepath.Join(dir, "stale.sock")
	l, err := net.Listen("unix", stale)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	status, out, errs := command("print", "--runtime-dir", dir)
	golden(t, `
Flags: X - disabled, R - running
#    NAME    MTU   LOCAL-ADDRESS  REMOTE-ADDRESS
0 R  a       1480  192.0.2.1      198.51.100.1
1 R  ipip2   1480  192.0.2.1      198.51.100.1
2 R  ipip10  1480  192.0.2.1      198.51.100.1
`, out)
	if status != 0 || errs != "" {
		t.Errorf("status %d, %q", status, errs)
	}
	if _, err := os.Lstat(stale); !os.IsNotExist(err) {
		t.Errorf("the stale socket is still there: %v", err)
	}
}

// A hung tunnel is an error, and the other tunnels are printed.
func TestPrintRun_hungTunnel(t *testing.T) {
	dir := shortDir(t)
	serveStatus(t, dir, exampleStatus("ipip1", "198.51.100.1"))
	hung, err := control.Listen(t.Context(), dir, "ipip2") // and never Serve
	if err != nil {
		t.Fatal(err)
	}
	defer hung.Close()
	status, out, errs := command("print", "--runtime-dir", dir)
	if !strings.Contains(out, "0 R  ipip1") || strings.Contains(out, "ipip2") {
		t.Errorf("standard output: %s", out)
	}
	const want = "ipipd: ipip2 does not answer within 2s: its process is stopped or hung: end it with kill -9, and ipipd up takes its place\n"
	if status != 1 || errs != want {
		t.Errorf("status %d, %q, want %q", status, errs, want)
	}
}

func TestDownRun(t *testing.T) {
	dir := shortDir(t)
	serveStatus(t, dir, exampleStatus("ipip1", "198.51.100.1"))
	if status, out, errs := command("down", "ipip1", "--runtime-dir", dir); status != 0 || out != "" || errs != "" {
		t.Errorf("status %d, %q, %q", status, out, errs)
	}
	if status, _, _ := command("print", "ipip1", "--runtime-dir", dir); status != 1 {
		t.Errorf("it is still there")
	}
}

func TestProgressReporter(t *testing.T) {
	var b bytes.Buffer
	waiting := progressReporter(&b, "ipip1")
	for waited := time.Duration(0); waited < downTimeout/2; waited += 20 * time.Millisecond {
		waiting(waited)
	}
	golden(t, `
ipipd: waiting for the process of ipip1 to remove its interface: 3s of 1m0s
ipipd: waiting for the process of ipip1 to remove its interface: 13s of 1m0s
ipipd: waiting for the process of ipip1 to remove its interface: 23s of 1m0s
`, b.String())
}

func TestRun_wrongArguments(t *testing.T) {
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"print", "a/b"}, `ipipd print: NAME "a/b" is not accepted: want 1 to 127 bytes of text on one line, without / `},
		{[]string{"print", "a", "b"}, `ipipd print: unexpected argument "b": want one NAME at most`},
		{[]string{"print", "--json=maybe"}, `ipipd: --json: "maybe" is not accepted: want true or false`},
		{[]string{"print", "--jsno"}, `ipipd: --jsno: unknown flag: ipipd print takes --json --remotes --runtime-dir`},
		{[]string{"down"}, `ipipd down: no NAME given: want the name of a tunnel`},
		{[]string{"down", "a", "../x"}, `ipipd down: NAME "../x" is not accepted`},
		{[]string{"down", "../x"}, `ipipd down: NAME "../x" is not accepted`},
		{[]string{"check"}, `ipipd check: no FILE given: want a configuration`},
		{[]string{"schema", "x"}, `ipipd schema: unexpected argument "x"`},
		{[]string{"version", "x"}, `ipipd version: unexpected argument "x"`},
		{[]string{"frob"}, `ipipd: "frob" is not a command: want add, bugreport, capture, check, completion, `},
		{[]string{"help", "frob"}, `ipipd: "frob" is not a command: want add, bugreport, capture, check, completion, `},
		{[]string{"completion", "tcsh"}, `ipipd completion: "tcsh" is not a command: want bash, fish, powershell, zsh`},
		{[]string{"completion", "bash", "x"}, `ipipd: unknown command "x" for "ipipd completion bash"`},
		{[]string{"--mtu", "5"}, `ipipd: --mtu: unknown flag`},
	} {
		status, out, errs := command(tt.args...)
		if status != 2 || out != "" || !strings.HasPrefix(errs, tt.want) || strings.Count(errs, "\n") != 1 {
			t.Errorf("%q: status %d, %q, %q", tt.args, status, out, errs)
		}
	}
}

func TestPrintDetail_candidate(t *testing.T) {
	s := exampleStatus("ipip1", "r2.example")
	s.CandidateRemoteAddress = "198.51.100.9"
	var b bytes.Buffer
	if err := printDetail(&b, &s, time.Now()); err != nil {
		t.Fatal(err)
	}
	if want := "  current-remote-address: 198.51.100.1\ncandidate-remote-address: 198.51.100.9\n"; !strings.Contains(b.String(), want) {
		t.Errorf("got\n%swant in it\n%s", b.String(), want)
	}
}
