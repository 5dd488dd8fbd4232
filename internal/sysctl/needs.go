package sysctl

import (
	"fmt"
	"io/fs"
	"net/netip"
)

// Server describes the real server of a load balancer: packets for an address of this host come out of
// the tunnel, and their answers leave by the underlay.
type Server struct {
	// Interface is the tunnel's. Addressed: it has an IPv4 address. Routed: all sources are routed into it.
	Interface         string
	Addressed, Routed bool
	// Served are the addresses that it serves.
	Served []netip.Addr
	// Shared are the interfaces on whose link the served addresses are: an ARP request for one comes there.
	Shared []string
}

// Need is the sysctls that do not have the values that a Server needs.
type Need struct {
	// Detail says what is set now, Remedy what to do.
	Detail, Remedy string
	Settings       []Setting
}

// RPFilter returns what rp_filter has to be on the tunnel's interface; nil if it is. Strict (1) drops each packet
// whose source is not routed into the interface. Loose (2) only wants a route to the source, but on an interface
// without an address the kernel (__fib_validate_source) takes it as 1.
func (s *Server) RPFilter(root fs.FS) *Need {
	all, own := read(root, "all", "rp_filter"), read(root, s.Interface, "rp_filter")
	value := max(all, own)
	if s.Routed || value == 0 || value == 2 && s.Addressed {
		return nil
	}
	n := &Need{Detail: fmt.Sprintf("%s is %d, %s %d", name(conf("all", "rp_filter")), all, name(conf(s.Interface, "rp_filter")), own)}
	if s.Addressed {
		n.add(conf(s.Interface, "rp_filter"), 2, true)
		n.Remedy = "sysctl -w " + n.Settings[0].String()
		return n
	}
	n.Detail += fmt.Sprintf("; %s has no address, so that the kernel takes 2 as 1", s.Interface)
	if all != 0 {
		n.add(conf("all", "rp_filter"), 0, false)
	}
	n.add(conf(s.Interface, "rp_filter"), 0, true)
	n.Remedy = "sysctl -w" + list(n.Settings)
	if all != 0 && len(s.Served) > 0 {
		n.Remedy = fmt.Sprintf("--address %v/32, so that the interface has an address, and sysctl -w %v; or ", s.Served[0], Setting{File: conf(s.Interface, "rp_filter"), Value: 2}) +
			n.Remedy + ", which other interfaces lose it by"
	}
	return n
}

// ARP returns what arp_ignore and arp_announce have to be on the links that a served address shares; nil if they
// are. With 0 the host answers for any of its addresses on any interface, and sends any as the sender's address.
// Another arp_ignore than 0 is taken as the operator's decision.
func (s *Server) ARP(root fs.FS) *Need {
	n := new(Need)
	for _, ifname := range s.Shared {
		ignore := max(read(root, "all", "arp_ignore"), read(root, ifname, "arp_ignore"))
		announce := max(read(root, "all", "arp_announce"), read(root, ifname, "arp_announce"))
		if ignore == 0 {
			n.add(conf(ifname, "arp_ignore"), 1, false)
		}
		if announce < 2 {
			n.add(conf(ifname, "arp_announce"), 2, false)
		}
		if ignore == 0 || announce < 2 {
			n.Detail += fmt.Sprintf(", on %s arp_ignore is %d, arp_announce %d", ifname, ignore, announce)
		}
	}
	if n.Settings == nil {
		return nil
	}
	n.Detail = fmt.Sprintf("%v%s", s.Served[0], n.Detail)
	n.Remedy = "sysctl -w" + list(n.Settings)
	return n
}

func (n *Need) add(file string, value int, ours bool) {
	n.Settings = append(n.Settings, Setting{file, value, ours})
}

func list(settings []Setting) (text string) {
	for _, s := range settings {
		text += " " + s.String()
	}
	return text
}

// read returns a sysctl, 0 if it cannot be read: nothing is needed of an interface that is gone.
func read(root fs.FS, ifname, key string) int {
	n, _ := Read(root, conf(ifname, key))
	return n
}
