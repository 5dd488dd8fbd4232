package doctor

import (
	"os/exec"
	"slices"
	"strings"
	"testing"

	"ipipd/keepalive"
)

// Each code is named where it is the case, with what mends it, and nothing else is.
func TestExamine_broken(t *testing.T) {
	for _, tool := range []string{"nft", "iptables-nft"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s", tool)
		}
	}
	for _, b := range brokens {
		t.Run(b.name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			b.by(l)
			r := l.examine()
			got := codes(r)
			if len(got) != len(b.want) || slices.ContainsFunc(b.want, func(c Code) bool { return !slices.Contains(got, c) }) {
				t.Fatalf("%q is named, want %q: %+v, skipped %+v", got, b.want, r.Findings, r.Skipped)
			}
			f := r.Findings[slices.Index(got, b.want[0])]
			if !strings.Contains(f.What+";"+f.Why+";"+f.Do, b.says) {
				t.Errorf("%+v does not say %q", f, b.says)
			}
			if f.What == "" || f.Why == "" || f.Do == "" {
				t.Errorf("%+v lacks something", f)
			}
		})
	}
}

// TestCodes: brokens has each code. The command has the one about a process.
func TestCodes(t *testing.T) {
	seen := map[Code]bool{ProcessSilent: true}
	for _, b := range brokens {
		for _, c := range b.want {
			seen[c] = true
		}
	}
	for _, c := range Codes {
		if !seen[c.Code] {
			t.Errorf("no test sees %s named", c.Code)
		}
	}
}

// Nothing is named where all is well, whether the tunnel runs or not, and nothing is skipped that need not be.
func TestExamine_healthy(t *testing.T) {
	l := newLab(t)
	l.upThere()
	r := l.examine()
	if len(r.Findings) != 0 || r.Status() != 0 || len(r.Skipped) != 1 || r.Skipped[0].Check != "managers" {
		t.Errorf("not running: %+v", r)
	}
	l.up(state(keepalive.Up), "--keepalive", "1s,10")
	r = l.examine()
	if len(r.Findings) != 0 || r.Status() != 0 || len(r.Skipped) != 0 {
		t.Errorf("running: %+v", r)
	}
}

// A peer that reflects no probe, as Linux, is found to take protocol 4 by a ping of its inner address.
func TestExamine_linuxPeer(t *testing.T) {
	l := newLab(t)
	l.upThere()
	l.there.Run("nft", "table inet x { chain y { type filter hook prerouting priority 0; ip protocol 4 ip length 40 drop; }; }")
	if r := l.examine(); len(r.Findings) != 0 {
		t.Errorf("%+v", r)
	}
	l.config.Addresses = nil
	if got := codes(l.examine()); !slices.Equal(got, []Code{Protocol4Unanswered}) {
		t.Errorf("without an inner address to ping %q is named", got)
	}
}
