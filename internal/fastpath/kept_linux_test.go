package fastpath

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"ipipd/internal/handover"
	"ipipd/internal/ipv4"
)

// keptOf returns duplicates of the descriptors that a Manager would keep of f.
func keptOf(t *testing.T, f *FastPath) handover.Kept {
	t.Helper()
	kept := handover.Kept{}
	add := func(name string, fd int) {
		dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		kept[name] = append(kept[name], dup)
	}
	for _, m := range []*ebpf.Map{f.objects.Counters, f.objects.IPIDs, f.objects.Slots} {
		add(countsName(t), m.FD())
	}
	for device, u := range f.underlays {
		add(linkName(device), u.link.(interface{ FD() int }).FD())
	}
	return kept
}

func countsName(t *testing.T) string {
	t.Helper()
	spec, err := readObject()
	if err != nil {
		t.Fatal(err)
	}
	return keptCounts + layoutOf(spec)
}

// openKept is open with kept descriptors, and returns what Options.Cold was called with.
func openKept(t *testing.T, kept handover.Kept) (f *FastPath, cold *[]string) {
	t.Helper()
	cold = new([]string)
	f, err := Open(Options{Kept: kept, Cold: func(what string, err error) { *cold = append(*cold, what+": "+err.Error()) }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.Close)
	return f, cold
}

// programOn returns the only program on the ingress of a device.
func programOn(t *testing.T, device int) ebpf.ProgramID {
	t.Helper()
	r, err := link.QueryPrograms(link.QueryOptions{Target: device, Attach: ebpf.AttachTCXIngress})
	if err != nil || len(r.Programs) != 1 {
		t.Fatalf("%d programs on the device, want 1: %v", len(r.Programs), err)
	}
	return r.Programs[0].ID
}

// The device has one program at any time: that of the process before until Switch. Counters go on, and a program that
// no tunnel needs any more is detached.
func TestFastPathSwitch(t *testing.T) {
	ns := newDevices(t)
	ns.Do(func() {
		first := open(t)
		u0, u1 := ifindex(t, "u0"), ifindex(t, "u1")
		one := Tunnel{Ifindex: ifindex(t, "t0"), UnderlayIfindex: u0, Local: local, Remote: remote, TxEnabled: true, RxEnabled: true}
		two := one
		two.Ifindex, two.UnderlayIfindex, two.Remote = ifindex(t, "t1"), u1, innerB
		l, err := first.Attach(one)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := first.Attach(two); err != nil {
			t.Fatal(err)
		}
		count := make([]counters, first.cpus)
		count[0] = counters{RxPackets: 3, TxBytes: 5, Orphaned: 7}
		if err := first.objects.Counters.Put(l.slot, count); err != nil {
			t.Fatal(err)
		}
		kept, before := keptOf(t, first), programOn(t, u0)
		first.Leave()
		first.Close()
		if programOn(t, u0) != before {
			t.Error("the program is another one after Leave")
		}

		next, cold := openKept(t, kept)
		again, err := next.Attach(one)
		if err != nil {
			t.Fatal(err)
		}
		if programOn(t, u0) != before || next.Switched() {
			t.Error("the program is another one before Switch")
		}
		if adopted, orphaned := again.Adopted(); !adopted || orphaned != 7 {
			t.Errorf("adopted: %v, %d orphaned, want 7", adopted, orphaned)
		}
		again.Close() // as a start that fails
		if again, err = next.Attach(one); err != nil {
			t.Fatal(err)
		}
		next.Switch()
		if now := programOn(t, u0); now == before {
			t.Error("the program is the same after Switch")
		}
		if n := attached(t, u1); n != 0 {
			t.Errorf("the other device has %d programs, which nobody needs", n)
		}
		if s, err := again.Stats(); err != nil || s.RxPackets != 3 || s.TxBytes != 5 {
			t.Errorf("the counters are %+v, %v", s, err)
		}
		if fresh, err := next.Attach(two); err != nil {
			t.Error(err)
		} else if s, err := fresh.Stats(); err != nil || s != (Stats{}) || fresh.slot == again.slot {
			t.Errorf("the counters of another tunnel are %+v, %v", s, err)
		}
		third, _ := openKept(t, keptOf(t, next)) // it does not report the same packets as orphaned again
		if l, err := third.Attach(one); err != nil {
			t.Error(err)
		} else if _, orphaned := l.Adopted(); orphaned != 0 {
			t.Errorf("%d orphaned, which the process before has said", orphaned)
		}
		third.Close()
		if len(*cold) > 0 || len(kept) > 0 {
			t.Errorf("%q begins anew, %v is left", *cold, kept.Names())
		}
		next.Close()
		if n := attached(t, u0); n != 0 {
			t.Errorf("%d programs after Close", n)
		}
	})
}

// Kept descriptors that are damaged or of another layout are not used, and Cold is told once.
func TestOpen_damaged(t *testing.T) {
	ns := newDevices(t)
	ns.Do(func() {
		file := func() int {
			fd, err := unix.MemfdCreate("file", unix.MFD_CLOEXEC)
			if err != nil {
				t.Fatal(err)
			}
			return fd
		}
		small := func() int {
			m, err := ebpf.NewMap(&ebpf.MapSpec{Name: "slots", Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 2})
			if err != nil {
				t.Fatal(err)
			}
			defer m.Close()
			fd, err := unix.FcntlInt(uintptr(m.FD()), unix.F_DUPFD_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			return fd
		}
		u0, u1 := ifindex(t, "u0"), ifindex(t, "u1")
		one := Tunnel{Ifindex: ifindex(t, "t0"), UnderlayIfindex: u0, Local: local, Remote: remote, TxEnabled: true, RxEnabled: true}
		for _, c := range []struct {
			name   string
			damage func(kept handover.Kept)
			want   string // "": nothing
			adopts bool   // the counters
			links  int    // that are adopted
		}{
			{"whole", func(handover.Kept) {}, "", true, 1},
			{"a file for a map", func(k handover.Kept) { n := countsName(t); k[n] = append(k[n][:2], file()) }, "counters: what is kept as the counters is no map", false, 1},
			{"a map of another size", func(k handover.Kept) { n := countsName(t); k[n] = append(k[n][:2], small()) }, "counters: a map that is kept as one of the counters is none of them", false, 1},
			{"a link for a map", func(k handover.Kept) { n := countsName(t); k[n] = append(k[n][:2], k.Take(linkName(u0))...) }, "counters: a map that is kept as one of the counters is none of them", false, 0},
			{"a map too few", func(k handover.Kept) { n := countsName(t); closeAll(k[n][2:]); k[n] = k[n][:2] }, "counters: 2 of the 3 maps that count are kept", false, 1},
			{"a map twice", func(k handover.Kept) {
				n := countsName(t)
				dup, _ := unix.FcntlInt(uintptr(k[n][0]), unix.F_DUPFD_CLOEXEC, 0)
				k[n] = append(k[n], dup)
			}, "counters: a map that is kept as one of the counters is none of them", false, 1},
			{"another layout", func(k handover.Kept) { k[keptCounts+"0"] = k.Take(countsName(t)) }, "counters: the maps of the process before have another layout", false, 1},
			{"a file for a link", func(k handover.Kept) { closeAll(k.Take(linkName(u0))); k[linkName(u0)] = []int{file()} }, "programs on a device: u0: what is kept as a link is none", true, 0},
			{"a map for a link", func(k handover.Kept) { closeAll(k.Take(linkName(u0))); k[linkName(u0)] = []int{small()} }, "programs on a device: u0: what is kept as a link to the ingress of a device is another one", true, 0},
			{"a link to another device", func(k handover.Kept) { k[linkName(u1)] = k.Take(linkName(u0)) }, "programs on a device: u1: what is kept as the link to a device is one to another", true, 0},
			{"a link to nothing", func(k handover.Kept) { k[keptLink+"x"] = k.Take(linkName(u0)) }, "programs on a device", true, 0},
		} {
			first := open(t)
			if _, err := first.Attach(one); err != nil {
				t.Fatal(err)
			}
			kept := keptOf(t, first)
			first.Leave()
			first.Close()
			c.damage(kept)
			next, cold := openKept(t, kept)
			if c.want == "" && len(*cold) > 0 || c.want != "" && (len(*cold) != 1 || !strings.HasPrefix((*cold)[0], c.want)) {
				t.Errorf("%s: %q, want a line with %q", c.name, *cold, c.want)
			}
			if slices.ContainsFunc(*cold, func(line string) bool { return strings.Contains(line, "\n") }) {
				t.Errorf("%s: %q has more than a line", c.name, *cold)
			}
			if len(kept) > 0 || len(next.keptLinks) != c.links {
				t.Errorf("%s: %v are left, and %d links adopted", c.name, kept.Names(), len(next.keptLinks))
			}
			l, err := next.Attach(one)
			if err != nil {
				t.Fatal(err)
			}
			if adopted, _ := l.Adopted(); adopted != c.adopts {
				t.Errorf("%s: counters adopted: %v", c.name, adopted)
			}
			next.Switch()
			programOn(t, u0)
			next.Close()
			if n := attached(t, u0) + attached(t, u1); n != 0 {
				t.Errorf("%s: %d programs are left", c.name, n)
			}
		}
	})
}

// Once alive_until has passed without a beat, packets go to userspace, and are counted as orphaned.
func TestFastPath_orphaned(t *testing.T) {
	l := newLab(t, defaultTunnel())
	out := inner(ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: innerA, Destination: innerB}, udp(100))
	in := outerPacket(0, inner(ipv4.Header{Protocol: ipv4.ProtocolUDP, Source: innerB, Destination: innerA}, udp(100)))
	if v, _ := l.run(l.Encap, out); v != redirect {
		t.Fatalf("verdict %d", v)
	}
	if v, _ := l.run(l.Decap, in); v != redirect {
		t.Fatalf("verdict %d", v)
	}
	f := &FastPath{aliveUntil: l.AliveUntil}
	if err := f.beat(-time.Second); err != nil {
		t.Fatal(err)
	}
	most := 64 * l.cpus // CHECK_ALIVE
	for n := 0; ; n++ {
		if v, _ := l.run(l.Encap, out); v == next {
			break
		} else if n > most {
			t.Fatal("packets are sent")
		}
	}
	if v, same := l.run(l.Decap, in); v != next || !slices.Equal(same, in) {
		t.Errorf("verdict %d", v)
	}
	if c := l.counters(); c.Orphaned != 2 {
		t.Errorf("%+v", c)
	}
	if err := f.beat(time.Hour); err != nil {
		t.Fatal(err)
	}
	if v, _ := l.run(l.Decap, in); v != redirect {
		t.Errorf("verdict %d after a beat", v)
	}
}
