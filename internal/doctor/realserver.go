package doctor

import (
	"fmt"
	"net/netip"

	"ipipd/internal/netstate"
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
			e.found(VIPAnswered, s, "this host answers ARP for an address of the load balancer: "+n.Detail,
				"packets for it come here, past the balancer", "--manage-sysctls, or "+n.Remedy)
		}
		if len(server.Served) == 0 && !s.Config.LocalAddress.IsValid() {
			e.found(VIPMissing, s, fmt.Sprintf("no interface has an address of accept-to (%v)", s.Config.AcceptTo[0]),
				"what comes for it is routed on, or dropped", fmt.Sprintf("ip address add %v dev lo, or --address", s.Config.AcceptTo[0]))
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
	answers, err := e.AnswerRoute(netip.Addr{})
	if err != nil || answers.MSS() <= mtu-headers {
		return
	}
	e.found(SYNACKMSS, s, fmt.Sprintf("the MSS of SYN-ACKs is %d, and the MTU of %s will be %d", answers.MSS(), s.ifname, mtu),
		"the balancer has to fragment, or drop, what clients send", answers.SetMSS(mtu-headers))
}
