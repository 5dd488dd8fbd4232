package sysctl

import (
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"testing/fstest"
)

// tree is a file system with values of net.ipv4.conf: "eth0/arp_ignore=1 …". All others are 0.
func tree(values string) fstest.MapFS {
	files := fstest.MapFS{}
	for _, i := range []string{"all", "default", "ipip0", "eth0", "eth0.7"} {
		for _, key := range []string{"rp_filter", "arp_ignore", "arp_announce"} {
			files["proc/sys/"+conf(i, key)] = &fstest.MapFile{Data: []byte("0\n")}
		}
	}
	for v := range strings.FieldsSeq(values) {
		file, value, _ := strings.Cut(v, "=")
		files["proc/sys/net/ipv4/conf/"+file] = &fstest.MapFile{Data: []byte(value + "\n")}
	}
	return files
}

func TestServer_RPFilter(t *testing.T) {
	for all := range 3 {
		for own := range 3 {
			root := tree("all/rp_filter=" + strconv.Itoa(all) + " ipip0/rp_filter=" + strconv.Itoa(own))
			// As the kernel has it, tried on Linux 6.18.
			for _, c := range []struct {
				s        Server
				dropped  bool
				settings string
			}{
				{Server{}, max(all, own) > 0, map[bool]string{true: " net.ipv4.conf.all.rp_filter=0"}[all > 0] + " net.ipv4.conf.ipip0.rp_filter=0"},
				{Server{Addressed: true}, max(all, own) == 1, " net.ipv4.conf.ipip0.rp_filter=2"},
				{Server{Routed: true}, false, ""},
			} {
				c.s.Interface = "ipip0"
				switch n := c.s.RPFilter(root); {
				case n == nil && c.dropped, n != nil && !c.dropped:
					t.Errorf("all %d, own %d, %+v: %+v", all, own, c.s, n)
				case n != nil && list(n.Settings) != c.settings:
					t.Errorf("all %d, own %d, %+v: %s, want %s", all, own, c.s, list(n.Settings), c.settings)
				}
			}
		}
	}
}

func TestServer_ARP(t *testing.T) {
	s := Server{Interface: "ipip0", Served: []netip.Addr{netip.MustParseAddr("192.0.2.5")}, Shared: []string{"eth0", "eth0.7"}}
	for _, c := range []struct{ values, want string }{
		{"", " net.ipv4.conf.eth0.arp_ignore=1 net.ipv4.conf.eth0.arp_announce=2 net.ipv4.conf.eth0/7.arp_ignore=1 net.ipv4.conf.eth0/7.arp_announce=2"},
		{"all/arp_ignore=1 eth0/arp_announce=2 eth0.7/arp_announce=1", " net.ipv4.conf.eth0/7.arp_announce=2"},
		{"all/arp_ignore=8 all/arp_announce=2", ""},
		{"eth0/arp_ignore=2 eth0.7/arp_ignore=3 all/arp_announce=2", ""},
	} {
		n := s.ARP(tree(c.values))
		if n == nil {
			n = new(Need)
		}
		if got := list(n.Settings); got != c.want || got != "" && n.Remedy != "sysctl -w"+got {
			t.Errorf("%q: %s, remedy %s, want %s", c.values, got, n.Remedy, c.want)
		}
	}
	s.Shared = nil
	if n := s.ARP(tree("")); n != nil {
		t.Errorf("on no link: %+v", n)
	}
}
