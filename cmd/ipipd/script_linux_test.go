package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"ipipd/test/netlab"
)

// The scripts of testdata/script/root start real tunnels. Each has its own network
// namespace, with a veth pair whose other end, far0, has no host:
//
//	ipipd ── under0 192.0.2.1/24 ────── far0
//
// A script enters the namespace with `nsenter --net=$NS`.
func TestRun_scriptsInNamespace(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: network namespaces, /dev/net/tun and raw sockets")
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skipf("needs a TUN: %v", err)
	}
	for _, tool := range []string{"ip", "nsenter", "prlimit", "setpriv", "unshare"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s (iproute2, util-linux)", tool)
		}
	}
	files, err := filepath.Glob("testdata/script/root/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatal("no scripts")
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			ns := netlab.New(t)
			ns.Run("ip", "link", "add", "under0", "type", "veth", "peer", "name", "far0")
			ns.Run("ip", "address", "add", "192.0.2.1/24", "dev", "under0")
			ns.Run("ip", "link", "set", "under0", "up")
			ns.Run("ip", "link", "set", "far0", "up")
			// Static neighbours, so that no ICMP host unreachable comes back.
			for _, remote := range []string{"192.0.2.2", "192.0.2.3"} {
				ns.Run("ip", "neighbour", "add", remote, "lladdr", "02:00:00:00:00:02", "dev", "under0")
			}
			testscript.Run(t, scriptParams([]string{"NS=" + ns.Path()}, file))
		})
	}
}
