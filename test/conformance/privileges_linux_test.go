package conformance

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ipipd/test/netlab"
)

// checkCapabilities checks that no thread of a daemon has, or can regain, more capabilities
// than a tunnel needs, and that each has a list of system calls.
func checkCapabilities(t *testing.T, d *netlab.Daemon) {
	t.Helper()
	const kept = 1<<unix.CAP_NET_ADMIN | 1<<unix.CAP_NET_RAW | 1<<unix.CAP_NET_BIND_SERVICE | 1<<unix.CAP_BPF
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", d.PID()))
	if err != nil || len(files) < 4 {
		t.Fatalf("threads: %v, %v", files, err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if os.IsNotExist(err) {
			continue // it has ended
		}
		if err != nil {
			t.Fatal(err)
		}
		found := 0
		for line := range strings.Lines(string(text)) {
			name, value, _ := strings.Cut(strings.TrimSpace(line), ":\t")
			want, ok := map[string]uint64{"NoNewPrivs": 1, "CapEff": kept, "CapPrm": kept, "CapBnd": kept, "CapInh": 0, "CapAmb": 0, "Seccomp": 2}[name]
			if !ok {
				continue
			}
			found++
			if got, err := strconv.ParseUint(value, 16, 64); err != nil || got&^want != 0 || (name == "NoNewPrivs" || name == "Seccomp") && got != want {
				t.Errorf("%s: %s is %s, want %x", file, name, value, want)
			}
		}
		if found != 7 {
			t.Errorf("%s has %d of the seven lines", file, found)
		}
	}
}

// The capabilities that a tunnel keeps suffice later: to load eBPF programs, attach them to
// another underlay, detach them, and open sockets.
func TestPrivileges(t *testing.T) {
	t.Parallel()
	t.Run("fast-path-on-another-underlay", func(t *testing.T) {
		t.Parallel()
		a, b := twoWires(t)
		sinkIPIP(t, b)
		wire1 := outgoing(t, a, "veth1")
		d := fast.up(t, a, "--local-address", loopbackA, "--remote-address", loopbackB, "--address", innerA+"/24")
		requireFastPath(t, d)
		checkCapabilities(t, d)
		a.Run("ip", "route", "replace", loopbackB, "via", wire1B, "src", loopbackA)
		into, id := newInjector(t, a, "t0", nil, ""), uint16(0)
		netlab.Eventually(t, "packets take the new route", func() bool {
			id++
			into.send(datagram(aToB(id), 100))
			return len(wire1.Matching(netlab.Protocol(4))) > 0
		})
		netlab.Eventually(t, "the fast path is active there", func() bool { return d.Status().FastPath == "active" })
		checkCapabilities(t, d)
	})
	t.Run("fast-path-loaded-late", func(t *testing.T) {
		t.Parallel()
		a, b := hosts(t)
		fast.upB(t, b)
		if out, err := a.Try("nft", "add table ip test; add chain ip test stop { type filter hook input priority 0 ; } ; add rule ip test stop ip protocol 4 accept"); err != nil {
			t.Skipf("needs nft: %v, %s", err, out)
		}
		d := fast.upA(t, a)
		if s := d.Status().FastPath; s == "active" {
			t.Fatal("the fast path goes past a rule")
		}
		checkCapabilities(t, d)
		a.Run("nft", "delete table ip test")
		netlab.Eventually(t, "the programs are loaded", func() bool { return d.Status().FastPath == "active" })
		ping(t, a, innerB)
	})
	t.Run("ipsec-on-another-address", func(t *testing.T) {
		t.Parallel()
		a, b := hosts(t)
		file := secretFile(t, secret)
		da := netlab.Up(t, a, "t0", "--remote-address", outerB, "--address", innerA+"/24", "--ipsec-secret-file", file)
		checkCapabilities(t, da)
		a.Run("ip", "addr", "add", "192.0.2.7/24", "dev", "veth0")
		a.Run("ip", "route", "change", "192.0.2.0/24", "dev", "veth0", "src", "192.0.2.7")
		netlab.Eventually(t, "the new address is used", func() bool { return da.Status().CurrentLocalAddress == "192.0.2.7" })
		db := netlab.Up(t, b, "t0", "--local-address", outerB, "--remote-address", "192.0.2.7", "--address", innerB+"/24", "--ipsec-secret-file", file)
		awaitRunning(t, da, db)
		ping(t, a, innerB)
		checkCapabilities(t, da)
		checkCapabilities(t, db)
	})
}
