package doctor

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"strings"
	"time"

	"ipipd/internal/ipv4"
	"ipipd/internal/netstate"
	"ipipd/internal/tunnel"
	"ipipd/internal/warning"
	"ipipd/keepalive"
)

// Ask is the probes to send to one remote.
type Ask struct {
	Local, Remote netip.Addr
	Mark          uint32
	Device        string // the device to send by; "" is any
	// Inner are the packets to send with an outer header of protocol 4; an empty one is that header alone.
	Inner [][]byte
	// Sizes are the lengths in bytes, IPv4 header included, of pings to send with DF=1.
	Sizes []int
}

// Reply is what came back for an Ask.
type Reply struct {
	Err error // why the probes could not be sent
	// Echo: a ping of ordinary size was answered. Protocol4: a packet of protocol 4 came.
	Echo, Protocol4 bool
	// Pings is how many pings of ordinary size were sent, one a round; Echoes is how many of them were answered.
	Pings, Echoes int
	// Reflected: a packet of protocol 4 without payload came, the answer to a reflect probe.
	Reflected bool
	// ProtocolUnreachable: the remote answers ICMP 3/2 to protocol 4.
	ProtocolUnreachable bool
	// Reporter is the sender of an ICMP unreachable with another code, which is Code; invalid: none came.
	Reporter netip.Addr
	Code     int
	// Size is the largest of Ask.Sizes that was answered. TooBig is the MTU of an ICMP 3/4.
	Size, TooBig int
}

// told reports whether a missing answer is due to more than loss: all pings that were sent along with the probes were
// answered, or at least half of six or more.
func (r *Reply) told() bool {
	const often = 6
	return r.Echoes == r.Pings || r.Pings >= often && 2*r.Echoes >= r.Pings
}

// loss says how many pings were lost, where told reports false.
func (r *Reply) loss() string {
	return fmt.Sprintf("%d of %d pings were answered, the others lost or above a limit of their rate; try again", r.Echoes, r.Pings)
}

// prohibited reports whether Code means administratively prohibited (RFC 1812, section 5.2.7.1).
func (r *Reply) prohibited() bool { return r.Code == 9 || r.Code == 10 || r.Code == 13 }

// maxSized bounds the tunnels whose path MTU is probed: each takes some fifteen pings.
const maxSized = 64

// sizes are the MTUs of common links, largest first.
var sizes = []int{8900, 4352, 1500, 1492, 1480, 1472, 1460, 1440, 1420, 1400, 1380, 1280, 1024, 576}

// probe probes the remotes of all tunnels at once, and sets the reply of each.
func (e *examination) probe() {
	var asks []Ask
	var asked []*subject
	sized := 0
	for _, s := range e.tunnels {
		switch {
		case s.isMany():
			e.skip(s, "remotes are not probed where remote-address is any: ipipd print --remotes %s has the state of each", s.name)
			continue
		case !s.hasPath():
			e.skip(s, "there is no path to probe")
			continue
		case !s.answer.HasLocal:
			e.skip(s, "nothing is sent from %v, which this host does not have", s.local)
			continue
		}
		a := Ask{Local: s.local, Remote: s.remote, Mark: s.Config.FwMark, Device: s.Config.UnderlayDevice}
		switch {
		case s.encrypted:
		case !e.heard(s):
			a.Inner = s.probes()
		case s.reflects(): // what is heard does not say whether what is sent arrives
			a.Inner = s.probes()[:1]
		}
		if sized++; sized > maxSized {
			s.unsized = true
		} else {
			a.Sizes = []int{s.answer.Route.MTU}
			for _, size := range sizes {
				if size < s.answer.Route.MTU {
					a.Sizes = append(a.Sizes, size)
				}
			}
		}
		asks, asked = append(asks, a), append(asked, s)
	}
	if len(asks) == 0 {
		return
	}
	replies, err := e.Probe(e.ctx, asks)
	if errors.Is(err, fs.ErrPermission) {
		e.skip(nil, "not probed: run it as root (CAP_NET_RAW)")
		return
	}
	if err != nil {
		e.skip(nil, "not probed: %v", err)
		return
	}
	for i, s := range asked {
		if replies[i].Err != nil {
			e.skip(s, "not probed: %v", replies[i].Err)
			continue
		}
		s.reply = &replies[i]
	}
}

