package underlay

import (
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ipipd/test/netlab"
)

// keeping keeps the receive sockets of a Socket, as a service manager does: descriptors by socket cookie.
type keeping struct {
	t    *testing.T
	kept map[uint64]int
}

func cookie(t *testing.T, fd int) uint64 {
	t.Helper()
	c, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func newKeeping(t *testing.T) *keeping {
	k := &keeping{t, map[uint64]int{}}
	t.Cleanup(func() {
		for _, fd := range k.kept {
			unix.Close(fd)
		}
	})
	return k
}

func dup(t *testing.T, fd int) int {
	t.Helper()
	d, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// options returns o with the kept sockets, for the Socket of the next process.
func (k *keeping) options(o SocketOptions) SocketOptions {
	for _, fd := range k.kept {
		o.Adopt = append(o.Adopt, dup(k.t, fd))
	}
	o.Opened = func(fd int) {
		c := cookie(k.t, fd)
		if k.kept[c] != 0 {
			k.t.Errorf("a socket is left twice")
		}
		k.kept[c] = dup(k.t, fd)
	}
	o.Closed = func(fd int) {
		c := cookie(k.t, fd)
		if k.kept[c] == 0 {
			k.t.Errorf("a socket is closed that was not left")
		}
		unix.Close(k.kept[c])
		delete(k.kept, c)
	}
	return o
}

// cookies returns the cookies of the receive sockets of s, sorted.
func cookies(t *testing.T, s Socket) (all []uint64) {
	for _, o := range s.(*socket).receiveSockets {
		all = append(all, cookie(t, o.fd))
	}
	slices.Sort(all)
	return all
}

// The Socket of the next process receives the packets that arrive while there is none, and those that
// the one before has not read; the kernel answers none of them.
func TestSocket_adopt(t *testing.T) {
	a, b, settle := threeAddresses(t)
	device := deviceIndex(t, a, "eth0")
	sender := open(t, b, SocketOptions{}).NewSender()
	unreachable := regexp.MustCompile(`(?m)^Icmp: \d.*$`)
	for _, c := range []struct {
		name      string
		reception Reception
		others    bool // packets of hostC are received, too
		link      bool
	}{
		{"raw", Reception{}, true, false},
		{"bound", Reception{Device: device, Local: hostA}, true, false},
		{"connected", Reception{Local: hostA, Remote: hostB}, false, false},
		{"packet", Reception{LinkLayer: true, LinkDevice: device}, true, true},
		{"packet-one-tunnel", Reception{LinkLayer: true, LinkDevice: device, Local: hostA, Remote: hostB}, false, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			id := uint16(0)
			var want []uint16
			send := func() {
				id += 2
				mustWrite(t, sender, pathB, outerPacket(pathB, 100, id))
				want = append(want, id)
				if c.others {
					mustWrite(t, sender, pathC, outerPacket(pathC, 100, id+1))
					want = append(want, id+1)
				}
				settle()
			}
			k := newKeeping(t)
			s := open(t, a, k.options(SocketOptions{Receivers: 2}))
			setReceive(t, a, s, c.reception)
			for range 2 {
				before := cookies(t, s)
				answered := unreachable.FindString(a.Run("cat", "/proc/self/net/snmp"))
				send()
				s.Close()
				send()
				s = open(t, a, k.options(SocketOptions{Receivers: 2}))
				send()
				setReceive(t, a, s, c.reception)
				send()
				raw, link := queued(t, s)
				if c.link {
					raw, link = link, raw
				}
				slices.Sort(raw)
				if !slices.Equal(raw, want) || len(link) > 0 {
					t.Errorf("received %v, and %v elsewhere, want %v", raw, link, want)
				}
				if got := unreachable.FindString(a.Run("cat", "/proc/self/net/snmp")); fieldsOf(got, 16) != fieldsOf(answered, 16) {
					t.Errorf("unreachables sent: %s, before %s", got, answered)
				}
				if got := cookies(t, s); !slices.Equal(got, before) || !slices.Equal(got, slices.Sorted(maps.Keys(k.kept))) {
					t.Errorf("sockets %v, before %v, kept %v", got, before, k.kept)
				}
				want = nil
			}
			// Its Reception can be changed as that of any other Socket.
			for _, r := range []Reception{{Local: hostA, Remote: hostC}, {LinkLayer: true, Local: hostA, Remote: hostB}, {}} {
				setReceive(t, a, s, r)
			}
			if !slices.Equal(cookies(t, s), slices.Sorted(maps.Keys(k.kept))) {
				t.Errorf("sockets %v, kept %v", cookies(t, s), k.kept)
			}
		})
	}
}

// fieldsOf returns the nth field of a line of /proc/net/snmp: OutDestUnreachs is 16.
func fieldsOf(line string, n int) string {
	if fields := strings.Fields(line); len(fields) > n {
		return fields[n]
	}
	return ""
}

// Sockets that are not as OpenSocket makes them are closed, and not kept any more.
func TestSocket_adoptOthers(t *testing.T) {
	ns, elsewhere := netlab.New(t), netlab.New(t)
	k := newKeeping(t)
	other := open(t, elsewhere, k.options(SocketOptions{}))
	other.Close() // those of another namespace
	for _, kind := range [][3]int{
		{unix.AF_INET, unix.SOCK_DGRAM, 0}, {unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP}, {unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_RAW},
		{unix.AF_PACKET, unix.SOCK_DGRAM, 0}, {unix.AF_PACKET, unix.SOCK_RAW, 0}, // without PACKET_VNET_HDR
		{unix.AF_UNIX, unix.SOCK_STREAM, 0}, {unix.AF_NETLINK, unix.SOCK_RAW, 0},
	} {
		var fd int
		var err error
		ns.Do(func() { fd, err = unix.Socket(kind[0], kind[1]|unix.SOCK_CLOEXEC, kind[2]) })
		if err != nil {
			t.Fatal(err)
		}
		k.kept[cookie(t, fd)] = fd
	}
	s := open(t, ns, k.options(SocketOptions{}))
	if got := cookies(t, s); !slices.Equal(got, slices.Sorted(maps.Keys(k.kept))) || len(got) != 3 {
		t.Errorf("sockets %v, kept %v", got, k.kept)
	}
	s.Close()
	// Another number of packet sockets: all are opened anew.
	s = open(t, ns, k.options(SocketOptions{Receivers: 3}))
	if got := cookies(t, s); !slices.Equal(got, slices.Sorted(maps.Keys(k.kept))) || len(got) != 5 {
		t.Errorf("sockets %v, kept %v", got, k.kept)
	}
	s.Close()
	// Nothing is left open after an error.
	o := k.options(SocketOptions{Receivers: 3})
	file, err := unix.MemfdCreate("file", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	o.Adopt = append(o.Adopt, file)
	o.Closed = nil
	before := openFiles(t)
	s = open(t, ns, o)
	s.Close()
	if got := openFiles(t); got != before-len(o.Adopt) {
		t.Errorf("%d are open, %d before, want %d fewer", got, before, len(o.Adopt))
	}
}
