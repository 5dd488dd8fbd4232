package doctor

import (
	"fmt"
	"net/netip"

	"ipipd/internal/netstate"
	"ipipd/internal/warning"
)

// realServer says what of the host keeps the real server of a load balancer from working, once it is started: a
// running one warns of that itself.
func (e *examination) realServer() {
	for _, s := range e.tunnels {
		if s.running() || !s.Config.RealServer() {
			continue
		}
		interfaces, err := e.Addresses()
		if err != nil {
			e.skip(s, "the addresses cannot be read: %v", err)
			return
		}
		if len(s.Config.Addresses) > 0 { // which its interface will have
			will := netstate.AddressedInterface{Name: s.ifname}
			for _, a := range s.Config.Addresses {
				will.Addresses = append(will.Addresses, a.Prefix)
			}
			interfaces = append(interfaces, will)
		}
		server := s.Config.Served(s.ifname, interfaces)
		if n := server.ARP(e.Files); n != nil {
			e.warn(warning.VIPAnswered, s, n.Detail, "--manage-sysctls, or "+n.Remedy)
		}
		if len(server.Served) == 0 && !s.Config.LocalAddress.IsValid() {
			e.warn(warning.VIPMissing, s, s.Config.AcceptTo[0].String(), s.Config.AddServed())
		}
		e.synAckMSS(s)
	}
}

func (e *examination) synAckMSS(s *subject) {
	const headers, overhead, ethernet = 40, 20, 1500
	mtu := s.Config.MTU
	if mtu == 0 {
		mtu = ethernet - overhead
	}
	answers, err := e.ReplyRoute(netip.Addr{})
	if err != nil || answers.MSS() <= mtu-headers {
		return
	}
	e.warn(warning.SYNACKMSS, s, fmt.Sprintf("MSS %d, and the MTU of %s will be %d", answers.MSS(), s.ifname, mtu), answers.SetMSS(mtu-headers))
}