// probes returns inner packets that make a peer answer: a reflect probe, which routers and ipipd answer, and a ping
// of its inner address, if that is known, which any peer answers.
func (s *subject) probes() [][]byte {
	all := [][]byte{keepalive.ReflectProbe(s.local.As4(), s.remote.As4())}
	if target := s.Config.PeerInner(); target.IsValid() && len(s.Config.Addresses) > 0 {
		own := s.Config.Addresses[0].Prefix.Addr()
		all = append(all, keepalive.NewEcho(own.As4(), target.As4()).Request())
	}
	return all
}

// reflects reports whether the tunnel's keepalive is by reflect probes.
func (s *subject) reflects() bool {
	return s.Config.Keepalive.Interval > 0 && s.Config.KeepaliveProbe == keepalive.FormReflect
}

// reachability finds tunnels whose packets cannot leave, or whose peer's packets do not come.
func (e *examination) reachability() {
	for _, s := range e.tunnels {
		e.sendRefused(s)
		e.reachable(s)
	}
}

// sendRefused adds a Finding if the kernel has refused to send packets of the running tunnel.
func (e *examination) sendRefused(s *subject) {
	if !s.running() || s.Status.Drops["send-failed"] == 0 {
		return
	}
	e.found(SendRefused, s, fmt.Sprintf("the kernel has refused to send %d packets since the tunnel began (send-failed)", s.Status.Drops["send-failed"]),
		"a firewall's rule for what this host sends, or IPAddressDeny= of the service, whose IPAddressAllow= does not name the remote",
		"nft list ruleset; systemctl show -p IPAddressDeny -p IPAddressAllow ipipd")
}

func (e *examination) reachable(s *subject) {
	if s.isMany() {
		return
	}
	down := false // the running tunnel says that it hears nobody
	if s.running() {
		if slices.Contains(s.warned, ESPFiltered) {
			return
		}
		if s.encrypted && s.Status.WaitingFor == "" && !strings.HasPrefix(s.Status.IPsec, "established") {
			e.noSA(s)
			return
		}
		switch s.Status.KeepaliveState {
		case keepalive.NeverHeard.String(), keepalive.Lost.String():
			down = true
		case keepalive.Up.String():
			if e.heard(s) {
				return
			}
			if s.encrypted {
				e.skip(s, "%s: whether it still comes shows at the end of the keepalive's time", s.silence())
			}
		default:
			if last := s.Status.LastHeard; !last.IsZero() && e.Now().Sub(last) < time.Minute {
				return
			}
			e.skip(s, "the tunnel's own history says nothing: keepalive-state is %s", s.Status.KeepaliveState)
		}
	}
	r := s.reply
	if r == nil {
		if down {
			e.found(PeerNotHeard, s, s.silence(), "nothing of the peer arrives", e.watch(s))
		}
		return
	}
	if s.encrypted {
		if down {
			e.found(PeerNotHeard, s, s.silence(), "the SA is there, and nothing of the peer comes by it: it may have lost its own", e.watch(s))
		} else if r.Reporter.IsValid() {
			e.unreachable(s, r)
		} else if !s.running() {
			e.skip(s, "whether IKE and ESP pass shows when the tunnel runs")
		}
		return
	}
	switch {
	case r.Protocol4:
	case r.ProtocolUnreachable:
		e.found(PeerNotSetUp, s, fmt.Sprintf("%v answers ICMP protocol unreachable: nothing there takes protocol 4", s.remote),
			"protocol 4 gets there, and the other end has no tunnel for it",
			fmt.Sprintf("there: ipipd up --local-address %v --remote-address %v, or what ipipd peer-config prints for another system", s.remote, s.local))
	case r.Reporter.IsValid() && (!r.Echo || r.prohibited()):
		e.unreachable(s, r)
	case r.Echo && down:
		e.found(Protocol4Filtered, s, fmt.Sprintf("%v answers pings, and no protocol 4 comes from it: %s", s.remote, s.silence()),
			"a firewall or provider on the way drops IP protocol 4, or the other end's tunnel is down, or has other addresses, or a secret that this one has not", e.watch(s))
	case r.Echo && !r.told():
		e.skip(s, "whether protocol 4 passes could not be told: %s", r.loss())
	case r.Echo:
		e.found(Protocol4Unanswered, s, fmt.Sprintf("%v answers pings, and no protocol-4 probe", s.remote),
			"protocol 4 is filtered on the way, or the other end is not set up, or it is one that answers no such probe (Linux answers a ping of its inner address only)", e.watch(s))
	case down:
		e.found(PeerNotHeard, s, fmt.Sprintf("%s; %v answers no pings either", s.silence(), s.remote),
			"the peer is down, or all that it sends is filtered", e.watch(s))
	default:
		e.found(RemoteSilent, s, fmt.Sprintf("%v answers neither pings nor protocol-4 probes", s.remote),
			"it is down, or a firewall there drops both", e.watch(s))
	}
}

