// Package doctor finds what keeps a tunnel from working, or will, and says what mends it.
//
// Each check is one function that looks at the host through an Environment and adds Findings. It
// changes nothing: it reads files, netlink and the rules of nft and iptables-save, and sends a few
// probes. What could not be checked is in Report.Skipped, with the reason: no check passes silently.
//
// Limits: IPv4, and Linux. The rules of a firewall elsewhere show only in what does not come back.
package doctor

import (
	"cmp"
	"context"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"ipipd/internal/netstate"
	"ipipd/internal/tunnel"
	"ipipd/internal/warning"
	"ipipd/keepalive"
)

// Severity is how bad a Finding is. A Note does not count in Report.Status.
type Severity = warning.Severity

// The severities that a running tunnel's warnings have, too.
const (
	Broken  = warning.Broken
	Warning = warning.Warning
	Note    = warning.Note
)

// Finding is one thing that is wrong.
type Finding struct {
	Code     Code     `json:"code"`
	Severity Severity `json:"severity"`
	// Tunnel is the name of the tunnel that it is about; "" is the host.
	Tunnel string `json:"tunnel,omitzero"`
	// What is wrong, Why it matters, and what to Do: a command wherever there is one.
	What string `json:"what"`
	Why  string `json:"why"`
	Do   string `json:"do"`
}

// Skipped is a check that was not made, or only in part, and why.
type Skipped struct {
	Check  string `json:"check"`
	Tunnel string `json:"tunnel,omitzero"`
	Reason string `json:"reason"`
}

// Report is what Examine has found, the worst first.
type Report struct {
	// Tunnels has the names of the tunnels examined.
	Tunnels  []string  `json:"tunnels"`
	Findings []Finding `json:"findings"`
	Skipped  []Skipped `json:"skipped"`
}

// Count returns the number of findings of severity s.
func (r *Report) Count(s Severity) (n int) {
	for i := range r.Findings {
		if r.Findings[i].Severity == s {
			n++
		}
	}
	return n
}

// Status returns the exit status: 2 if something is broken, 1 with warnings, else 0.
func (r *Report) Status() int {
	switch {
	case r.Count(Broken) > 0:
		return 2
	case r.Count(Warning) > 0:
		return 1
	}
	return 0
}

// Tunnel is a tunnel to examine.
type Tunnel struct {
	Config tunnel.Config
	// Status is of the running tunnel; nil if it does not run.
	Status *tunnel.Status
	// Started is when it was started, by the wall clock at that moment; zero if unknown.
	Started time.Time
}

// Environment is the host. Examine calls its functions on one goroutine, but for Resolve.
type Environment struct {
	// Files is the root of the file system.
	Files fs.FS
	Now   func() time.Time
	// Network answers where outer packets go, as netstate.Host does.
	Network func(netstate.Query) (*netstate.Answer, error)
	// KernelTunnels are the kernel's own tunnels of protocol 4.
	KernelTunnels func() ([]netstate.KernelTunnel, error)
	// Routes returns all unicast routes, by the ifindex of their output interface.
	Routes     func() (map[int][]netstate.RouteMetrics, error)
	Interfaces func() ([]net.Interface, error)
	// Addresses returns the addresses of all interfaces; ReplyRoute the route from source, or from any, to the Internet.
	Addresses  func() ([]netstate.AddressedInterface, error)
	ReplyRoute func(source netip.Addr) (netstate.ReplyRoute, error)
	// OpenTUN opens /dev/net/tun and closes it.
	OpenTUN func() error
	// Resolve is called concurrently.
	Resolve func(ctx context.Context, name string) (netip.Addr, error)
	// Command runs a program that changes nothing; the error is exec.ErrNotFound if it is not installed.
	Command func(ctx context.Context, name string, args ...string) ([]byte, error)
	// Probe probes all remotes at once, waits a few seconds at most, and returns a Reply for each Ask.
	Probe func(context.Context, []Ask) ([]Reply, error)
	// ClockSynchronized reports what the kernel knows of NTP.
	ClockSynchronized func() (bool, error)
	// MaxFiles is the largest RLIMIT_NOFILE that this process may set.
	MaxFiles func() (uint64, error)
	// Threads is the number of threads that send, and of those that receive.
	Threads int
}

// subject is a Tunnel, and what all checks need to know of it.
type subject struct {
	*Tunnel
	name          string
	ifname        string
	local, remote netip.Addr   // the outer addresses in use; invalid if not known
	remotes       []*subject   // with many remotes: one for each that was looked up
	senders       []*subject   // hosts of accept-from that are not among remotes
	prefix        netip.Prefix // a prefix routed to this one of many remotes
	answer        *netstate.Answer
	reply         *Reply // nil if it was not probed
	unsized       bool   // its path MTU was not probed: see maxSized
	encrypted     bool
	warned        []Code // what the running tunnel warns of itself: found leaves these out
}

