package netstate

import (
	"errors"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"ipipd/test/netlab"
)

// loadProgram loads a program that does nothing, until the test ends.
func loadProgram(t *testing.T) Program {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "nothing", Type: ebpf.SchedCLS, License: "MIT",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()},
	})
	if err != nil {
		t.Skipf("cannot load a program: %v", err)
	}
	t.Cleanup(func() { p.Close() })
	info, err := p.Info()
	if err != nil {
		t.Fatal(err)
	}
	id, _ := info.ID()
	return Program{FD: p.FD(), ID: uint32(id), Name: "nothing"}
}

// attachLab is a tunnelLab with a Follower whose interface is tun0.
func attachLab(t *testing.T) (l lab, f *counted, p Program) {
	t.Helper()
	l, p = tunnelLab(t), loadProgram(t)
	try(t, l.host, "tc qdisc add dev tun0 clsact; tc qdisc del dev tun0 clsact")
	f = follow(t, openHost(t, l.host), l.host, Query{Remote: far, Interface: index(t, l.host, "tun0")})
	if f.Answer().Attached {
		t.Fatal("attached from the start")
	}
	return l, f, p
}

// mustAttach calls Attach. The Answer takes it into account at once.
func mustAttach(t *testing.T, f *counted, p Program) {
	t.Helper()
	if err := f.Attach(p); err != nil {
		t.Fatal(err)
	}
	if a := f.Answer(); !a.Clsact || !a.Attached || a.Egress != "" {
		t.Fatalf("attached, and the Answer is %+v", a)
	}
}

// Answer.Attached tells whether an attached program still runs, whatever is done with tc.
func TestFollowerAttach(t *testing.T) {
	const all = " protocol ip u32 match u32 0 0"
	for _, c := range []struct {
		name, commands string
		stays          bool
	}{
		{"the clsact is removed", "tc qdisc del dev tun0 clsact", false},
		{"all filters are removed", "tc filter del dev tun0 egress", false},
		{"another program is in its place", "tc filter replace dev tun0 egress pref 65535 protocol ip handle 1 bpf da bytecode '1,6 0 0 4294967295,'", false},
		{"ingress is in its place", "tc qdisc del dev tun0 clsact; tc qdisc add dev tun0 ingress; tc filter add dev tun0 ingress" + all, false},
		{"the interface is deleted", "ip link del tun0", false},
		{"a filter before it", "tc filter add dev tun0 egress" + all, true},
		{"that is removed", "tc filter add dev tun0 egress pref 7" + all + "; tc filter del dev tun0 egress pref 7", true},
		{"a filter on ingress", "tc filter add dev tun0 ingress" + all, true},
		{"clsact once more", "tc qdisc replace dev tun0 clsact", true},
		{"a root queueing discipline that was removed", "tc qdisc add dev tun0 root pfifo; tc qdisc del dev tun0 root", true},
		{"the interface was down", "ip link set tun0 down; ip link set tun0 up", true},
		{"it is renamed", "ip link set tun0 down; ip link set tun0 name vpn0; ip link set vpn0 up", true},
		{"it has another MTU", "ip link set tun0 mtu 1300", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			l, f, p := attachLab(t)
			mustAttach(t, f, p)
			mustAttach(t, f, p)
			settle(t, f.host)
			calls := f.calls.Load()
			try(t, l.host, c.commands)
			if !c.stays {
				eventually(t, "it is seen", func() bool { return !f.Answer().Attached && f.calls.Load() > calls })
			}
			settle(t, f.host)
			if a := f.Answer(); a.Attached != c.stays || c.stays && a.Egress != "" {
				t.Errorf("%+v", a)
			}
		})
	}
}

// An interface that moves away and back has lost its program, and can be given it again.
func TestFollowerAttach_moved(t *testing.T) {
	l, f, p := attachLab(t)
	mustAttach(t, f, p)
	l.host.Run("ip", "link", "set", "tun0", "netns", l.router.Path())
	eventually(t, "it is seen", func() bool { return !f.Answer().Attached })
	if err := f.Attach(p); !errors.Is(err, unix.ENODEV) {
		t.Errorf("Attach while it is away: %v", err)
	}
	l.router.Run("ip", "link", "set", "tun0", "netns", l.host.Path())
	f.Set(Query{Remote: far, Interface: index(t, l.host, "tun0")})
	mustAttach(t, f, p)
}

