package netstate

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"ipipd/test/netlab"
)

// addLinks adds n TUN interfaces, t0 and so on, and returns their indices.
func addLinks(t *testing.T, ns *netlab.NS, n int) (devices []int) {
	t.Helper()
	var batch strings.Builder
	for i := range n {
		fmt.Fprintf(&batch, "tuntap add t%d mode tun\n", i)
	}
	file := filepath.Join(t.TempDir(), "batch")
	if err := os.WriteFile(file, []byte(batch.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	ns.Run("ip", "-batch", file)
	for i := range n {
		devices = append(devices, index(t, ns, fmt.Sprintf("t%d", i)))
	}
	return devices
}

// Remove removes these interfaces only, and one that is gone is no error.
func TestHost_Remove(t *testing.T) {
	ns := netlab.New(t)
	devices := addLinks(t, ns, 4)
	ns.Run("ip", "tuntap", "add", "other", "mode", "tun")
	ns.Run("ip", "link", "del", "t1")
	h := openHost(t, ns)
	if err := h.Remove(devices); err != nil {
		t.Fatal(err)
	}
	if out := ns.Run("ip", "-o", "link"); strings.Count(out, "group default") != 2 || !strings.Contains(out, "other") {
		t.Errorf("there should be lo and other:\n%s", out)
	}
	for _, none := range [][]int{devices, nil} { // all are gone
		if err := h.Remove(none); err != nil {
			t.Error(err)
		}
	}
}

// An operator's interface may be in the group.
func TestHost_removeAsGroups(t *testing.T) {
	ns := netlab.New(t)
	devices := addLinks(t, ns, 3)
	ns.Run("ip", "tuntap", "add", "other", "mode", "tun")
	ns.Run("ip", "link", "set", "other", "group", "1008")
	h := openHost(t, ns)
	if err := h.removeAsGroups(devices, 1007, 2); !errors.Is(err, unix.EEXIST) || strings.Contains(err.Error(), "\n") {
		t.Error(err)
	}
	for name, there := range map[string]bool{"other": true, "t0": true, "t1": true} {
		if _, err := ns.Try("ip", "link", "show", name); (err == nil) != there {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := h.removeAsGroups(devices, 1009, 2); err != nil {
		t.Error(err)
	}
	if out := ns.Run("ip", "-o", "link"); strings.Count(out, "\n") != 2 || !strings.Contains(out, "group 1008") {
		t.Errorf("there should be lo and other:\n%s", out)
	}
}

// Each request has its error, however many there are.
func TestRequestSocket_executeAll(t *testing.T) {
	ns := netlab.New(t)
	device := addLinks(t, ns, 1)[0]
	h := openHost(t, ns)
	var requests []*nl.NetlinkRequest
	var want []error
	for i := range 2*atOnce + 1 {
		if i%3 == 0 {
			requests, want = append(requests, groupRequest(unix.RTM_NEWLINK, device+1000, 7)), append(want, unix.ENODEV)
		} else {
			requests, want = append(requests, groupRequest(unix.RTM_NEWLINK, device, 7)), append(want, nil)
		}
	}
	for range 2 { // messages that the first left unread do not disturb the second
		if failed := h.batch.executeAll(requests, -1); !slices.Equal(failed, want) {
			t.Error(failed)
		}
	}
	if failed := h.batch.executeAll(nil, -1); len(failed) != 0 {
		t.Error(failed)
	}
	h.Close()
	for i, err := range h.batch.executeAll(requests, -1) {
		if err != os.ErrClosed {
			t.Error(i, err)
		}
	}
}