// running reports whether a process has the tunnel.
func (s *subject) running() bool { return s.Status != nil && !s.Config.Disabled }

// hasPath reports whether outer packets can be sent, and not into the tunnel itself.
func (s *subject) hasPath() bool {
	return s.answer != nil && s.answer.Err == nil && s.remote.IsValid() && !s.answer.Route.Local && s.device() != s.ifname
}

// heard reports whether the running tunnel hears its peer now, and not only within the keepalive's hold time.
func (e *examination) heard(s *subject) bool {
	const missed = 3
	return s.running() && s.Status.KeepaliveState == keepalive.Up.String() &&
		e.Now().Sub(s.Status.LastHeard) <= missed*s.Config.Keepalive.Interval
}

// device returns the name of the underlay device.
func (s *subject) device() string { return s.answer.Route.DeviceName }

// examination is the state of one Examine.
type examination struct {
	*Environment
	ctx     context.Context
	tunnels []*subject
	others  []tunnel.Status
	report  Report
	check   string // the name of the current check
	rules   *ruleset
	// interfaces are by name. routes calls Environment.Routes once.
	interfaces map[string]net.Interface
	names      map[string]func() (netip.Addr, error) // by a remote's DNS name; each waits for its address
	routes     func() (map[int][]netstate.RouteMetrics, error)
}

// found adds a Finding, unless the running tunnel warns of it itself. s is nil if it is about the host.
func (e *examination) found(code Code, s *subject, what, why, do string) {
	if s != nil && slices.Contains(s.warned, code) {
		return
	}
	f := Finding{Code: code, Severity: code.severity(), What: what, Why: why, Do: do}
	if s != nil {
		f.Tunnel = s.name
	}
	e.report.Findings = append(e.report.Findings, f)
}

// fault adds a Finding of what up would fail with, or warn of.
func (e *examination) fault(s *subject, f *warning.Fault) {
	e.found(Code(f.Code), s, f.What, f.Why, f.Do)
}

// warn adds a Finding of what the tunnel will warn of. detail says where or by how much; remedy "" is the code's own.
func (e *examination) warn(code warning.Code, s *subject, detail, remedy string) {
	text := code.Text()
	e.found(Code(text.Name), s, text.What+": "+detail, text.Why, cmp.Or(remedy, text.Remedy))
}

func (e *examination) skip(s *subject, format string, args ...any) {
	skipped := Skipped{Check: e.check, Reason: fmt.Sprintf(format, args...)}
	if s != nil {
		skipped.Tunnel = s.name
	}
	if !slices.Contains(e.report.Skipped, skipped) {
		e.report.Skipped = append(e.report.Skipped, skipped)
	}
}

// file returns a file's content, white space at its ends trimmed; "" if it cannot be read.
func (e *examination) file(name string) string {
	b, _ := fs.ReadFile(e.Files, name)
	return strings.TrimSpace(string(b))
}

// checks are run in this order: first the faults that cost operators the most time.
var checks = []struct {
	name string
	run  func(*examination)
}{
	{"underlay", (*examination).underlayDown},
	{"interface", (*examination).interfaceDown},
	{"reachability", (*examination).reachability},
	{"cloud", (*examination).cloud},
	{"firewall", (*examination).firewall},
	{"rp_filter", (*examination).rpFilter},
	{"tun", (*examination).tunDevice},
	{"capabilities", (*examination).capabilities},
	{"sandbox", (*examination).sandbox},
	{"path-mtu", (*examination).pathMTU},
	{"keepalive", (*examination).keepalive},
	{"kernel-ipip", (*examination).kernelIPIP},
	{"name", (*examination).nameTaken},
	{"route", (*examination).route},
	{"remotes", (*examination).remotes},
	{"same-pair", (*examination).samePair},
	{"real-server", (*examination).realServer},
	{"udp-ports", (*examination).udpPorts},
	{"managers", (*examination).managers},
	{"cilium", (*examination).cilium},
	{"fast-path", (*examination).fastPath},
	{"clock", (*examination).clock},
	{"limits", (*examination).limits},
}

// Examine makes all checks of tunnels and the host, or without tunnels those of the host alone. others are running
// tunnels that are not examined themselves.
func Examine(ctx context.Context, env *Environment, tunnels []Tunnel, others []tunnel.Status) *Report {
	e := &examination{Environment: env, ctx: ctx, others: others}
	e.report = Report{Tunnels: []string{}, Findings: []Finding{}, Skipped: []Skipped{}}
	e.interfaces, e.routes = map[string]net.Interface{}, sync.OnceValues(env.Routes)
	e.check = "route"
	all, err := env.Interfaces()
	if err != nil {
		e.skip(nil, "the interfaces cannot be read: %v", err)
	}
	for _, i := range all {
		e.interfaces[i.Name] = i
	}
	defer e.resolve(tunnels)()
	for i := range tunnels {
		s := e.subject(&tunnels[i])
		e.tunnels = append(e.tunnels, s)
		e.report.Tunnels = append(e.report.Tunnels, s.name)
	}
	e.check = "remotes"
	for _, s := range e.tunnels {
		if s.isMany() {
			e.manyRoutes(s)
		}
	}
	e.check = "reachability"
	e.probe()
	for _, c := range checks {
		e.check = c.name
		c.run(e)
	}
	rank := []Severity{Broken, Warning, Note}
	slices.SortStableFunc(e.report.Findings, func(a, b Finding) int {
		return cmp.Compare(slices.Index(rank, a.Severity), slices.Index(rank, b.Severity))
	})
	return &e.report
}

