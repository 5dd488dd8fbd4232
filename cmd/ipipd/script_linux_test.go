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

// TestScriptsInANamespace runs testdata/script/root: real tunnels, each script in
// a network namespace of its own, whose only cable goes to far0:
//
//	ipipd ── under0 192.0.2.1/24 ────── far0, which nobody is behind
//
// A script enters it with `nsenter --net=$NS`.
func TestScriptsInANamespace(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: network namespaces, /dev/net/tun and raw sockets")
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skipf("needs a TUN: %v", err)
	}
	for _, tool := range []string{"ip", "nsenter", "setpriv", "unshare"} {
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
			// Nobody answers, and nobody says so: no ICMP error comes of it.
			for _, remote := range []string{"192.0.2.2", "192.0.2.3"} {
				ns.Run("ip", "neighbour", "add", remote, "lladdr", "02:00:00:00:00:02", "dev", "under0")
			}
			testscript.Run(t, scriptParams([]string{"NS=" + ns.Path()}, file))
		})
	}
}
