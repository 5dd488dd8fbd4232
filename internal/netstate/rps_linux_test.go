package netstate

import (
	"errors"
	"math/bits"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ipipd/test/netlab"
)

// withSys calls f on a thread in the namespace, with the namespace's own /sys, as under
// `ip netns exec`. The thread ends with f.
func withSys(t *testing.T, ns *netlab.NS, f func()) {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked, so that the thread and its mount namespace end here
		err := unix.Unshare(unix.CLONE_NEWNS)
		if err == nil {
			err = unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, "")
		}
		if err == nil {
			ns.Do(func() {
				if err = unix.Mount("sysfs", "/sys", "sysfs", 0, ""); err == nil {
					f()
				}
			})
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Skipf("needs a /sys of its own: %v", err)
	}
}

func rpsMasks(t *testing.T, ifname string) (masks []string) {
	t.Helper()
	files, _ := filepath.Glob("/sys/class/net/" + ifname + "/queues/rx-*/rps_cpus")
	for _, f := range files {
		mask, err := os.ReadFile(f)
		if err != nil {
			t.Error(err)
		}
		masks = append(masks, strings.TrimLeft(strings.TrimSpace(string(mask)), "0,"))
	}
	return masks
}

// processors returns the number of processors in a mask.
func processors(t *testing.T, mask string) (n int) {
	t.Helper()
	for group := range strings.SplitSeq(mask, ",") {
		v, err := strconv.ParseUint(group, 16, 32)
		if err != nil {
			t.Error(err)
		}
		n += bits.OnesCount64(v)
	}
	return n
}

func TestRequester_SetRPS(t *testing.T) {
	ns := netlab.New(t)
	ns.Run("ip", "tuntap", "add", "dev", "t0", "mode", "tun")
	ns.Run("ip", "link", "set", "dev", "t0", "alias", "the operator's")
	withSys(t, ns, func() {
		ns.Run("ip", "tuntap", "add", "dev", "t1", "mode", "tun")
		if err := fresh.SetRPS("t1", "all"); err != nil {
			t.Error(err)
		}
		if got := rpsMasks(t, "t1"); len(got) == 0 || processors(t, got[0]) != runtime.NumCPU() {
			t.Errorf("masks %q for all, want %d processors", got, runtime.NumCPU())
		}
		if err := fresh.SetRPS("t0", "1"); err != nil {
			t.Error(err)
		}
		if got := rpsMasks(t, "t0"); len(got) == 0 || got[0] != "1" {
			t.Errorf("masks %q, want 1", got)
		}
		// A mask that is set is not overwritten.
		if err := fresh.SetRPS("t0", "2"); err == nil || !strings.Contains(err.Error(), "already") {
			t.Errorf("a second mask: %v", err)
		}
		if got := rpsMasks(t, "t0"); len(got) == 0 || got[0] != "1" {
			t.Errorf("masks %q, want 1 still", got)
		}
	})
	if out := ns.Run("ip", "link", "show", "dev", "t0"); !strings.Contains(out, "alias the operator's") {
		t.Errorf("the alias is not what it was: %s", out)
	}
}

// ClearRPS clears only the mask that SetRPS has set.
func TestRequester_ClearRPS(t *testing.T) {
	ns := netlab.New(t)
	ns.Run("ip", "tuntap", "add", "dev", "t0", "mode", "tun")
	withSys(t, ns, func() {
		for _, mask := range []string{"1", "0001", "all"} {
			if err := fresh.SetRPS("t0", mask); err != nil {
				t.Error(err)
			}
			if err := fresh.ClearRPS("t0", "2"); err != nil {
				t.Error(err)
			}
			if got := rpsMasks(t, "t0"); len(got) == 0 || got[0] == "" {
				t.Errorf("masks %q after another one is taken back", got)
			}
			for range 2 { // the second time the mask is cleared already
				if err := fresh.ClearRPS("t0", mask); err != nil {
					t.Error(err)
				}
				if got := rpsMasks(t, "t0"); len(got) == 0 || got[0] != "" {
					t.Errorf("masks %q after %s is taken back", got, mask)
				}
			}
		}
		if err := fresh.ClearRPS("nil0", "1"); !errors.As(err, new(*NoDeviceError)) {
			t.Error(err)
		}
	})
}

func TestDigits(t *testing.T) {
	for mask, want := range map[string]string{
		"0": "", "00000000,00000000\n": "", "3": "3", "00000003\n": "3", "F": "f", "1,3": "100000003", "00000001,00000003": "100000003", "100000003": "100000003",
	} {
		if got := digits(mask); got != want {
			t.Errorf("%q: %q, want %q", mask, got, want)
		}
	}
}

func TestRequester_SetRPS_otherNamespace(t *testing.T) {
	there, here := netlab.New(t), netlab.New(t)
	for _, ns := range []*netlab.NS{there, here} {
		ns.Run("ip", "tuntap", "add", "dev", "t0", "mode", "tun")
	}
	withSys(t, there, func() {
		here.Do(func() {
			if err := fresh.SetRPS("t0", "1"); err == nil {
				t.Error("an interface of the same name in another namespace was taken for ours")
			}
		})
		if got := rpsMasks(t, "t0"); len(got) == 0 || got[0] != "" {
			t.Errorf("masks %q, want none", got)
		}
	})
}
