package netstate

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"ipipd/internal/privileged"
)

// link is what is read of an RTM_NEWLINK. Two are equal if no property that matters differs.
type link struct {
	index     int
	name      string
	altNames  string // each with a space in front
	kind      uint16 // ARPHRD_ETHER, …
	flags     uint32 // IFF_UP, …, without volatileFlags
	operstate uint8
	mtu       int
	master    int // index
	slaveKind string
	vrfTable  uint32 // the table of a VRF, else 0
	mac       [6]byte
	hasMAC    bool // the address has six octets
	// promiscuous: a capture, for instance, wants all packets.
	promiscuous bool
}

// volatileFlags do not change how the kernel routes.
const volatileFlags = unix.IFF_PROMISC | unix.IFF_ALLMULTI

func (l *link) up() bool { return l.flags&unix.IFF_UP != 0 }

// names returns the interface's name and alternative names.
func (l *link) names() []string { return append(strings.Fields(l.altNames), l.name) }

// From linux/if_link.h.
const (
	iflaPropList     = 52 // IFLA_PROP_LIST
	iflaAltIfname    = 53 // IFLA_ALT_IFNAME
	iflaSlaveKind    = 4  // IFLA_INFO_SLAVE_KIND
	filterSkipStats  = 1 << 3
	iflaExtendedMask = 29 // IFLA_EXT_MASK
)

// parseLink reads an RTM_NEWLINK or RTM_DELLINK that starts at its ifinfomsg. ok is false
// for a partial message: about a bridge's port, or wireless extensions.
func parseLink(b []byte) (l link, ok bool) {
	if len(b) < unix.SizeofIfInfomsg || b[0] != unix.AF_UNSPEC {
		return link{}, false
	}
	const kind, index, flags = 2, 4, 8
	l = link{
		kind:  binary.NativeEndian.Uint16(b[kind:]),
		index: int(binary.NativeEndian.Uint32(b[index:])),
		flags: binary.NativeEndian.Uint32(b[flags:]) &^ volatileFlags,
	}
	err := eachAttr(b[unix.SizeofIfInfomsg:], func(kind uint16, value []byte) error {
		switch kind {
		case unix.IFLA_IFNAME:
			l.name = unix.ByteSliceToString(value)
		case unix.IFLA_MTU:
			l.mtu, ok = int(u32(value)), true
		case unix.IFLA_OPERSTATE:
			if len(value) > 0 {
				l.operstate = value[0]
			}
		case unix.IFLA_MASTER:
			l.master = int(u32(value))
		case unix.IFLA_ADDRESS:
			if l.hasMAC = len(value) == len(l.mac); l.hasMAC {
				l.mac = [6]byte(value)
			}
		case unix.IFLA_PROMISCUITY:
			l.promiscuous = u32(value) != 0
		case unix.IFLA_LINKINFO:
			return l.parseInfo(value)
		case iflaPropList:
			return eachAttr(value, func(kind uint16, value []byte) error {
				if kind == iflaAltIfname {
					l.altNames += " " + unix.ByteSliceToString(value)
				}
				return nil
			})
		}
		return nil
	})
	return l, ok && err == nil
}

// parseInfo reads IFLA_LINKINFO.
func (l *link) parseInfo(b []byte) error {
	isVRF := false
	return eachAttr(b, func(kind uint16, value []byte) error {
		switch kind {
		case unix.IFLA_INFO_KIND:
			isVRF = unix.ByteSliceToString(value) == "vrf"
		case iflaSlaveKind:
			l.slaveKind = unix.ByteSliceToString(value)
		case unix.IFLA_INFO_DATA: // comes after its kind
			return eachAttr(value, func(kind uint16, value []byte) error {
				if isVRF && kind == nl.IFLA_VRF_TABLE {
					l.vrfTable = u32(value)
				}
				return nil
			})
		}
		return nil
	})
}

// getLinks returns all interfaces, or the one that has the index, or the name if it is
// not "".
func (r *requester) getLinks(index int, name string) (all []link, err error) {
	messages, err := r.getLinkMessages(index, name)
	for _, m := range messages {
		if l, ok := parseLink(m); ok {
			all = append(all, l)
		}
	}
	return all, err
}

// getLinkMessages returns the messages that getLinks parses.
func (r *requester) getLinkMessages(index int, name string) ([][]byte, error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETLINK, 0)
	info := nl.NewIfInfomsg(unix.AF_UNSPEC)
	info.Index = int32(index)
	req.AddData(info)
	req.AddData(nl.NewRtAttr(iflaExtendedMask, nl.Uint32Attr(filterSkipStats)))
	execute := r.dump
	if index != 0 || name != "" {
		execute = r.execute
	}
	if attribute := unix.IFLA_IFNAME; name != "" { // which also finds an alternative name that is short
		if len(name) >= unix.IFNAMSIZ {
			attribute = iflaAltIfname
		}
		req.AddData(nl.NewRtAttr(attribute, nl.ZeroTerminated(name)))
	}
	return execute(req, unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
}

// getLink is getLinks for one; ENODEV says that there is none.
func (r *requester) getLink(index int, name string) (link, error) {
	all, err := r.getLinks(index, name)
	if err == nil && len(all) != 1 {
		err = unix.ENODEV
	}
	if err != nil {
		return link{}, err
	}
	return all[0], nil
}

// permission adds the missing privilege to an error of EPERM or EACCES.
func permission(err error) error {
	if errors.Is(err, os.ErrPermission) {
		return fmt.Errorf("%w: it takes CAP_NET_ADMIN: %s", err, privileged.Remedy)
	}
	return err
}

// DeviceIndex returns the ifindex of an interface; a *NoDeviceError if there is none of that name.
func (r *requester) DeviceIndex(ifname string) (int, error) {
	l, err := r.getLink(0, ifname)
	if errors.Is(err, unix.ENODEV) {
		return 0, &NoDeviceError{ifname}
	}
	if err != nil {
		return 0, fmt.Errorf("look up interface %q: %w", ifname, permission(err))
	}
	return l.index, nil
}
