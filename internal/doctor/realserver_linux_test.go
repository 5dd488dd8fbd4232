package doctor

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"ipipd/internal/netstate"
	"ipipd/internal/tunnel"
)

// What a real server would warn of is found before it is started, each with its command.
func TestExamine_realServer(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	served := netip.MustParsePrefix("192.0.2.5/32")
	l.config.RemoteAddress, l.config.LocalAddress, l.config.Addresses = tunnel.AnyRemote, netip.Addr{}, nil
	l.config.AcceptFrom, l.config.AcceptTo = []netip.Prefix{netip.MustParsePrefix("192.0.2.2/32")}, []netip.Prefix{served}
	find := func() (codes []Code, commands string) {
		for _, f := range l.examine().Findings {
			if slices.Contains([]Code{VIPMissing, VIPAnswered, SYNACKMSS}, f.Code) {
				codes, commands = append(codes, f.Code), commands+f.Do+"\n"
			}
		}
		return codes, commands
	}
	if codes, _ := find(); !slices.Equal(codes, []Code{VIPMissing}) {
		t.Errorf("without the address: %v", codes)
	}
	l.config.Addresses = []netstate.InterfaceAddress{{Prefix: served}}
	l.here.Run("ip", "route", "add", "default", "via", remote)
	codes, commands := find()
	if !slices.Equal(codes, []Code{VIPAnswered, SYNACKMSS}) {
		t.Errorf("with it: %v", codes)
	}
	for _, want := range []string{"net.ipv4.conf.eth0.arp_ignore=1 net.ipv4.conf.eth0.arp_announce=2", "ip route change default via 192.0.2.2 dev eth0 advmss 1440"} {
		if !strings.Contains(commands, want) {
			t.Errorf("want %s in\n%s", want, commands)
		}
	}
	l.here.Sysctl("net.ipv4.conf.eth0.arp_ignore", "1")
	l.here.Sysctl("net.ipv4.conf.eth0.arp_announce", "2")
	l.here.Run("ip", "route", "change", "default", "via", remote, "advmss", "1440")
	if codes, commands := find(); codes != nil {
		t.Errorf("as it should be: %v, %s", codes, commands)
	}
}
