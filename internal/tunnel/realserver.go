package tunnel

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"ipipd/internal/netstate"
	"ipipd/internal/sysctl"
	"ipipd/internal/warning"
)

// The real server of a load balancer: a tunnel with accept-from and accept-to, where answers leave by the
// underlay. Whether the host's rp_filter, ARP and MSS settings suit it is looked at in rounds of control that
// something else has caused, since no netlink message tells of most of them.

const (
	// realServerGap is the least time between two looks; while something is wrong the next one comes after
	// retryInterval at the latest.
	realServerGap = time.Second
)

// realServer is what control knows of the tunnel as a real server.
type realServer struct {
	lookedAt time.Time // when the host was last looked at
	due      time.Time // when the next look is due; zero: in the next round, if there is one
	ours     int       // the ifindex of the tunnel's interface when its own sysctls were set
}

// realServerCodes are the warnings about a real server.
var realServerCodes = []warning.Code{
	warning.SysctlNotSet, warning.RPFilterTunnel, warning.VIPMissing, warning.VIPAnswered, warning.SYNACKMSS,
}

// RealServer reports whether this host is a real server: packets come out of the tunnel whose answers leave elsewhere.
func (c *Config) RealServer() bool { return c.many() && len(c.AcceptFrom) > 0 && len(c.AcceptTo) > 0 }

// warnRealServer looks at the host's settings, warns of unsuitable ones and, with manage-sysctls, sets them.
func (c *control) warnRealServer(now time.Time) {
	s := &c.realServer
	if !c.cfg.RealServer() || !c.interfacePresent() {
		if !s.lookedAt.IsZero() {
			for _, code := range realServerCodes {
				c.clear(code)
			}
			*s = realServer{}
			c.engine.sysctls.release(c.Tunnel)
		}
		return
	}
	managed := c.engine.sysctls
	if managed == nil {
		return
	}
	if gap := s.lookedAt.Add(realServerGap); !s.lookedAt.IsZero() && now.Before(gap) {
		s.due = gap
		return
	}
	s.lookedAt, s.due = now, time.Time{}
	interfaces, err := netstate.InterfaceAddresses()
	if err != nil {
		c.log.Debug("the interfaces cannot be read", "err", err)
		s.due = now.Add(retryInterval)
		return
	}
	server := c.cfg.Served(c.ifname.get(), interfaces)
	answers := c.returnRoute(server.Served)
	server.Routed = answers != nil && answers.Device == c.ifindex
	if managed.manage {
		c.warnErr(warning.SysctlNotSet, c.setSysctls(server))
	}
	root := os.DirFS("/")
	c.warnNeed(warning.RPFilterTunnel, server.RPFilter(root))
	c.warnNeed(warning.VIPAnswered, server.ARP(root))
	c.warnMissing(server)
	c.warnMSS(answers)
	if slices.ContainsFunc(realServerCodes, c.warned) {
		s.due = now.Add(retryInterval)
	}
}

// Served finds the addresses of accept-to that this host has, and the interfaces whose subnet has one that is not the
// interface's own: there ARP requests for it come.
func (c *Config) Served(ifname string, interfaces []netstate.AddressedInterface) *sysctl.Server {
	s := &sysctl.Server{Interface: ifname}
	owners := map[netip.Addr][]int{}
	for _, i := range interfaces {
		s.Addressed = s.Addressed || i.Name == ifname
		for _, p := range i.Addresses {
			a := p.Addr()
			if slices.ContainsFunc(c.AcceptTo, func(to netip.Prefix) bool { return to.Contains(a) }) {
				if owners[a] == nil {
					s.Served = append(s.Served, a)
				}
				owners[a] = append(owners[a], i.Index)
			}
		}
	}
	for _, i := range interfaces {
		onLink := func(a netip.Addr) bool {
			return !slices.Contains(owners[a], i.Index) && slices.ContainsFunc(i.Addresses, func(p netip.Prefix) bool { return p.Contains(a) })
		}
		if i.ARP && slices.ContainsFunc(s.Served, onLink) {
			s.Shared = append(s.Shared, i.Name)
		}
	}
	return s
}

// returnRoute returns the route that answers from a served address take; nil if there is none.
func (c *control) returnRoute(served []netip.Addr) *netstate.ReplyRoute {
	for _, a := range served {
		if r, err := netstate.FindReplyRoute(a); err == nil {
			return &r
		}
	}
	return nil
}

