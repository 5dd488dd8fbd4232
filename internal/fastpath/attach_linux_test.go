package fastpath

import (
	"errors"
	"net"
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"ipipd/test/netlab"
)

// index is that of an interface in this thread's namespace.
func index(t *testing.T, name string) int {
	t.Helper()
	i, err := net.InterfaceByName(name)
	if err != nil {
		t.Fatal(err)
	}
	return i.Index
}

// attached counts the programs on a device of this thread's namespace.
func attached(t *testing.T, device int, where ebpf.AttachType) int {
	t.Helper()
	r, err := link.QueryPrograms(link.QueryOptions{Target: device, Attach: where})
	if err != nil {
		t.Fatal(err)
	}
	return len(r.Programs)
}

func open(t *testing.T) *FastPath {
	t.Helper()
	f, err := Open()
	var u *Unavailable
	if errors.As(err, &u) {
		t.Skipf("no fast path here: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

// wires makes a namespace with two underlay devices, u0 and u1, and two that stand
// for TUNs, t0 and t1.
func wires(t *testing.T) *netlab.NS {
	t.Helper()
	ns := netlab.New(t)
	ns.Run("ip", "link", "add", "u0", "type", "veth", "peer", "name", "u1")
	for _, tun := range []string{"t0", "t1"} {
		ns.Run("ip", "tuntap", "add", tun, "mode", "tun")
	}
	return ns
}

func TestTunnelsShareOneProgramOnTheirUnderlayDevice(t *testing.T) {
	ns := wires(t)
	ns.Do(func() {
		f := open(t)
		u0, u1 := index(t, "u0"), index(t, "u1")
		one := Tunnel{Device: index(t, "t0"), Underlay: u0, Local: local, Remote: remote, PathMTU: 1500, MTU: 1480}
		two := one
		two.Device, two.Remote = index(t, "t1"), innerB
		check := func(when string, on0, on1 int) {
			t.Helper()
			if a, b := attached(t, u0, ebpf.AttachTCXIngress), attached(t, u1, ebpf.AttachTCXIngress); a != on0 || b != on1 {
				t.Errorf("%s: %d programs on u0 and %d on u1, want %d and %d", when, a, b, on0, on1)
			}
		}
		a, err := f.Attach(one)
		if err != nil {
			t.Fatal(err)
		}
		b, err := f.Attach(two)
		if err != nil {
			t.Fatal(err)
		}
		check("two tunnels", 1, 0)
		if n := attached(t, one.Device, ebpf.AttachTCXEgress); n != 1 {
			t.Errorf("%d programs on t0", n)
		}
		two.Underlay = u1
		if err := b.Update(two); err != nil {
			t.Fatal(err)
		}
		check("one of them moved", 1, 1)
		if err := a.Close(); err != nil {
			t.Fatal(err)
		}
		check("the other closed", 0, 1)
		if err := a.Update(one); !errors.Is(err, ErrClosed) {
			t.Errorf("Update after Close: %v", err)
		}
		if _, err := f.Attach(one); err != nil {
			t.Errorf("attach again: %v", err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		check("all closed", 0, 0)
		if _, err := f.Attach(one); !errors.Is(err, ErrClosed) {
			t.Errorf("Attach after Close: %v", err)
		}
	})
}

func TestAttachThatFailsLeavesNothing(t *testing.T) {
	ns := wires(t)
	ns.Do(func() {
		f := open(t)
		one := Tunnel{Device: index(t, "t0"), Underlay: index(t, "u0"), Local: local, Remote: remote}
		if _, err := f.Attach(one); err != nil {
			t.Fatal(err)
		}
		for name, x := range map[string]Tunnel{
			"the same addresses": {Device: index(t, "t1"), Underlay: index(t, "u1"), Local: local, Remote: remote},
			"no such underlay":   {Device: index(t, "t1"), Underlay: 9999, Local: local, Remote: innerB},
			"no such TUN":        {Device: 9999, Underlay: index(t, "u1"), Local: local, Remote: innerB},
		} {
			if _, err := f.Attach(x); err == nil {
				t.Errorf("%s: it does not fail", name)
			}
			if n := len(f.links) + len(f.underlays); n != 2 {
				t.Errorf("%s: %d links and devices are left, want those of the first", name, n)
			}
		}
		if n := attached(t, one.Underlay, ebpf.AttachTCXIngress); n != 1 {
			t.Errorf("the first tunnel has %d programs", n)
		}
	})
}

// A device that goes to another namespace and comes back has its index again, and
// no programs.
func TestAnUnderlayDeviceThatCameBackIsAttachedAgain(t *testing.T) {
	ns, other := wires(t), netlab.New(t)
	ns.Do(func() {
		f := open(t)
		one := Tunnel{Device: index(t, "t0"), Underlay: index(t, "u0"), Local: local, Remote: remote}
		l, err := f.Attach(one)
		if err != nil {
			t.Fatal(err)
		}
		ns.Run("ip", "link", "set", "u0", "netns", other.Path())
		other.Run("ip", "link", "set", "u0", "netns", ns.Path())
		if index(t, "u0") != one.Underlay {
			t.Skip("this kernel gives it another index")
		}
		if err := l.Update(one); err != nil {
			t.Fatal(err)
		}
		if n := attached(t, one.Underlay, ebpf.AttachTCXIngress); n != 1 {
			t.Errorf("%d programs are attached", n)
		}
	})
}

// The programs are the process's, whatever ends it.
func TestProgramsVanishWithAKilledProcess(t *testing.T) {
	a, b := netlab.New(t), netlab.New(t)
	netlab.Veth(t, a, b, netlab.End{Name: "veth0", Address: "192.0.2.1/24"}, netlab.End{Name: "veth0", Address: "192.0.2.2/24"})
	d := netlab.Up(t, a, "t0", "--remote-address", "192.0.2.2")
	if s := d.Status(); s.FastPath != "active" {
		t.Skipf("no fast path here: %s", s.FastPath)
	}
	programs := func() (n int) {
		a.Do(func() { n = attached(t, index(t, "veth0"), ebpf.AttachTCXIngress) })
		return n
	}
	if programs() != 1 {
		t.Fatalf("%d programs while it runs", programs())
	}
	d.Stop(syscall.SIGKILL)
	// The kernel lets go of a link a moment after its last file descriptor.
	netlab.Eventually(t, "no program is left", func() bool { return programs() == 0 })
}