// noSA adds the Finding that the running tunnel has no SA, and what is known of the cause.
func (e *examination) noSA(s *subject) {
	what, do := "there is no SA", e.watch(s)
	if s.Status.IPsec != "" {
		what += ": " + s.Status.IPsec
	}
	if n := s.Status.Drops["esp-plain-text"]; n > 0 {
		what += fmt.Sprintf("; and %d packets have come from %v in plain text", n, s.remote)
		do = "set the same secret at both ends; " + do
	}
	e.found(IPsecNotEstablished, s, what, "nothing is sent without one", do)
}

func (e *examination) unreachable(s *subject, r *Reply) {
	why, do := "there is no way to the remote behind that router", fmt.Sprintf("traceroute -n %v", s.remote)
	if r.prohibited() {
		why, do = "a filter there prohibits it, and says so", fmt.Sprintf("let IP protocol 4 from %v in at %v", s.local, r.Reporter)
	} else if r.Reporter == s.local {
		why, do = "the next hop does not answer ARP", fmt.Sprintf("ip neighbour show dev %s; ip route get %v", s.device(), s.remote)
	}
	e.found(RemoteUnreachable, s, fmt.Sprintf("%v answers ICMP unreachable, code %d, about %v", r.Reporter, r.Code, s.remote), why, do)
}

// silence says since when the running tunnel hears nothing.
func (s *subject) silence() string {
	if s.Status.LastHeard.IsZero() {
		return "the running tunnel has never heard it"
	}
	return "the running tunnel heard it last at " + s.Status.LastHeard.Format(time.DateTime)
}

// watch returns the commands that show where the tunnel's packets get lost, and a hint if this host's cloud is known.
func (e *examination) watch(s *subject) string {
	if s.encrypted {
		return fmt.Sprintf("tcpdump -ni %s 'ip proto 50 or udp port 500 or udp port 4500' at both ends; ipipd print %s", s.dumpDevice(), quote(s.name))
	}
	do := fmt.Sprintf("tcpdump -ni %s 'ip proto 4' at both ends, and let IP protocol 4 in from the other end where it is lost", s.dumpDevice())
	if c := e.cloudHere(); c != nil && c.hint != "" {
		do += "; " + c.hint
	}
	return do
}

func (s *subject) dumpDevice() string {
	if s.answer == nil {
		return "any"
	}
	return cmp.Or(s.device(), "any")
}

// cloudOf is what is known of a cloud.
type cloudOf struct {
	name       string
	file, text string // its hosts' file in /sys/class/dmi/id contains text
	drops      bool   // its network passes no protocol 4
	hint       string // added to Finding.Do
}

var clouds = []cloudOf{
	// The asset tag of Azure's hosts, which Hyper-V elsewhere does not have.
	{"Azure", "chassis_asset_tag", "7783-7084-3265-9085-8269-3286-77", true, ""},
	{"AWS", "sys_vendor", "Amazon EC2", false, "this is AWS: the security group needs a custom protocol rule for 4"},
	{"Google Cloud", "sys_vendor", "Google", false, "this is Google Cloud: the VPC firewall needs a rule for the protocol ipip (4)"},
	{"DigitalOcean", "sys_vendor", "DigitalOcean", false, "this is DigitalOcean: its cloud firewall knows TCP, UDP and ICMP only, and drops protocol 4 as soon as it is on"},
	{"Hetzner Cloud", "sys_vendor", "Hetzner", false, "this is Hetzner: its cloud firewall cannot let protocol 4 in, so take it off this server"},
	{"OpenStack", "product_name", "OpenStack", false, "this is OpenStack: the security group needs the protocol 4, not ipip, which is 94 there"},
}

