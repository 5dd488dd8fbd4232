package ipipd

import (
	"go/ast"
	"path"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// rooms says which packages of this module a package may import, tests aside. The
// rooms at the two doors and between them know only the packet, and not each other:
// what happens to a packet is decided in tunnel, and can be read there in one file.
var rooms = map[string][]string{
	"internal/packet": {},
	"internal/ipv4":   {},
	"tun":             {"internal/packet", "internal/ipv4", "internal/door"},
	"encap":           {"internal/packet", "internal/ipv4", "internal/door"},
	"mss":             {"internal/packet", "internal/ipv4"},
	"keepalive":       {"internal/packet", "internal/ipv4"},
	"fastpath":        {},
	"internal/rtnl":   {},
	"ipsec/esp":       {"internal/packet"},
	"ipsec/ike":       {"ipsec/esp"},
	"ipsec":           {"internal/packet", "internal/door", "ipsec/esp", "ipsec/ike"},
}

// owners says which packages alone may import a module that the others are not to
// know of, so that each can be replaced in one place.
var owners = map[string][]string{
	"github.com/songgao/water":       {"tun"},           // the portable device
	"github.com/vishvananda/netlink": {"internal/rtnl"}, // routes, links, addresses
	"github.com/spf13/cobra":         {"cmd/ipipd"},     // flags and completion
	// Programs, maps, tcx; which queue a packet gets; whose programs a frame meets.
	"github.com/cilium/ebpf": {"fastpath", "tun", "internal/rtnl"},
	"filippo.io/bigmod":      {"ipsec/ike"}, // constant-time exponentiation
	// Capabilities of every thread.
	"kernel.org/pub/linux/libs/security/libcap": {"internal/confine"},
}

func TestRoomsImportOnlyWhatTheyMay(t *testing.T) {
	eachImport(t, func(file, imported string) {
		dir := path.Dir(file)
		if allowed, ok := rooms[dir]; ok {
			if inner, ok := strings.CutPrefix(imported, "ipipd/"); ok && !slices.Contains(allowed, inner) {
				t.Errorf("%s imports %s: of this module, %s may import only %q", file, inner, dir, allowed)
			}
		}
		for module, may := range owners {
			if (imported == module || strings.HasPrefix(imported, module+"/")) && !slices.Contains(may, dir) {
				t.Errorf("%s imports %s: only %q may", file, imported, may)
			}
		}
	})
}

func TestWaterIsImportedByOneFile(t *testing.T) {
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
