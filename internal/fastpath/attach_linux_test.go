package fastpath

import (
	"errors"
	"net"
	"net/netip"
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"ipipd/internal/fib"
	"ipipd/test/netlab"
	"ipipd/test/routesets"
)

// ifindex returns the index of an interface in this thread's namespace.
func ifindex(t *testing.T, name string) int {
	t.Helper()
	i, err := net.InterfaceByName(name)
	if err != nil {
		t.Fatal(err)
	}
	return i.Index
}

// attached counts the programs on the tcx ingress of a device in this thread's namespace.
func attached(t *testing.T, device int) int {
	t.Helper()
	r, err := link.QueryPrograms(link.QueryOptions{Target: device, Attach: ebpf.AttachTCXIngress})
	if err != nil {
		t.Fatal(err)
	}
	return len(r.Programs)
}

func open(t *testing.T) *FastPath {
	t.Helper()
	f, err := Open(Options{})
	var u *Unavailable
	if errors.As(err, &u) {
		t.Skipf("no fast path here: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.Close)
	return f
}

// newDevices creates a namespace with two underlay devices, u0 and u1, and two TUNs, t0
// and t1.
func newDevices(t *testing.T) *netlab.NS {
	t.Helper()
	ns := netlab.New(t)
	ns.Run("ip", "link", "add", "u0", "type", "veth", "peer", "name", "u1")
	for _, tun := range []string{"t0", "t1"} {
		ns.Run("ip", "tuntap", "add", tun, "mode", "tun")
	}
	return ns
}

// Tunnels over the same underlay device share one program on it.
func TestAttach_sharedUnderlay(t *testing.T) {
	ns := newDevices(t)
	ns.Do(func() {
		f := open(t)
		u0, u1 := ifindex(t, "u0"), ifindex(t, "u1")
		one := Tunnel{Ifindex: ifindex(t, "t0"), UnderlayIfindex: u0, Local: local, Remote: remote, PathMTU: 1500, MTU: 1480}
		two := one
		two.Ifindex, two.Remote = ifindex(t, "t1"), innerB
		check := func(when string, on0, on1 int) {
			t.Helper()
			if a, b := attached(t, u0), attached(t, u1); a != on0 || b != on1 {
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
		two.UnderlayIfindex = u1
		if err := b.Update(two); err != nil {
			t.Fatal(err)
		}
		check("one of them moved", 1, 1)
		a.Close()
		check("the other closed", 0, 1)
		if err := a.Update(one); !errors.Is(err, ErrClosed) {
			t.Errorf("Update after Close: %v", err)
		}
		if _, err := f.Attach(one); err != nil {
			t.Errorf("attach again: %v", err)
		}
		f.Close()
		check("all closed", 0, 0)
		if _, err := f.Attach(one); !errors.Is(err, ErrClosed) {
			t.Errorf("Attach after Close: %v", err)
		}
	})
}

// The programs copy packets from OpenCapture on, and once an Update says so, until one does not.
func TestLink_OpenCapture(t *testing.T) {
	ns := newDevices(t)
	ns.Do(func() {
		f := open(t)
		tunnel := defaultTunnel()
		tunnel.Ifindex, tunnel.UnderlayIfindex = ifindex(t, "t0"), ifindex(t, "u0")
		l, err := f.Attach(tunnel)
		if err != nil {
			t.Fatal(err)
		}
		step := func(what string, snaplen int, want uint32, ring bool) {
			t.Helper()
			tunnel.Capture.Snaplen = snaplen
			if err := l.Update(tunnel); err != nil {
				t.Fatal(err)
			}
			var tx txTunnel
			var rx rxTunnel
			if err := errors.Join(f.objects.TxTunnels.Lookup(uint32(tunnel.Ifindex), &tx), f.objects.RxTunnels.Lookup(tunnel.rxKey(), &rx)); err != nil {
				t.Fatal(err)
			}
			if tx.Capture != want || rx.Capture != want {
				t.Errorf("%s: %d and %d bytes are captured, want %d", what, tx.Capture, rx.Capture, want)
			}
			var id uint32
			if err := f.objects.CaptureRings.Lookup(l.slot, &id); (err == nil) != ring {
				t.Errorf("%s: the ring: %v", what, err)
			}
		}
		step("before it", 100, 0, false)
		for range 2 { // again changes nothing
			if err := l.OpenCapture(); err != nil {
				t.Fatal(err)
			}
		}
		step("a capture", 100, 100, true)
		step("the end of it", 0, 0, true)
		l.CloseCapture()
		step("afterwards", 0, 0, false)
		if err := l.OpenCapture(); err != nil {
			t.Fatal(err)
		}
		step("again", 200, 200, true)
		l.Close()
		if err := l.OpenCapture(); err != ErrClosed {
			t.Errorf("after Close: %v", err)
		}
		var id uint32
		if err := f.objects.CaptureRings.Lookup(l.slot, &id); err == nil {
			t.Error("the ring is left behind")
		}
	})
}

// Attach leaves nothing behind on error.
func TestAttach_cleanupOnError(t *testing.T) {
	ns := newDevices(t)
	ns.Do(func() {
		f := open(t)
		one := Tunnel{Ifindex: ifindex(t, "t0"), UnderlayIfindex: ifindex(t, "u0"), Local: local, Remote: remote}
		if _, err := f.Attach(one); err != nil {
			t.Fatal(err)
		}
		for name, x := range map[string]Tunnel{
			"the same addresses": {Ifindex: ifindex(t, "t1"), UnderlayIfindex: ifindex(t, "u1"), Local: local, Remote: remote},
			"no such underlay":   {Ifindex: ifindex(t, "t1"), UnderlayIfindex: 9999, Local: local, Remote: innerB},
		} {
			if _, err := f.Attach(x); err == nil {
				t.Errorf("%s: it does not fail", name)
			}
			if n := len(f.links) + len(f.underlays); n != 2 {
				t.Errorf("%s: %d links and devices are left, want those of the first", name, n)
			}
		}
		if n := attached(t, one.UnderlayIfindex); n != 1 {
			t.Errorf("the first tunnel has %d programs", n)
		}
	})
}

// A device that moves to another namespace and back keeps its index, and loses its
// programs: Update attaches again.
func TestLinkUpdate_reattachesUnderlay(t *testing.T) {
	ns, other := newDevices(t), netlab.New(t)
	ns.Do(func() {
		f := open(t)
		one := Tunnel{Ifindex: ifindex(t, "t0"), UnderlayIfindex: ifindex(t, "u0"), Local: local, Remote: remote}
		l, err := f.Attach(one)
		if err != nil {
			t.Fatal(err)
		}
		ns.Run("ip", "link", "set", "u0", "netns", other.Path())
		other.Run("ip", "link", "set", "u0", "netns", ns.Path())
		if ifindex(t, "u0") != one.UnderlayIfindex {
			t.Skip("this kernel gives it another index")
		}
		if err := l.Update(one); err != nil {
			t.Fatal(err)
		}
		if n := attached(t, one.UnderlayIfindex); n != 1 {
			t.Errorf("%d programs are attached", n)
		}
	})
}

// ipip_decap is attached to the devices of remotes with Rx, for as long as there are any.
func TestRoutes_devices(t *testing.T) {
	ns := newDevices(t)
	ns.Do(func() {
		f := open(t)
		u0, u1 := ifindex(t, "u0"), ifindex(t, "u1")
		r := f.NewRoutes(ifindex(t, "t0"))
		check := func(when string, on0, on1 int) {
			t.Helper()
			if a, b := attached(t, u0), attached(t, u1); a != on0 || b != on1 {
				t.Errorf("%s: %d programs on u0 and %d on u1, want %d and %d", when, a, b, on0, on1)
			}
		}
		set := func(g [4]byte, to Remote) {
			t.Helper()
			if err := r.SetRemote(g, to); err != nil {
				t.Fatal(err)
			}
		}
		a, b := address(routesets.Address(1)), address(routesets.Address(2))
		routes := map[netip.Prefix][]fib.Route{
			netip.MustParsePrefix("10.1.0.0/16"): {{Hops: []fib.Hop{{Gateway: a}}}},
			netip.MustParsePrefix("10.2.0.0/16"): {{Hops: []fib.Hop{{Gateway: b}}}},
		}
		if err := r.Sync(routesets.Table(routes)); err != nil {
			t.Fatal(err)
		}
		set(a, Remote{UnderlayIfindex: u0, Tx: true, Rx: true})
		set(b, Remote{UnderlayIfindex: u1, Tx: true})
		check("one is sent to only", 1, 0)
		set(b, Remote{UnderlayIfindex: u1, Rx: true})
		check("both are received from", 1, 1)
		set(a, Remote{UnderlayIfindex: u1, Rx: true})
		check("by the same", 0, 1)
		set(a, Remote{UnderlayIfindex: u0, Rx: true})
		if err := r.SetRemote(b, Remote{UnderlayIfindex: 9999, Tx: true, Rx: true}); err == nil {
			t.Error("by no device, and there is no error")
		}
		check("one of them has no device", 1, 0)
		set(b, Remote{UnderlayIfindex: u1, Rx: true})
		delete(routes, netip.MustParsePrefix("10.1.0.0/16"))
		if err := r.Sync(routesets.Table(routes)); err != nil {
			t.Fatal(err)
		}
		check("one has gone", 0, 1)
		r.Close()
		check("the routes are closed", 0, 0)
		r = f.NewRoutes(ifindex(t, "t0"))
		if err := r.Sync(routesets.Table(routes)); err != nil {
			t.Fatal(err)
		}
		set(b, Remote{UnderlayIfindex: u1, Rx: true})
		f.Close()
		check("all is closed", 0, 0)
	})
}

// Nothing is pinned: the kernel detaches the programs of a killed process.
func TestFastPath_killedProcess(t *testing.T) {
	a, b := netlab.New(t), netlab.New(t)
	netlab.Veth(t, a, b, netlab.End{Name: "veth0", Address: "192.0.2.1/24"}, netlab.End{Name: "veth0", Address: "192.0.2.2/24"})
	d := netlab.Up(t, a, "t0", "--remote-address", "192.0.2.2")
	if s := d.Status(); s.FastPath != "active" {
		t.Skipf("no fast path here: %s", s.FastPath)
	}
	programs := func() (n int) {
		a.Do(func() { n = attached(t, ifindex(t, "veth0")) })
		return n
	}
	if programs() != 1 {
		t.Fatalf("%d programs while it runs", programs())
	}
	d.Stop(syscall.SIGKILL)
	// The kernel detaches a link a moment after its last descriptor is closed.
	netlab.Eventually(t, "no program is left", func() bool { return programs() == 0 })
}

// A disabled tunnel keeps its programs, its counters and nothing in the maps that packets are
// looked up in. Update enables it again, on another TUN too.
func TestLinkDisable(t *testing.T) {
	ns := newDevices(t)
	ns.Do(func() {
		f := open(t)
		u0, t0, t1 := ifindex(t, "u0"), ifindex(t, "t0"), ifindex(t, "t1")
		one := Tunnel{Ifindex: t0, UnderlayIfindex: u0, Local: local, Remote: remote, TxEnabled: true, RxEnabled: true}
		l, err := f.Attach(one)
		if err != nil {
			t.Fatal(err)
		}
		count := make([]counters, f.cpus)
		count[0] = counters{RxPackets: 3, TxBytes: 5}
		if err := f.objects.Counters.Put(l.slot, count); err != nil {
			t.Fatal(err)
		}
		check := func(when string, tun, inMaps int) {
			t.Helper()
			if n := attached(t, u0); n != 1 {
				t.Errorf("%s: the underlay device has %d programs", when, n)
			}
			var tx txTunnel
			var rx rxTunnel
			entries := 0
			for _, device := range []int{t0, t1} {
				if f.objects.TxTunnels.Lookup(uint32(device), &tx) == nil {
					entries++
					if device != tun {
						t.Errorf("%s: the other TUN is in the maps", when)
					}
				}
			}
			if f.objects.RxTunnels.Lookup(one.rxKey(), &rx) == nil {
				entries++
			}
			if entries != inMaps {
				t.Errorf("%s: %d entries in the maps, want %d", when, entries, inMaps)
			}
			if s, err := l.Stats(); err != nil || s.RxPackets != 3 || s.TxBytes != 5 {
				t.Errorf("%s: %+v, %v", when, s, err)
			}
		}
		check("attached", t0, 2)
		l.Disable()
		l.Disable()
		check("disabled", t0, 0)
		if err := l.Update(one); err != nil {
			t.Fatal(err)
		}
		check("enabled", t0, 2)
		one.Ifindex = t1
		if err := l.Update(one); err != nil {
			t.Fatal(err)
		}
		check("on another TUN", t1, 2)
		wrong := one
		wrong.UnderlayIfindex = 9999
		if err := l.Update(wrong); err == nil {
			t.Error("no such underlay device, and there is no error")
		}
		check("after an error", t1, 0)
		if err := l.Update(one); err != nil {
			t.Fatal(err)
		}
		check("enabled after an error", t1, 2)
		l.Close()
		if s, err := l.Stats(); err != nil || s.RxPackets != 3 {
			t.Errorf("after Close: %+v, %v", s, err)
		}
	})
}