// subject finds out what all checks need: outer addresses and route.
func (e *examination) subject(t *Tunnel) *subject {
	c := &t.Config
	s := &subject{
		Tunnel: t, name: cmp.Or(c.Name, c.RemoteAddress), ifname: tunnel.InterfaceName(c.Name),
		local: c.LocalAddress, encrypted: c.IPsec.Wanted(),
	}
	if s.running() {
		s.name = cmp.Or(s.Status.Name(), s.name)
		s.ifname = cmp.Or(s.Status.Interface, tunnel.InterfaceName(s.name))
		s.local, _ = netip.ParseAddr(s.Status.CurrentLocalAddress)
	}
	e.takeWarnings(s)
	if s.isMany() {
		return s
	}
	s.remote = knownRemote(t)
	if !s.remote.IsValid() {
		e.check = "route"
		var err error
		if s.remote, err = e.names[c.RemoteAddress](); err != nil {
			e.fault(s, tunnel.NotResolved(c.RemoteAddress, err))
			return s
		}
	}
	if err := e.lookUp(s, c.Routes); err != nil {
		e.check = "route"
		e.skip(s, "the host's network cannot be read: %v", err)
	}
	return s
}

// lookUp looks up the route to the remote, whose preferred source is the local address if none is given. routes are
// the configured ones into the tunnel, which must not carry its own outer packets.
func (e *examination) lookUp(s *subject, routes []netstate.InterfaceRoute) (err error) {
	q := netstate.Query{Remote: s.remote.As4(), Mark: s.Config.FwMark, UnderlayDevice: s.Config.UnderlayDevice, Routes: routes,
		Interface: e.interfaces[s.ifname].Index}
	if s.local.IsValid() {
		q.Local = s.local.As4()
	}
	if s.answer, err = e.Network(q); err == nil && !s.local.IsValid() && s.answer.Err == nil {
		s.local = netip.AddrFrom4(s.answer.Route.Source)
	}
	return err
}

// takeWarnings makes Findings of the running tunnel's warnings, but for those that reachability says more about.
func (e *examination) takeWarnings(s *subject) {
	if !s.running() {
		return
	}
	for _, w := range s.Status.Warnings {
		code := Code(w.Code)
		if slices.Contains([]Code{PeerNotHeard, PeerNotSetUp, RemoteUnreachable}, code) || code == IPsecNotEstablished && !s.isMany() {
			continue
		}
		what, why, _ := strings.Cut(w.Text, ": ")
		if w.Detail != "" {
			what += ": " + w.Detail
		}
		s.warned = append(s.warned, code)
		e.report.Findings = append(e.report.Findings, Finding{code, w.Severity, s.name, what, why, w.Remedy})
	}
}

// knownRemote returns the remote's address; invalid if it is a DNS name that is not resolved.
func knownRemote(t *Tunnel) netip.Addr {
	if t.Status != nil {
		if a, err := netip.ParseAddr(t.Status.CurrentRemoteAddress); err == nil {
			return a
		}
	}
	a, _ := netip.ParseAddr(t.Config.RemoteAddress)
	return a
}

// resolveTimeout bounds the look-up of all names.
const resolveTimeout = 10 * time.Second

// resolve begins to look up the DNS names of tunnels' remotes, each once. done cancels what is not answered.
func (e *examination) resolve(tunnels []Tunnel) (done func()) {
	ctx, cancel := context.WithTimeout(e.ctx, resolveTimeout)
	e.names = map[string]func() (netip.Addr, error){}
	for i := range tunnels {
		name := tunnels[i].Config.RemoteAddress
		if name == tunnel.AnyRemote || knownRemote(&tunnels[i]).IsValid() || e.names[name] != nil {
			continue
		}
		lookUp := sync.OnceValues(func() (netip.Addr, error) { return e.Resolve(ctx, name) })
		e.names[name] = lookUp
		go lookUp()
	}
	return cancel
}

// Add puts a Finding about the host, made by the caller, before all others.
func (r *Report) Add(code Code, what, why, do string) {
	r.Findings = slices.Insert(r.Findings, 0, Finding{Code: code, Severity: code.severity(), What: what, Why: why, Do: do})
}
