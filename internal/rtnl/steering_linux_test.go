package rtnl

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ipipd/internal/netlab"
)

// withSys calls f on a thread of its own, in the namespace, whose /sys is that of the
// namespace, as `ip netns exec` has it. The thread ends with f.
func withSys(t *testing.T, ns *netlab.NS, f func()) {
	t.Helper()
	file, err := os.Open(ns.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := inNamespace(file, func() error {
		if err := mountSys(); err != nil {
			return err
		}
		f()
		return nil
	}); err != nil {
		t.Skipf("needs a /sys of its own: %v", err)
	}
}

func TestFlowsAreSpreadOverAllProcessorsOrStay(t *testing.T) {
	ns := netlab.New(t)
	ns.Run("ip", "tuntap", "add", "dev", "t0", "mode", "tun")
	ns.Run("ip", "link", "set", "dev", "t0", "alias", "the operator's")
	withSys(t, ns, func() {
		for _, on := range []bool{true, false} {
			if err := Steer("t0", on); err != nil {
				t.Errorf("Steer %v: %v", on, err)
				return
			}
			masks, _ := filepath.Glob("/sys/class/net/t0/queues/rx-*/rps_cpus")
			if len(masks) == 0 {
				t.Error("no queues")
			}
			for _, file := range masks {
				mask, err := os.ReadFile(file)
				if got := strings.Trim(string(mask), "0,\n") != ""; err != nil || got != on {
					t.Errorf("Steer %v: %s is %s %v", on, file, mask, err)
				}
			}
		}
	})
	if out := ns.Run("ip", "link", "show", "dev", "t0"); !strings.Contains(out, "alias the operator's") {
		t.Errorf("the alias is not what it was: %s", out)
	}
}

// An interface of the same name in the namespace that /sys is of is not touched.
func TestAnotherNamespacesInterfaceIsNotSteered(t *testing.T) {
	ours, theirs := netlab.New(t), netlab.New(t)
	for _, ns := range []*netlab.NS{ours, theirs} {
		ns.Run("ip", "tuntap", "add", "dev", "t0", "mode", "tun")
	}
	withSys(t, theirs, func() {
		before, _ := os.ReadFile("/sys/class/net/t0/queues/rx-0/rps_cpus")
		file, err := os.Open(ours.Path())
		if err != nil {
			t.Error(err)
			return
		}
		defer file.Close()
		if err := unix.Setns(int(file.Fd()), unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		if err := Steer("t0", true); err == nil || !strings.Contains(err.Error(), "another network namespace") {
			t.Errorf("Steer: %v", err)
		}
		after, _ := os.ReadFile("/sys/class/net/t0/queues/rx-0/rps_cpus")
		if len(before) == 0 || string(before) != string(after) {
			t.Errorf("rps_cpus was %q and is %q", before, after)
		}
	})
}

func TestTheMaskOfAllProcessorsIsWrittenAsSysTakesIt(t *testing.T) {
	if got := processors(false); got != "0" {
		t.Errorf("none is %q", got)
	}
	for i, part := range strings.Split(processors(true), ",") {
		if len(part) > 8 || i > 0 && len(part) != 8 {
			t.Errorf("the mask is %q", processors(true))
		}
	}
}
