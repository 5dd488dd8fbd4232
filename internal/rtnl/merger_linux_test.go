package rtnl

import (
	"errors"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ipipd/internal/netlab"
)

// openMerger makes one in ns.
func openMerger(t *testing.T, ns *netlab.NS) *Merger {
	t.Helper()
	var m *Merger
	var err error
	ns.Do(func() { m, err = OpenMerger() })
	if errors.Is(err, os.ErrPermission) {
		t.Skipf("needs CAP_SYS_ADMIN: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestAMergerIsSetUpToMergeAndGoes(t *testing.T) {
	ns := netlab.New(t)
	m := openMerger(t, ns)
	name := m.near.Attrs().Name
	for _, want := range []string{"NOARP", "pfifo", "mtu 65535", "GRO for ipipd", "LOWER_UP"} {
		if out := ns.Run("ip", "link", "show", "dev", name); !strings.Contains(out, want) {
			t.Errorf("no %s in: %s", want, out)
		}
	}
	if out := ns.Run("ip", "address", "show", "dev", name); strings.Contains(out, "inet") {
		t.Errorf("the kernel has given it an address: %s", out)
	}
	ns.Do(func() {
		if !m.Works() {
			t.Error("it does not work")
		}
		if n, err := m.Drops(); n != 0 || err != nil {
			t.Errorf("drops are %d %v", n, err)
		}
	})
	ns.Run("ip", "link", "set", "dev", name, "down")
	ns.Do(func() {
		if m.Works() {
			t.Error("it works while it is down")
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
		if m.Works() {
			t.Error("it works after Close")
		}
		if _, err := m.Drops(); err == nil {
			t.Error("drops can be asked for after Close")
		}
	})
	if out := ns.Run("ip", "link", "show", "type", "veth"); out != "" {
		t.Errorf("left behind: %s", out)
	}
}

func TestMergersDoNotGetInEachOthersWay(t *testing.T) {
	ns := netlab.New(t)
	first, second := openMerger(t, ns), openMerger(t, ns)
	ns.Do(func() {
		if err := first.Close(); err != nil {
			t.Error(err)
		}
		if !second.Works() {
			t.Error("the second went with the first")
		}
		if err := second.Close(); err != nil {
			t.Error(err)
		}
	})
}

// What finds no room in the queue is counted.
func TestWhatAMergerLosesIsCounted(t *testing.T) {
	ns := netlab.New(t)
	m := openMerger(t, ns)
	defer ns.Do(func() { _ = m.Close() })
	ns.Run("tc", "qdisc", "replace", "dev", m.near.Attrs().Name, "root", "pfifo", "limit", "0")
	ns.Do(func() {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		const count = 5
		for range count {
			// Refused or not: a socket is not always told.
			_ = unix.Sendto(fd, make([]byte, 64), 0, &unix.SockaddrLinklayer{Ifindex: m.Near, Protocol: 8})
		}
		if n, err := m.Drops(); n != count || err != nil {
			t.Errorf("drops are %d %v, not %d", n, err, count)
		}
	})
}
