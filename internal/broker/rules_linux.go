package broker

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"

	"golang.org/x/sys/unix"

	"ipipd/internal/privileged"
	"ipipd/internal/tunnel"
)

// rules are what a process may request by its configurations.
type rules struct {
	byName   map[string][]*tunnel.Config // by the name of the interface
	unnamed  []*tunnel.Config            // without a name: the interface is the first free ipipN
	marks    map[uint32]bool
	fastPath bool // a tunnel may have it
	ipsec    bool
	ikeLocal map[[4]byte]bool
	anyLocal bool // a tunnel with IPsec takes the source of its route
}

func newRules(lists ...[]tunnel.Config) *rules {
	r := &rules{byName: map[string][]*tunnel.Config{}, marks: map[uint32]bool{0: true}, ikeLocal: map[[4]byte]bool{}}
	for _, configs := range lists {
		for i := range configs {
			c := &configs[i]
			if c.Name == "" {
				r.unnamed = append(r.unnamed, c)
			} else {
				name := tunnel.InterfaceName(c.Name)
				r.byName[name] = append(r.byName[name], c)
			}
			r.marks[c.FwMark] = true
			r.fastPath = r.fastPath || c.FastPathAllowed()
			switch {
			case !c.IPsec.Wanted():
				continue
			case c.LocalAddress.Is4():
				r.ikeLocal[c.LocalAddress.As4()] = true
			default:
				r.anyLocal = true
			}
			r.ipsec = true
		}
	}
	return r
}

var automaticName = regexp.MustCompile(`^ipip[1-9][0-9]{0,4}$`)

// configs returns the configurations of the tunnels that may have an interface of that name; nil: none.
func (r *rules) configs(name string) []*tunnel.Config {
	if len(r.unnamed) > 0 && automaticName.MatchString(name) {
		return slices.Concat(r.byName[name], r.unnamed)
	}
	return r.byName[name]
}

// refusal is why a request is not done.
type refusal string

func (r refusal) Error() string { return string(r) }

func refuse(format string, args ...any) error { return refusal(fmt.Sprintf(format, args...)) }

// host is the part of the host's state that a check needs.
type host struct {
	name  func(index uint32) string // of an interface; "" if it is gone
	table func(index uint32) uint32 // of its routes: main, or its VRF's
}

// object says what the descriptor of a request is.
type object struct {
	tun           bool // an open /dev/net/tun
	domain, typ   int  // of a socket
	hasDescriptor bool
}

// maxBuffer is the largest socket buffer, in bytes.
const maxBuffer = 16 << 20

// check returns a refusal unless the rules allow the request. Nothing but its nil error lets a request be done.
func (r *rules) check(verb byte, f privileged.Fields, o object, h host) error {
	if want := !slices.Contains(withoutDescriptor, verb); verb != privileged.Netlink && want != o.hasDescriptor {
		return refuse("a request with another number of descriptors")
	}
	switch verb {
	case privileged.Netlink:
		return r.checkNetlink(f.U32(0), f[1], o.hasDescriptor, h)
	case privileged.Socket:
		if p := f.U32(0); p != unix.IPPROTO_IPIP && (p != unix.IPPROTO_ESP || !r.ipsec) {
			return refuse("a raw socket of protocol %d", p)
		}
		return nil
	case privileged.SetOption:
		return r.checkOption(int(f.U32(0)), int(f.U32(1)), f.U32(2), o)
	case privileged.Bind:
		port := f.U32(1)
		if len(f[0]) != 4 || o.domain != unix.AF_INET || o.typ != unix.SOCK_DGRAM {
			return refuse("an address for another socket than one of UDP")
		}
		address := [4]byte(f[0])
		if !r.ipsec || port != 500 && port != 4500 || address == [4]byte{} || !r.anyLocal && !r.ikeLocal[address] {
			return refuse("UDP port %d of %v", port, netip.AddrFrom4(address))
		}
		return nil
	case privileged.AttachTUN:
		const need, may = unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR, unix.IFF_MULTI_QUEUE | unix.IFF_TUN_EXCL
		name, flags := string(f[0]), f.U32(1)
		if !o.tun || flags&^may != need || r.configs(name) == nil {
			return refuse("the interface %.20q", name)
		}
		return nil
	case privileged.Netns:
		if !o.tun {
			return refuse("the namespace of what is no interface")
		}
		return nil
	case privileged.Programs:
		return nil // it reads
	case privileged.SetRPS, privileged.ClearRPS:
		name, mask := string(f[0]), string(f[1])
		if mask == "" || !slices.ContainsFunc(r.configs(name), func(c *tunnel.Config) bool { return c.RPS == mask }) {
			return refuse("rps %.20q of %.20q", mask, name)
		}
		return nil
	case privileged.CaptureRing:
		if !r.fastPath {
			return refuse("the ring buffer of a capture, without a tunnel that may have the fast path")
		}
		return nil
	}
	return refuse("an unknown request %d", verb)
}

func (r *rules) checkOption(level, name int, value uint32, o object) error {
	if o.domain != unix.AF_INET || o.typ != unix.SOCK_RAW && o.typ != unix.SOCK_DGRAM {
		return refuse("an option of another socket than a raw one or one of UDP")
	}
	ok := false
	switch {
	case level == unix.SOL_SOCKET && (name == unix.SO_RCVBUFFORCE || name == unix.SO_SNDBUFFORCE):
		ok = value <= maxBuffer
	case level == unix.SOL_SOCKET && name == unix.SO_MARK:
		ok = r.marks[value]
	case level == unix.SOL_SOCKET && name == unix.SO_BINDTOIFINDEX:
		ok = int32(value) >= 0
	case level == unix.IPPROTO_IP && name == unix.IP_TRANSPARENT:
		ok = o.typ == unix.SOCK_RAW && value == 1
	}
	if !ok {
		return refuse("socket option %d of level %d as %d", name, level, value)
	}
	return nil
}

// withoutDescriptor are the requests that name no descriptor.
var withoutDescriptor = []byte{privileged.Socket, privileged.Programs, privileged.SetRPS, privileged.ClearRPS, privileged.CaptureRing}

// fieldCounts has the number of fields of each verb's request.
var fieldCounts = map[byte]int{
	privileged.Netlink: 2, privileged.Socket: 1, privileged.SetOption: 3, privileged.Bind: 2, privileged.AttachTUN: 2,
	privileged.Netns: 0, privileged.Programs: 1, privileged.SetRPS: 2, privileged.ClearRPS: 2, privileged.CaptureRing: 0,
}

// parse reads the fields of a request.
func parse(verb byte, b []byte) (f privileged.Fields, err error) {
	n, ok := fieldCounts[verb]
	if !ok {
		return nil, refuse("an unknown request %d", verb)
	}
	if f, err = privileged.Parse(b, n); err != nil {
		return nil, refuse("a broken request %d", verb)
	}
	return f, nil
}