// cloudHere returns the cloud that this host is in; nil if it is in none that is known.
func (e *examination) cloudHere() *cloudOf {
	for i := range clouds {
		if strings.Contains(e.file("sys/class/dmi/id/"+clouds[i].file), clouds[i].text) {
			return &clouds[i]
		}
	}
	return nil
}

// cloud adds a Finding for each tunnel if this host's cloud passes no protocol 4.
func (e *examination) cloud() {
	_, err := fs.Stat(e.Files, "sys/class/dmi/id")
	c := e.cloudHere()
	for _, s := range e.tunnels {
		if s.encrypted || e.heard(s) {
			continue
		}
		if err != nil {
			e.skip(nil, "which cloud this is, is not known: there is no /sys/class/dmi/id")
		}
		if c == nil || !c.drops {
			continue
		}
		e.found(CloudDropsProtocol4, s, "this is "+c.name+", whose network passes no protocol 4", "no packet of the tunnel arrives",
			"--ipsec-secret-file at both ends: behind a NAT it is carried in UDP 4500")
	}
}

// pathMTU compares each tunnel's MTU with the path MTU that was probed.
func (e *examination) pathMTU() {
	for _, s := range e.tunnels {
		if !s.hasPath() {
			continue
		}
		e.routesMTU(s)
		mtu := s.mtu()
		if !s.Config.ClampTCPMSS && mtu < 1500 {
			e.found(MSSNotClamped, s, fmt.Sprintf("clamp-tcp-mss is no, and the MTU %d", mtu),
				"TCP from networks with an MTU of 1500 stalls wherever ICMP errors are filtered", "--clamp-tcp-mss yes")
		}
		r := s.reply
		switch {
		case r == nil:
			e.skip(s, "the path was not probed")
			continue
		case s.unsized:
			e.skip(nil, "the paths of the first %d tunnels are probed, not those of all: give a NAME", maxSized)
			continue
		case r.Size == 0 && r.TooBig == 0:
			e.skip(s, "the remote answers no ping with DF=1, by which the path's MTU is measured")
			continue
		case r.Size < s.answer.Route.MTU && r.TooBig == 0 && !r.told():
			e.skip(s, "the path's MTU could not be told: %s", r.loss())
			continue
		}
		path := s.answer.Route.MTU
		if r.Size < path {
			path = max(r.Size, r.TooBig)
		}
		overhead := ipv4.HeaderLen
		if s.encrypted { // ESP's overhead shows in a running tunnel's MTU, and is not known otherwise
			overhead = max(s.answer.Route.MTU-mtu, ipv4.HeaderLen)
		}
		if mtu <= path-overhead {
			continue
		}
		what := fmt.Sprintf("the path takes packets of %d: longer pings get no answer", path)
		switch path {
		case s.answer.Route.MTU:
			what = fmt.Sprintf("packets of %d are the longest that leave by %s", path, s.device())
		case r.TooBig:
			what = fmt.Sprintf("the path takes packets of %d: a router says so by ICMP", path)
		}
		e.found(MTUAbovePath, s, fmt.Sprintf("the MTU is %d, and %s", mtu, what),
			fmt.Sprintf("longer packets are fragmented or lost: %d fit without", path-overhead),
			fmt.Sprintf("--mtu %d at both ends", path-overhead))
	}
}

// mtu returns the MTU of the interface; if the tunnel does not run, the one it would have without ESP.
func (s *subject) mtu() int {
	switch {
	case s.running():
		return s.Status.ActualMTU
	case s.Config.MTU != 0:
		return s.Config.MTU
	}
	return s.answer.Route.MTU - ipv4.HeaderLen
}

