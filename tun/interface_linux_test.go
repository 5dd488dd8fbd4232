package tun

import (
	"encoding/binary"
	"errors"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ipipd/test/netlab"
)

func TestDeviceState(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		ns := netlab.New(t)
		d := openIn(t, ns, o)
		check := func(want State) {
			t.Helper()
			got, err := d.State()
			if index := got.Index; err != nil || index <= 0 || !strings.HasPrefix(ns.Run("ip", "-o", "link", "show", "dev", want.Name), strconv.Itoa(index)+":") {
				t.Errorf("State: %+v, %v", got, err)
			}
			if got.Index = 0; got != want {
				t.Errorf("State: %+v, want %+v", got, want)
			}
		}
		check(State{Name: "ipip1", MTU: 1500, Up: true, Carrier: true})
		if err := d.SetCarrier(false); err != nil {
			t.Error(err)
		}
		check(State{Name: "ipip1", MTU: 1500, Up: true})
		ns.Run("ip", "link", "set", "ipip1", "down", "mtu", "1400")
		check(State{Name: "ipip1", MTU: 1400})
	})
}

// The old name of a renamed or moved interface may be another interface's.
func TestDeviceSetMTU(t *testing.T) {
	t.Run("renamed", func(t *testing.T) {
		eachBackend(t, func(t *testing.T, o Options) {
			ns := netlab.New(t)
			d := openIn(t, ns, o)
			before, err := d.State()
			if err != nil {
				t.Fatal(err)
			}
			ns.Run("ip", "link", "set", "ipip1", "down")
			ns.Run("ip", "link", "set", "ipip1", "name", "tunx")
			ns.Run("ip", "tuntap", "add", "mode", "tun", "name", "ipip1")
			if err := d.SetMTU(1380); err != nil {
				t.Error(err)
			}
			want := State{Name: "tunx", Index: before.Index, MTU: 1380}
			if got, err := d.State(); got != want || err != nil {
				t.Errorf("State: %+v, %v, want %+v", got, err, want)
			}
			if out := ns.Run("ip", "link", "show", "dev", "ipip1"); !strings.Contains(out, "mtu 1500") {
				t.Errorf("another interface's MTU was set: %s", out)
			}
			if d.Name() != "ipip1" {
				t.Errorf("Name is %s", d.Name())
			}
		})
	})
	t.Run("moved", func(t *testing.T) {
		eachBackend(t, func(t *testing.T, o Options) {
			ns, other := netlab.New(t), netlab.New(t)
			d := openIn(t, ns, o)
			ns.Run("ip", "link", "set", "ipip1", "netns", other.Path(), "name", "inside")
			ns.Run("ip", "tuntap", "add", "mode", "tun", "name", "inside")
			other.Run("ip", "link", "set", "inside", "up")
			if err := d.SetMTU(1380); err == nil || !strings.Contains(err.Error(), "inside is in another network namespace") {
				t.Errorf("SetMTU: %v", err)
			}
			if got, err := d.State(); err == nil || got != (State{Name: "inside", Moved: true}) {
				t.Errorf("State: %+v, %v", got, err)
			}
			if out := ns.Run("ip", "link", "show", "dev", "inside"); !strings.Contains(out, "mtu 1500") {
				t.Errorf("another interface's MTU was set: %s", out)
			}
			other.Run("ip", "link", "set", "inside", "netns", ns.Path(), "name", "back")
			if got, err := d.State(); err != nil || got.Moved || got.Name != "back" {
				t.Errorf("State: %+v, %v", got, err)
			}
			ns.Run("ip", "link", "delete", "back")
			if got, err := d.State(); err == nil {
				t.Errorf("State of a deleted interface: %+v", got)
			}
		})
	})
}

func TestParseLink(t *testing.T) {
	for _, b := range [][]byte{nil, make([]byte, 15), make([]byte, 16), {17, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1}, {18, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1}} {
		if s, err := parseLink(b); !errors.Is(err, errBadLinkReply) {
			t.Errorf("%x: %+v, %v", b, s, err)
		}
	}
	refused := []byte{20, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xed, 0xff, 0xff, 0xff}
	if _, err := parseLink(refused); err != unix.ENODEV {
		t.Errorf("NLMSG_ERROR: %v", err)
	}
}

// A reply that could not be read is not taken for that of the next request.
func TestLinkRequest_unreadReply(t *testing.T) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	ask := func(name string) (State, error) {
		return linkRequest(fd, unix.RTM_GETLINK, 0, 0, unix.IFLA_IFNAME, append([]byte(name), 0))
	}
	want, err := ask("lo")
	if err != nil || want.Name != "lo" {
		t.Fatalf("%+v, %v", want, err)
	}
	unread := make([]byte, unix.SizeofNlMsghdr+unix.SizeofIfInfomsg)
	binary.NativeEndian.PutUint32(unread, uint32(len(unread)))
	binary.NativeEndian.PutUint16(unread[4:], unix.RTM_GETLINK)
	binary.NativeEndian.PutUint16(unread[6:], unix.NLM_F_REQUEST)
	binary.NativeEndian.PutUint32(unread[unix.SizeofNlMsghdr+4:], 1<<30) // no interface has this index
	if err := unix.Sendto(fd, unread, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		t.Fatal(err)
	}
	if got, err := ask("lo"); err != nil || got != want {
		t.Errorf("%+v, %v: want %+v", got, err, want)
	}
}