// The program is the last one on egress, in whatever order filters are added.
func TestFollowerAttach_last(t *testing.T) {
	l, f, p := attachLab(t)
	try(t, l.host, "tc qdisc add dev tun0 clsact; tc filter add dev tun0 egress protocol ip u32 match u32 0 0")
	mustAttach(t, f, p)
	l.host.Run("tc", "filter", "add", "dev", "tun0", "egress", "protocol", "ip", "u32", "match", "u32", "0", "0")
	var last string
	for _, line := range strings.Split(l.host.Run("tc", "filter", "show", "dev", "tun0", "egress"), "\n") {
		if strings.HasPrefix(line, "filter") {
			last = line
		}
	}
	if !strings.Contains(last, "pref 65535 bpf") || !strings.Contains(last, "nothing direct-action") {
		t.Errorf("the last filter is %q", last)
	}
}

// A shared block takes filters by its number only.
func TestFollowerAttach_sharedBlock(t *testing.T) {
	l, f, p := attachLab(t)
	try(t, l.host, "tc qdisc add dev tun0 egress_block 9 clsact")
	if err := f.Attach(p); err == nil || !strings.Contains(err.Error(), "egress_block") || f.Answer().Attached {
		t.Errorf("Attach: %v, %+v", err, f.Answer())
	}
}

// The queueing discipline ingress takes the place of clsact: the filter would be attached to ingress.
func TestFollowerAttach_ingress(t *testing.T) {
	l, f, p := attachLab(t)
	try(t, l.host, "tc qdisc add dev tun0 ingress")
	if err := f.Attach(p); err == nil || !strings.Contains(err.Error(), "queueing discipline ingress") || f.Answer().Attached {
		t.Errorf("Attach: %v, %+v", err, f.Answer())
	}
	if out := l.host.Run("tc", "filter", "show", "dev", "tun0", "ingress"); out != "" {
		t.Errorf("on ingress there is %s", out)
	}
	l.host.Run("tc", "qdisc", "del", "dev", "tun0", "ingress")
	mustAttach(t, f, p)
}

// A program that Configure has attached to an ingress qdisc is not taken for one that runs on egress.
func TestHostConfigure_programIngress(t *testing.T) {
	l, f, p := attachLab(t)
	try(t, l.host, "tc qdisc add dev tun0 ingress")
	if err := f.host.Configure([]Interface{{Index: index(t, l.host, "tun0"), Program: p}}); err != nil {
		t.Error(err)
	}
	if err := f.Attach(p); err == nil || f.Answer().Attached {
		t.Errorf("Attach: %v, %+v", err, f.Answer())
	}
}

// Configure attaches the program before the interface is up: Attach then only lists the filters.
func TestHostConfigure_program(t *testing.T) {
	l, p := tunnelLab(t), loadProgram(t)
	l.host.Run("ip", "tuntap", "add", "tun1", "mode", "tun")
	h := openHost(t, l.host)
	tun1 := index(t, l.host, "tun1")
	f := follow(t, h, l.host, Query{Remote: far, Interface: tun1})
	configure := func(p Program) {
		t.Helper()
		if err := h.Configure([]Interface{{Index: tun1, Program: p}}); err != nil {
			t.Fatal(err)
		}
	}
	configure(Program{FD: -1, ID: p.ID, Name: "none"})
	if err := f.Attach(Program{FD: -1, ID: p.ID, Name: "none"}); err == nil || f.Answer().Attached {
		t.Errorf("a program that does not exist is attached: %v", err)
	}
	l.host.Run("ip", "link", "set", "tun1", "down")
	configure(p)
	settle(t, h)
	requests := h.requests.Load()
	mustAttach(t, f, p)
	if n := h.requests.Load() - requests; n > 1 {
		t.Errorf("Attach makes %d requests", n)
	}
	if out := l.host.Run("ip", "link", "show", "tun1"); !strings.Contains(out, ",UP") {
		t.Errorf("the interface is not up: %s", out)
	}
}

// Attach to an interface that does not exist is an error.
func TestFollowerAttach_error(t *testing.T) {
	ns, p := netlab.New(t), loadProgram(t)
	f := follow(t, openHost(t, ns), ns, Query{Remote: far, Interface: 9999})
	if err := f.Attach(p); !errors.Is(err, unix.ENODEV) || f.Answer().Attached {
		t.Errorf("Attach: %v", err)
	}
}