// routesMTU finds routes into the interface whose mtu or advmss is too large for it.
func (e *examination) routesMTU(s *subject) {
	mtu := e.interfaces[s.ifname].MTU
	for _, r := range e.routesInto(s) {
		const headers = 40 // of IPv4 and TCP, without options
		what := ""
		switch {
		case r.MTU > mtu:
			what = fmt.Sprintf("the route %v dev %s has mtu %d", r.Prefix, s.ifname, r.MTU)
		case r.AdvMSS > mtu-headers:
			what = fmt.Sprintf("the route %v dev %s has advmss %d", r.Prefix, s.ifname, r.AdvMSS)
		default:
			continue
		}
		e.found(RouteIgnoresMTU, s, fmt.Sprintf("%s, and the interface's MTU is %d", what, mtu),
			"packets by that route are too large for the tunnel", withoutMetrics(&r, s.ifname))
	}
}

// withoutMetrics returns the command that removes mtu and advmss from a route into an interface.
func withoutMetrics(r *netstate.RouteMetrics, ifname string) string {
	const main = 254 // RT_TABLE_MAIN
	table := ""
	if r.Table != main {
		table = fmt.Sprintf(" table %d", r.Table)
	}
	if r.Multipath || r.Unusable {
		return fmt.Sprintf("ip route show %v%s, and ip route change with that, but without mtu and advmss", r.Prefix, table)
	}
	do := fmt.Sprintf("ip route change %v", r.Prefix)
	if r.Gateway.IsValid() {
		do += fmt.Sprintf(" via %v", r.Gateway)
	}
	do += " dev " + ifname
	if r.Gateway.IsValid() {
		do += " onlink"
	}
	if r.Source.IsValid() {
		do += fmt.Sprintf(" src %v", r.Source)
	}
	if r.Metric != 0 {
		do += fmt.Sprintf(" metric %d", r.Metric)
	}
	return do + table
}

// routesInto returns the routes into the interface of a running tunnel.
func (e *examination) routesInto(s *subject) []netstate.RouteMetrics {
	if !s.running() || e.interfaces[s.ifname].Index == 0 {
		return nil
	}
	routes, err := e.routes()
	if err != nil {
		e.skip(nil, "the routes into the tunnels are not known: %v", err)
	}
	return routes[e.interfaces[s.ifname].Index]
}

// keepalive finds tunnels whose keepalive probes the peer cannot, or does not, answer.
func (e *examination) keepalive() {
	for _, s := range e.tunnels {
		heard := e.heard(s)
		switch {
		case !s.local.IsValid() || !s.remote.IsValid():
		case !heard && tunnel.ReflectsBehindNAT(&s.Config, s.local, s.remote):
			e.warn(warning.KeepaliveBehindNAT, s, fmt.Sprintf("%v to %v", s.local, s.remote), s.echoRemedy())
		case !s.reflects() || s.encrypted || s.reply == nil || s.reply.Reflected:
		case heard && (slices.Contains(s.warned, KeepaliveBehindNAT) || slices.Contains(s.warned, PeerBehindNAT)):
		case (heard || s.reply.Protocol4) && !s.reply.told():
			e.skip(s, "whether the peer answers reflect probes could not be told: %s", s.reply.loss())
		case heard:
			e.found(KeepaliveUnanswered, s, fmt.Sprintf("%v is heard, and answers no reflect probe", s.remote),
				"what this end sends may not arrive, as protocol 4 is filtered in that direction; or the peer answers none, and only what it sends keeps the tunnel running",
				"see there whether its end is running; "+e.watch(s))
		case s.reply.Protocol4:
			e.found(KeepaliveUnanswered, s, fmt.Sprintf("packets of protocol 4 come from %v, and no answer to a reflect probe", s.remote),
				"the tunnel stops running whenever the peer has sent nothing for a while; a Linux peer answers none by default, and a firewall there, or on the way there, may drop them",
				s.echoRemedy())
		}
	}
}

// echoRemedy returns tunnel.Config.EchoRemedy, of the interface if the tunnel runs.
func (s *subject) echoRemedy() string {
	if s.running() {
		return s.Config.EchoRemedy(s.ifname)
	}
	return s.Config.EchoRemedy("")
}

// quote quotes a name for a shell, if it has to be.
func quote(name string) string {
	special := func(r rune) bool {
		return !strings.ContainsRune("-_.:@", r) && (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z')
	}
	if name != "" && name[0] != '-' && !strings.ContainsFunc(name, special) {
		return name
	}
	return "'" + strings.ReplaceAll(name, "'", `'\''`) + "'"
}
