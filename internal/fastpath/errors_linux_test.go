package fastpath

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"ipipd/test/netlab"
)

// An error says on one line what is missing or in the way.
func TestUnavailable_explanations(t *testing.T) {
	f := open(t)
	for _, x := range []struct {
		when    string
		explain func(error) error
		err     error
		want    string
	}{
		{"load", explainLoad, unix.EPERM, "not permitted"},
		{"load", explainLoad, os.NewSyscallError("bpf", unix.EACCES), "not permitted"},
		{"load", explainLoad, ebpf.ErrNotSupported, "Linux 6.6"},
		{"load", explainLoad, unix.EINVAL, "Linux 6.6"},
		{"load", explainLoad, unix.E2BIG, "Linux 6.6"},
		{"load", explainLoad, unix.ENOSYS, "no eBPF"},
		{"load", explainLoad, unix.ENOMEM, "no memory"},
		{"load", explainLoad, errors.New("anything"), "refuses"},
		{"attach", onLoopback, unix.EPERM, "not permitted"},
		{"attach", onLoopback, ebpf.ErrNotSupported, "no tcx"},
		{"attach", onLoopback, unix.ENODEV, "gone"},
		{"attach", onLoopback, unix.ERANGE, "allows (63)"},
		{"attach", onLoopback, unix.EEXIST, "already"},
		{"attach", onLoopback, unix.EBUSY, "retrying"},
		{"attach", onLoopback, unix.EINVAL, "does not attach"},
		{"map", onMap(f), unix.E2BIG, "4096 tunnels"},
		{"map", onMap(f), unix.EEXIST, "same local and remote address"},
		{"map", onMap(f), unix.ENOMEM, "no memory"},
		{"map", onMap(f), unix.EBUSY, "retrying"},
		{"map", onMap(f), unix.ENOSPC, "refuses a thing"}, // no errno of these maps
	} {
		err := x.explain(x.err)
		var u *Unavailable
		if !errors.As(err, &u) || !errors.Is(err, x.err) || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%s: %v is explained as %q, want something about %q", x.when, x.err, err, x.want)
		}
		if strings.Contains(err.Error(), "\n") {
			t.Errorf("%q has more than a line", err)
		}
	}
}

func onLoopback(err error) error { return explainAttach(loopback, err) }

func onMap(f *FastPath) func(error) error {
	return func(err error) error { return f.explainMap("a thing", err) }
}

// Errors that the kernel itself returns.
func TestAttach_errors(t *testing.T) {
	ns := newDevices(t)
	ns.Do(func() {
		f := open(t)
		one := Tunnel{Ifindex: ifindex(t, "t0"), UnderlayIfindex: ifindex(t, "u0"), Local: local, Remote: remote}
		if _, err := f.Attach(one); err != nil {
			t.Fatal(err)
		}
		fails := func(what string, x Tunnel, want string) {
			t.Helper()
			_, err := f.Attach(x)
			var u *Unavailable
			if !errors.As(err, &u) || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v, want something about %q", what, err, want)
			}
		}
		two := one
		two.Ifindex = ifindex(t, "t1")
		fails("the same addresses", two, "same local and remote address")
		two.Remote, two.UnderlayIfindex = innerB, 9999
		fails("no such underlay", two, "gone")
		two.UnderlayIfindex = one.UnderlayIfindex
		nextSlot := f.nextSlot
		f.nextSlot, f.freeSlots = f.objects.Counters.MaxEntries(), nil
		fails("no slot is left", two, "4096 tunnels")
		f.nextSlot, f.freeSlots = nextSlot, nil
		if _, err := f.Attach(two); err != nil {
			t.Error(err)
		}
	})
}

// attachForeign attaches n programs of other software, which pass all packets, to the tcx ingress
// of a device. pop detaches the last of them.
func attachForeign(t *testing.T, n, device int) (pop func()) {
	t.Helper()
	program, links := newForeign(t), []link.Link(nil)
	t.Cleanup(func() {
		for _, l := range links {
			l.Close()
		}
	})
	for range n {
		// The same program cannot be attached twice.
		l, err := link.AttachTCX(link.TCXOptions{Interface: device, Program: program(), Attach: ebpf.AttachTCXIngress})
		if err != nil {
			t.Fatalf("program %d: %v", len(links), err)
		}
		links = append(links, l)
	}
	return func() {
		links[len(links)-1].Close()
		links = links[:len(links)-1]
	}
}

func newForeign(t *testing.T) func() *ebpf.Program {
	return func() *ebpf.Program {
		t.Helper()
		p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Name: "dummy", Type: ebpf.SchedCLS, License: "MIT",
			Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, next), asm.Return()},
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { p.Close() })
		return p
	}
}

// The kernel accepts 63 programs on the ingress of a device, and each ipipd process attaches
// one: some are reserved for other software.
func TestAttach_reservedPrograms(t *testing.T) {
	ns := newDevices(t)
	ns.Do(func() {
		f := open(t)
		one := Tunnel{Ifindex: ifindex(t, "t0"), UnderlayIfindex: ifindex(t, "u0"), Local: local, Remote: remote}
		pop := attachForeign(t, maxPrograms-reservedPrograms, one.UnderlayIfindex)
		_, err := f.Attach(one)
		var u *Unavailable
		if !errors.As(err, &u) {
			t.Fatalf("with %d programs there: %v", maxPrograms-reservedPrograms, err)
		}
		for _, want := range []string{"47 eBPF programs are attached to u0", "allows 63", "16 are left"} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%q does not say %q", err, want)
			}
		}
		attachForeign(t, reservedPrograms, one.UnderlayIfindex) // the software that they are reserved for
		if _, err := link.AttachTCX(link.TCXOptions{Interface: one.UnderlayIfindex, Program: newForeign(t)(), Attach: ebpf.AttachTCXIngress}); !errors.Is(err, unix.ERANGE) {
			t.Errorf("a program more than the kernel is thought to take: %v", err)
		}
		pop()
		if _, err := f.Attach(one); !errors.As(err, &u) {
			t.Errorf("with %d programs there: %v", maxPrograms-1, err)
		}
	})
	ns.Do(func() {
		f := open(t)
		one := Tunnel{Ifindex: ifindex(t, "t0"), UnderlayIfindex: ifindex(t, "u1"), Local: local, Remote: remote}
		attachForeign(t, maxPrograms-reservedPrograms-1, one.UnderlayIfindex)
		if _, err := f.Attach(one); err != nil {
			t.Errorf("with %d programs there: %v", maxPrograms-reservedPrograms-1, err)
		}
	})
}

// While the chain is full the status says so; the tunnel attaches when it no longer is.
func TestAttach_chainFullInStatus(t *testing.T) {
	a, b := netlab.New(t), netlab.New(t)
	netlab.Veth(t, a, b, netlab.End{Name: "veth0", Address: "192.0.2.1/24"}, netlab.End{Name: "veth0", Address: "192.0.2.2/24"})
	var pop func()
	a.Do(func() {
		open(t) // skips without a fast path
		pop = attachForeign(t, maxPrograms-reservedPrograms, ifindex(t, "veth0"))
	})
	d := netlab.Up(t, a, "t0", "--remote-address", "192.0.2.2", "--keepalive", "off")
	if s := d.Status(); !strings.Contains(s.FastPath, "47 eBPF programs are attached to veth0") {
		t.Errorf("print says %q", s.FastPath)
	}
	pop()
	netlab.Eventually(t, "the fast path is taken", func() bool { return d.Status().FastPath == "active" })
}
