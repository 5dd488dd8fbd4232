package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"ipipd/internal/tunnel"
)

// The table of tunnels counts many remotes, and print NAME lists those that there is room for.
func TestRemotesTable(t *testing.T) {
	now := time.Date(2025, 1, 2, 3, 4, 5, 0, time.Local)
	s := exampleStatus("tunl0", "any", "local-address", "192.0.2.1", "peers", "10.20.0.0/16=198.51.100.7")
	s.CurrentRemoteAddress, s.PathMTU = tunnel.AnyRemote, 0
	s.Remotes = &tunnel.Remotes{Count: 1000, NotOK: 1, Prefixes: 10000, List: []tunnel.Remote{
		{Address: "198.51.100.9", Prefixes: 1, State: tunnel.RemoteUnreachable, PathMTU: 1400},
		{Address: "198.51.100.7", Prefixes: 12, State: tunnel.RemoteOK, PathMTU: 1500, LastHeard: now.Add(-3 * time.Second)},
		{Address: "198.51.100.10", Prefixes: 1, State: tunnel.RemoteNoPath},
	}}
	var table, detail bytes.Buffer
	if err := printTable(&table, []tunnel.Status{s}); err != nil {
		t.Fatal(err)
	}
	golden(t, `
Flags: X - disabled, R - running
#    NAME   MTU   LOCAL-ADDRESS  REMOTE-ADDRESS
0 R  tunl0  1480  192.0.2.1      any (1000 remotes, 1 not ok)
`, table.String())
	if err := printDetail(&detail, &s, now); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"current-remote-address: any\n               remotes: 1000 remotes, 1 not ok\n              prefixes: 10000\n",
		`

REMOTE         PREFIXES  STATE        PATH-MTU  LAST-HEARD
198.51.100.9   1         unreachable  1400      never
198.51.100.7   12        ok           1500      3s ago
198.51.100.10  1         no-path      -         never
and 997 more: ipipd print --remotes tunl0
`} {
		if !strings.Contains(detail.String(), want) {
			t.Errorf("no %q in\n%s", want, &detail)
		}
	}
}

// Without a local address for all remotes the table has the local address of each remote that has one.
func TestRemotesTable_anyLocal(t *testing.T) {
	golden(t, `
REMOTE         LOCAL-ADDRESS  PREFIXES  STATE    PATH-MTU  LAST-HEARD
198.51.100.7   198.51.100.1   12        ok       1500      never
198.51.100.10  -              1         no-path  -         never
`, remotesTable(&tunnel.Remotes{List: []tunnel.Remote{
		{Address: "198.51.100.7", LocalAddress: "198.51.100.1", Prefixes: 12, State: tunnel.RemoteOK, PathMTU: 1500},
		{Address: "198.51.100.10", Prefixes: 1, State: tunnel.RemoteNoPath},
	}}, time.Now()))
}