func (c *control) warnNeed(code warning.Code, n *sysctl.Need) {
	if n == nil {
		c.clear(code)
		return
	}
	c.raise(code, n.Detail, n.Remedy)
}

// warnMissing warns if the host has none of the addresses that it is to serve.
func (c *control) warnMissing(s *sysctl.Server) {
	if len(s.Served) > 0 || !c.route.Load().receiveOnly {
		c.clear(warning.VIPMissing)
		return
	}
	c.raise(warning.VIPMissing, join(c.cfg.AcceptTo), c.cfg.AddServed())
}

// AddServed is the remedy of VIPMissing; "" if accept-to does not say which address.
func (c *Config) AddServed() string {
	if to := c.AcceptTo[0]; to.Bits() == 32 {
		return fmt.Sprintf("ip address add %v dev lo, or --address %[1]v", to)
	}
	return ""
}

// warnMSS warns if the MSS of a SYN-ACK lets clients send longer packets than the tunnel takes.
func (c *control) warnMSS(answers *netstate.ReplyRoute) {
	mtu := int(c.mtu.Load())
	const headers = 40 // of IPv4 and TCP
	if answers == nil || answers.Device == c.ifindex || answers.MSS() <= mtu-headers {
		c.clear(warning.SYNACKMSS)
		return
	}
	c.raise(warning.SYNACKMSS, fmt.Sprintf("MSS %d, and the MTU of %s is %d", answers.MSS(), c.ifname.get(), mtu),
		fmt.Sprintf("%s; or --mtu %d, if the way from the balancer takes packets of %d bytes", answers.SetMSS(mtu-headers), answers.MSS()+headers, answers.MSS()+headers+20))
}

// setSysctls sets the sysctls that the real server needs.
func (c *control) setSysctls(server *sysctl.Server) error {
	root, s := os.DirFS("/"), &c.realServer
	var settings []sysctl.Setting
	for _, n := range []*sysctl.Need{server.RPFilter(root), server.ARP(root)} {
		if n != nil {
			settings = append(settings, n.Settings...)
		}
	}
	if s.ours == c.ifindex { // those of the interface itself are set once: an operator may have changed them
		settings = slices.DeleteFunc(settings, func(s sysctl.Setting) bool { return s.Ours })
	}
	s.ours = c.ifindex
	done, err := c.engine.sysctls.set(c.Tunnel, settings)
	if len(done) > 0 {
		c.log.Info("sysctls are set", "sysctls", settingsText(done))
	}
	return err
}

func settingsText(settings []sysctl.Setting) string {
	var b strings.Builder
	for _, s := range settings {
		fmt.Fprintf(&b, " %v", s)
	}
	return strings.TrimSpace(b.String())
}

// managedSysctls are the sysctls that the tunnels of a process have set.
type managedSysctls struct {
	manage bool // manage-sysctls

	mu      sync.Mutex
	manager sysctl.Manager
	users   map[*Tunnel]bool
}

func (m *managedSysctls) set(t *Tunnel, settings []sysctl.Setting) (done []sysctl.Setting, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.users == nil {
		m.users = map[*Tunnel]bool{}
	}
	m.users[t] = true
	return m.manager.Set(settings)
}

// release notes that t needs no sysctls any more. Once no tunnel does, all are set back, unless left to the next process.
func (m *managedSysctls) release(t *Tunnel) {
	if m == nil || t.engine.leaving.Load() {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.users[t] {
		if delete(m.users, t); len(m.users) == 0 {
			m.restoreLocked(t.engine)
		}
	}
}

// restore sets back the sysctls that this process, or one that was killed, has left set.
func (m *managedSysctls) restore(e *Engine) {
	if m != nil && m.manager.Dir != "" {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.restoreLocked(e)
	}
}

// end is restore, unless the sysctls are left to the next process.
func (m *managedSysctls) end(e *Engine) {
	switch {
	case m == nil:
	case e.leaving.Load():
		m.manager.Leave()
	default:
		m.restore(e)
	}
}

func (m *managedSysctls) restoreLocked(e *Engine) {
	back, err := m.manager.Restore()
	if len(back) > 0 {
		e.log.Info("sysctls are set back", "sysctls", settingsText(back))
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		e.log.Warn("a sysctl cannot be set back: sysctl -w it", "err", err)
	}
}
