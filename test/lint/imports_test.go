package lint

import (
	"go/ast"
	"path"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// allowedImports has every package of this module that the program is made of, and which
// others of this module it may import, tests aside. What a packet meets on its way (tun,
// encap, mss, keepalive, underlay, ipsec, fastpath) knows the packet and not each other:
// what happens to a packet is decided in tunnel, and can be read there in one file.
var allowedImports = map[string][]string{
	"internal/packet":      {},
	"internal/ipv4":        {},
	"internal/vnet":        {},
	"internal/drop":        {},
	"internal/warning":     {},
	"internal/fdguard":     {"internal/privileged"},
	"internal/privileged":  {},
	"internal/fib":         {"internal/ipv4", "internal/drop"},
	"internal/netstate":    {"internal/ipv4", "internal/fib", "internal/privileged", "internal/warning"},
	"internal/resolve":     {"internal/ipv4"},
	"internal/fastpath":    {"internal/fib", "internal/handover", "internal/privileged"},
	"internal/serviceuser": {},
	"internal/control":     {"internal/serviceuser"},
	"internal/capture":     {"internal/drop"},
	"internal/sandbox":     {},
	"internal/sysctl":      {},
	"internal/handover":    {"internal/privileged"},
	"tun":                  {"internal/packet", "internal/ipv4", "internal/fdguard", "internal/vnet", "internal/privileged", "internal/warning"},
	"encap":                {"internal/packet", "internal/ipv4", "internal/drop"},
	"mss":                  {"internal/ipv4"},
	"keepalive":            {"internal/ipv4"},
	"internal/underlay":    {"internal/packet", "internal/ipv4", "internal/fdguard", "internal/vnet", "internal/privileged"},
	"internal/ipsec/esp":   {"internal/packet", "internal/drop"},
	"internal/ipsec/ike":   {"internal/ipsec/esp"},
	"internal/ipsec":       {"internal/packet", "internal/ipv4", "internal/drop", "internal/fdguard", "internal/handover", "internal/ipsec/esp", "internal/ipsec/ike", "internal/serviceuser", "internal/privileged", "internal/warning"},
	"internal/lab":         {},
	"internal/demo":        {"tun", "internal/lab", "internal/control", "internal/tunnel", "internal/ipv4"},
	"internal/tunnel": {
		"tun", "encap", "mss", "keepalive", "internal/underlay", "internal/fastpath", "internal/netstate",
		"internal/ipsec", "internal/ipsec/ike", "internal/packet", "internal/ipv4", "internal/drop",
		"internal/fdguard", "internal/handover", "internal/resolve", "internal/warning", "internal/capture",
		"internal/fib", "internal/sysctl", "internal/sandbox",
	},
	"internal/broker":     {"internal/tunnel", "internal/netstate", "internal/fastpath", "internal/privileged"},
	"internal/history":    {"internal/drop"},
	"internal/monitor":    {"internal/tunnel", "internal/drop", "internal/history", "internal/warning"},
	"internal/terminal":   {},
	"internal/config":     {"internal/tunnel", "internal/control", "internal/serviceuser"},
	"internal/metrics":    {"internal/tunnel", "internal/drop", "internal/sandbox"},
	"internal/page":       {"internal/tunnel", "internal/drop", "internal/history"},
	"internal/peerconfig": {"internal/tunnel", "internal/config", "internal/netstate", "keepalive"},
	"internal/doctor":     {"tun", "internal/ipsec", "internal/privileged", "internal/tunnel", "internal/sandbox", "internal/netstate", "internal/resolve", "internal/ipv4", "internal/warning", "keepalive"},
	"cmd/ipipd":           {"internal/demo", "internal/serviceuser", "internal/doctor", "internal/config", "internal/peerconfig", "internal/metrics", "internal/page", "internal/monitor", "internal/terminal", "internal/tunnel", "internal/control", "internal/sandbox", "internal/netstate", "internal/drop", "internal/handover", "internal/capture", "internal/broker", "internal/privileged"},
}

// moduleOwners says which packages alone may import a module that the others are not to
// know of, so that each can be replaced in one place.
var moduleOwners = map[string][]string{
	"github.com/songgao/water":       {"tun"},                               // the portable device
	"github.com/vishvananda/netlink": {"internal/netstate", "internal/lab"}, // routes, links, addresses
	"github.com/spf13/cobra":         {"cmd/ipipd"},                         // flags and completion
	// Programs, maps, tcx; which queue a packet gets.
	"github.com/cilium/ebpf": {"internal/fastpath", "tun", "test/scale"},
	"filippo.io/bigmod":      {"internal/ipsec/ike"}, // constant-time exponentiation
	"go.yaml.in/yaml/v4":     {"internal/config"},    // YAML, by its nodes
	"golang.org/x/term":      {"internal/terminal"},  // raw mode, size
	"github.com/prometheus":  {"internal/metrics"},
	// Capabilities of every thread.
	"kernel.org/pub/linux/libs/security/libcap": {"internal/sandbox"},
	"github.com/landlock-lsm/go-landlock":       {"internal/sandbox"}, // files, TCP ports
}

func TestImports(t *testing.T) {
	used := map[string]bool{}
	eachImport(t, func(file, imported string) {
		dir := path.Dir(file)
		for module, may := range moduleOwners {
			if imported == module || strings.HasPrefix(imported, module+"/") {
				used[module+" in "+dir] = true
				if !slices.Contains(may, dir) {
					t.Errorf("%s imports %s: only %q may", file, imported, may)
				}
			}
		}
		inner, ours := strings.CutPrefix(imported, "ipipd/")
		if !ours {
			return
		}
		if program(dir) {
			if allowed, ok := allowedImports[dir]; !ok {
				t.Errorf("%s imports %s: allowedImports does not have %s", file, inner, dir)
			} else if !slices.Contains(allowed, inner) {
				t.Errorf("%s imports %s: of this module, %s may import only %q", file, inner, dir, allowed)
			}
		}
		used[inner+" in "+dir] = true
	})
	for dir, allowed := range allowedImports {
		for _, inner := range allowed {
			if !used[inner+" in "+dir] {
				t.Errorf("%s need not be allowed to import %s: it does not", dir, inner)
			}
		}
	}
	for module, may := range moduleOwners {
		for _, dir := range may {
			if !used[module+" in "+dir] {
				t.Errorf("%s need not be allowed to import %s: it does not", dir, module)
			}
		}
	}
}

// program reports whether a folder is part of what users get, not of its tests and scripts.
func program(dir string) bool {
	return !strings.HasPrefix(dir, "test/") && !strings.HasPrefix(dir, "scripts/")
}

func TestImports_water(t *testing.T) {
	var files []string
	eachImport(t, func(file, imported string) {
		if strings.HasPrefix(imported, "github.com/songgao/water") {
			files = append(files, file)
		}
		// It indexes packets without checking their lengths.
		if imported == "github.com/songgao/water/waterutil" {
			t.Errorf("%s imports waterutil, which panics on short packets", file)
		}
	})
	if len(files) > 1 {
		t.Errorf("water is imported by %q: one file is enough", files)
	}
}

// The laboratory of the tests runs commands and panics where a test would fail.
func TestImports_testCode(t *testing.T) {
	eachImport(t, func(file, imported string) {
		if program(path.Dir(file)) && (strings.HasPrefix(imported, "ipipd/test/") || imported == "testing") {
			t.Errorf("%s imports %s: only tests may", file, imported)
		}
	})
}

// An error is logged once, by the package that decides what to do about it: so only
// these may log.
func TestImports_log(t *testing.T) {
	eachImport(t, func(file, imported string) {
		switch dir := path.Dir(file); {
		case dir == "internal/tunnel", dir == "cmd/ipipd", !program(dir):
			return
		}
		if imported == "log" || imported == "log/slog" {
			t.Errorf("%s imports %s: return the error; tunnel logs it, once", file, imported)
		}
	})
}

// eachImport calls f for each import of each file that is not a test.
func eachImport(t *testing.T, f func(file, imported string)) {
	t.Helper()
	eachFile(t, func(name string, parsed *ast.File, _ int) {
		for _, spec := range parsed.Imports {
			imported, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			f(name, imported)
		}
	})
}
