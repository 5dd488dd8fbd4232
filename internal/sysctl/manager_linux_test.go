package sysctl

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// host is a host's file system with its sysctls, and the runtime-dir of its processes.
type host struct {
	*testing.T
	root, dir string
}

func newHost(t *testing.T, values string) *host {
	h := &host{t, t.TempDir(), t.TempDir()}
	for file, f := range tree(values) {
		to := filepath.Join(h.root, file)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(to, f.Data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return h
}

func (h *host) manager() *Manager { return &Manager{Root: h.root, Dir: h.dir} }

func (h *host) write(file, value string) {
	h.Helper()
	// Without O_TRUNC, as a sysctl is written.
	f, err := os.OpenFile(filepath.Join(h.root, "proc/sys/net/ipv4/conf", file), os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteString(value + "\n")
		f.Close()
	}
	if err != nil {
		h.Fatal(err)
	}
}

// want fails the test unless these are all values that are not 0, and a record is left only if when ends in used.
func (h *host) want(when, values string) {
	h.Helper()
	for file, f := range tree(values) {
		b, err := os.ReadFile(filepath.Join(h.root, file))
		if got, want := strings.TrimSpace(string(b)), strings.TrimSpace(string(f.Data)); err != nil || got != want {
			h.Errorf("%s: %s is %q, want %q (%v)", when, file, got, want, err)
		}
	}
	left, _ := filepath.Glob(filepath.Join(h.dir, "*"))
	if kept := strings.HasSuffix(when, "used"); kept != (len(left) == 1) {
		h.Errorf("%s: the runtime-dir has %v", when, left)
	}
}

func (h *host) set(m *Manager, settings ...Setting) {
	h.Helper()
	if _, err := m.Set(settings); err != nil {
		h.Fatal(err)
	}
}

func (h *host) restore(m *Manager) (back []Setting) {
	h.Helper()
	back, err := m.Restore()
	if err != nil {
		h.Fatal(err)
	}
	return back
}

var (
	ignore   = Setting{File: conf("eth0", "arp_ignore"), Value: 1}
	announce = Setting{File: conf("eth0", "arp_announce"), Value: 2}
)

func TestManager_Restore(t *testing.T) {
	h := newHost(t, "eth0/arp_announce=1")
	m := h.manager()
	if back := h.restore(m); back != nil {
		t.Errorf("nothing was set, and %v is set back", back)
	}
	h.set(m, ignore, announce)
	h.set(m, ignore, announce)
	h.want("used", "eth0/arp_ignore=1 eth0/arp_announce=2")
	if back := h.restore(m); len(back) != 2 {
		t.Errorf("%v is set back, want both", back)
	}
	h.want("at the end", "eth0/arp_announce=1")
	h.set(m, ignore)
	h.want("again used", "eth0/arp_ignore=1 eth0/arp_announce=1")
	h.restore(m)
	h.want("at the second end", "eth0/arp_announce=1")
}

// A value that somebody else has changed meanwhile is neither set again nor set back.
func TestManager_changedByOthers(t *testing.T) {
	h := newHost(t, "")
	m := h.manager()
	h.set(m, ignore, announce)
	h.write("eth0/arp_ignore", "2")
	h.write("eth0/arp_announce", "0")
	h.set(m, announce)
	h.want("used", "eth0/arp_ignore=2")
	h.restore(m)
	h.want("at the end", "eth0/arp_ignore=2")
}

// A value that was as needed before is not set back.
func TestManager_asItIs(t *testing.T) {
	h := newHost(t, "eth0/arp_ignore=1")
	m := h.manager()
	h.set(m, ignore)
	h.restore(m)
	h.want("at the end", "eth0/arp_ignore=1")
}

// Of two processes the last to end sets back, whichever it is.
func TestManager_twoProcesses(t *testing.T) {
	for _, first := range []int{0, 1} {
		h := newHost(t, "")
		both := []*Manager{h.manager(), h.manager()}
		h.set(both[0], ignore)
		h.set(both[1]) // it finds all as it needs it
		h.set(both[0], announce)
		if back := h.restore(both[first]); back != nil {
			t.Errorf("the first one that ends sets back %v", back)
		}
		h.want("one still used", "eth0/arp_ignore=1 eth0/arp_announce=2")
		h.restore(both[1-first])
		h.want("at the end", "")
	}
}

// A process that is killed leaves its record: the next one sets back at its end, or at once if it needs
// nothing.
func TestManager_killed(t *testing.T) {
	h := newHost(t, "")
	m := h.manager()
	h.set(m, ignore, announce)
	m.Leave() // as the kernel closes its files
	h.want("nobody's, but used", "eth0/arp_ignore=1 eth0/arp_announce=2")
	h.write("eth0/arp_announce", "1")
	next := h.manager()
	h.set(next, ignore)
	h.restore(next)
	h.want("after the next", "eth0/arp_announce=1")

	h.set(m, ignore)
	m.Leave()
	if back := h.restore(h.manager()); len(back) != 1 {
		t.Errorf("%v is set back", back)
	}
	h.want("at once", "eth0/arp_announce=1")
}

// Where rp_filter of all is cleared the other interfaces get at least its value. It is set back before theirs.
func TestManager_keepFilters(t *testing.T) {
	h := newHost(t, "all/rp_filter=1 eth0/rp_filter=2")
	m := h.manager()
	s := Server{Interface: "ipip0"}
	h.set(m, s.RPFilter(os.DirFS(h.root)).Settings...)
	h.want("used", "eth0/rp_filter=2 eth0.7/rp_filter=1 default/rp_filter=1")
	if n := s.RPFilter(os.DirFS(h.root)); n != nil {
		t.Errorf("it still needs %v", n)
	}
	back := h.restore(m)
	if len(back) == 0 || back[0].File != allRPFilter {
		t.Errorf("%v is set back, want that of all first", back)
	}
	h.want("at the end", "all/rp_filter=1 eth0/rp_filter=2")
}
