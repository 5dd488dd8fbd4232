package doctor

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/fstest"
	"time"

	"ipipd/internal/netstate"
	"ipipd/internal/sandbox"
	"ipipd/internal/tunnel"
	"ipipd/keepalive"
	"ipipd/test/netlab"
)

// The host that is examined, and the remote:
//
//	here ── 192.0.2.1/24 eth0 ── eth0 192.0.2.2/24 ── there
const local, remote = "192.0.2.1", "192.0.2.2"

type lab struct {
	t           testing.TB
	here, there *netlab.NS
	config      tunnel.Config
	started     time.Time
	status      *tunnel.Status
	others      []tunnel.Status
	more        []Tunnel
	files       map[string]string // replace the host's, by name without the first /; "-" hides one
	change      func(*Environment)
}

func newLab(t testing.TB) *lab {
	l := &lab{t: t, here: netlab.New(t), there: netlab.New(t), config: tunnel.Default(), change: func(*Environment) {}}
	netlab.Veth(t, l.here, l.there, netlab.End{Name: "eth0", Address: local + "/24"}, netlab.End{Name: "eth0", Address: remote + "/24"})
	for _, ns := range []*netlab.NS{l.here, l.there} {
		for _, which := range []string{"all", "default", "eth0"} {
			ns.Sysctl("net.ipv4.conf."+which+".rp_filter", "0")
		}
	}
	l.config.Name, l.config.RemoteAddress, l.config.LocalAddress = "ipip1", remote, netip.MustParseAddr(local)
	l.config.Addresses = []netstate.InterfaceAddress{{Prefix: netip.MustParsePrefix("10.255.0.1/30")}}
	// Files that differ between the machines that the test runs on.
	l.files = map[string]string{
		"sys/module/ipip": "-", "sys/module/tunnel4": "-", "proc/modules": "", "proc/self/cgroup": "",
		"sys/class/dmi/id/sys_vendor": "nobody",
	}
	return l
}

// upThere starts ipipd at the other end.
func (l *lab) upThere(args ...string) *netlab.Daemon {
	return netlab.Up(l.t, l.there, "ipip1", append([]string{"--local-address", remote, "--remote-address", local, "--address", "10.255.0.2/30"}, args...)...)
}

// up starts ipipd at this end, and keeps its status once ready is true of it.
func (l *lab) up(ready func(*tunnel.Status) bool, args ...string) *netlab.Daemon {
	l.t.Helper()
	d := netlab.Up(l.t, l.here, "ipip1", append([]string{"--local-address", local, "--remote-address", remote, "--address", "10.255.0.1/30"}, args...)...)
	netlab.Eventually(l.t, "the tunnel is as the test wants it", func() bool {
		out, err := d.Run("print", "--json")
		var all []tunnel.Status
		if err != nil || json.Unmarshal([]byte(out), &all) != nil || len(all) != 1 {
			return false
		}
		l.status = &all[0]
		return ready(l.status)
	})
	return d
}

// natThere starts ipipd with a keepalive at the other end, behind a 1:1 NAT.
func natThere(l *lab) {
	l.there.Run("ip", "address", "add", "10.9.9.9/32", "dev", "eth0")
	l.there.Run("nft", `add table ip n; add chain ip n pre { type nat hook prerouting priority -100; };
		add chain ip n post { type nat hook postrouting priority 100; };
		add rule ip n pre ip protocol 4 dnat to 10.9.9.9; add rule ip n post ip saddr 10.9.9.9 snat to `+remote)
	netlab.Up(l.t, l.there, "ipip1", "--local-address", "10.9.9.9", "--remote-address", local, "--address", "10.255.0.2/30", "--keepalive", "1s,10")
}

func state(want keepalive.State) func(*tunnel.Status) bool {
	return func(s *tunnel.Status) bool { return s.KeepaliveState == want.String() }
}

// examine examines the tunnel from here, again while a result "could not be told": all namespaces share the kernel's
// ICMP sockets, so an answer may get lost.
func (l *lab) examine() (r *Report) {
	netlab.Eventually(l.t, "what comes of the probes can be told", func() bool {
		r = l.examineOnce()
		return !slices.ContainsFunc(r.Skipped, func(s Skipped) bool { return strings.Contains(s.Reason, "could not be told") })
	})
	return r
}

func (l *lab) examineOnce() (r *Report) {
	l.here.Do(func() {
		env, done := Host()
		defer done()
		env.Files = overlay{env.Files.(hostFiles), l.files}
		env.ClockSynchronized = func() (bool, error) { return true, nil }
		l.change(env)
		r = Examine(context.Background(), env, append([]Tunnel{{Config: l.config, Status: l.status, Started: l.started}}, l.more...), l.others)
	})
	return r
}

// hostFiles is what the file system of os.DirFS implements.
type hostFiles interface {
	fs.ReadFileFS
	fs.StatFS
	fs.ReadDirFS
	fs.ReadLinkFS
}

// overlay is the host's files, some of which the test replaces or hides.
type overlay struct {
	hostFiles
	files map[string]string
}

func (o overlay) in(name string) fs.FS {
	mapped := fstest.MapFS{}
	for file, text := range o.files {
		if text != "-" {
			mapped[file] = &fstest.MapFile{Data: []byte(text)}
		} else if name == file {
			return mapped
		}
	}
	if _, err := mapped.Stat(name); err == nil {
		return mapped
	}
	return o.hostFiles
}

func (o overlay) Open(name string) (fs.File, error)     { return o.in(name).Open(name) }
func (o overlay) ReadFile(name string) ([]byte, error)  { return fs.ReadFile(o.in(name), name) }
func (o overlay) Stat(name string) (fs.FileInfo, error) { return fs.Stat(o.in(name), name) }

func codes(r *Report) (all []Code) {
	for _, f := range r.Findings {
		all = append(all, f.Code)
	}
	return all
}

func nft(rules string) func(*lab) {
	return func(l *lab) { l.here.Run("nft", rules) }
}

const base = "table inet filter { chain input { type filter hook input priority 0; policy accept; %; }; }"

// broken is one way to break the lab, and the codes that the report must have: all of want, and no others.
type broken struct {
	name string
	by   func(*lab)
	want []Code
	says string // in the text of the first of want
	// mended: once its Do is executed, the first of want is not in the report any more.
	mended bool
}

// secret gives the tunnel an IPsec secret.
func secret(l *lab) {
	l.config.IPsec.Secret = []byte("a long secret of a test")
	l.config.KeepaliveProbe = keepalive.FormReflect
}

// replies has all probes answered with r; none is sent.
func replies(r Reply) func(*lab) {
	return func(l *lab) {
		l.change = func(env *Environment) {
			env.Probe = func(_ context.Context, asks []Ask) ([]Reply, error) { return slices.Repeat([]Reply{r}, len(asks)), nil }
		}
	}
}

// fine is what a healthy peer answers.
var fine = Reply{Echo: true, Protocol4: true, Reflected: true, Size: 1500}

// with changes the lab in several ways.
func with(all ...func(*lab)) func(*lab) {
	return func(l *lab) {
		for _, f := range all {
			f(l)
		}
	}
}

// file replaces one of the host's files.
func file(name, text string) func(*lab) {
	return func(l *lab) { l.files[name] = text }
}

// running gives the lab the status of a running tunnel and an interface of its name, without a process.
func running(change func(*tunnel.Status)) func(*lab) {
	return func(l *lab) {
		s := tunnel.NewStatus(&l.config)
		s.State = tunnel.State{Running: true, ActualMTU: 1480, CurrentLocalAddress: local, CurrentRemoteAddress: remote,
			KeepaliveState: keepalive.Up.String(), FastPath: "active", LastHeard: time.Now()}
		change(&s)
		l.status = &s
		l.here.Run("ip", "link", "add", "ipip1", "mtu", "1480", "type", "veth", "peer", "name", "nowhere")
		l.here.Run("ip", "address", "add", "10.255.0.1/30", "dev", "ipip1")
		l.here.Run("ip", "link", "set", "ipip1", "up")
	}
}

// warns gives a status a warning.
func warns(code, detail string) func(*tunnel.Status) {
	return func(s *tunnel.Status) {
		s.Warnings = []tunnel.Warning{{Code: code, Severity: Broken, Text: "it is so: it matters", Detail: detail, Remedy: "mend it"}}
	}
}

func environment(change func(*Environment)) func(*lab) {
	return func(l *lab) {
		before := l.change
		l.change = func(e *Environment) { before(e); change(e) }
	}
}

// stopsAnswering starts a tunnel whose probes the peer answers until protocol 4 is filtered on the way to it.
func stopsAnswering(answer netlab.Check, args ...string) func(*lab) {
	return func(l *lab) {
		wire := netlab.CaptureReceived(l.t, l.here, "eth0")
		l.upThere("--keepalive", "1s,3")
		filtered := false
		l.up(func(s *tunnel.Status) bool {
			if !filtered && len(wire.Matching(netlab.Source(remote), netlab.Protocol(4), answer)) >= 6 {
				filtered = true
				l.there.Run("nft", "table inet x { chain y { type filter hook prerouting priority 0; ip protocol 4 drop; }; }")
			}
			return slices.ContainsFunc(s.Warnings, func(w tunnel.Warning) bool { return w.Code == string(KeepaliveUnanswered) })
		}, append([]string{"--keepalive", "1s,3"}, args...)...)
		if s := l.status; !s.Running {
			l.t.Errorf("it does not run: %+v", s.State)
		}
	}
}

var brokens = []broken{
	{"the peer has no tunnel", func(*lab) {}, []Code{PeerNotSetUp}, "protocol unreachable", false},
	{"protocol 4 is filtered and the tunnel runs", func(l *lab) {
		l.there.Run("nft", "table inet x { chain y { type filter hook prerouting priority 0; ip protocol 4 drop; }; }")
		l.up(state(keepalive.NeverHeard), "--keepalive", "1s,1")
	}, []Code{Protocol4Filtered}, "has never heard it", false},
	{"protocol 4 is filtered in one direction", func(l *lab) {
		l.there.Run("nft", "table inet x { chain y { type filter hook prerouting priority 0; ip protocol 4 drop; }; }")
		l.upThere("--keepalive", "1s,10")
		l.up(state(keepalive.Up), "--keepalive", "1s,10")
	}, []Code{KeepaliveUnanswered}, "192.0.2.2 is heard, and answers no reflect probe;what this end sends may not arrive", false},
	{"protocol 4 is filtered in one direction from some time on", stopsAnswering(netlab.TotalLen(20)),
		[]Code{KeepaliveUnanswered}, "it has answered none since 20", false},
	{"protocol 4 is filtered in one direction from some time on, and the probe is echo", stopsAnswering(netlab.Inner(netlab.ICMP(0, 0)), "--keepalive-probe", "echo", "--keepalive-target", "10.255.0.2"),
		[]Code{KeepaliveUnanswered}, "it has answered none since 20", false},
	{"protocol 4 is filtered", func(l *lab) {
		l.there.Run("nft", "table inet x { chain y { type filter hook prerouting priority 0; ip protocol 4 drop; }; }")
	}, []Code{Protocol4Unanswered}, "192.0.2.2 answers pings", false},
	{"the peer has gone", func(l *lab) {
		l.up(state(keepalive.NeverHeard), "--keepalive", "1s,1")
		l.there.Run("nft", "table inet x { chain y { type filter hook prerouting priority 0; drop; }; }")
	}, []Code{PeerNotHeard}, "no pings either", false},
	{"nobody is there", func(l *lab) {
		l.there.Run("nft", "table inet x { chain y { type filter hook prerouting priority 0; drop; }; }")
	}, []Code{RemoteSilent}, "", false},
	{"a router says no", func(l *lab) {
		l.there.Run("nft", "table inet x { chain y { type filter hook input priority 0; ip protocol 4 reject with icmp admin-prohibited; }; }")
	}, []Code{RemoteUnreachable}, "code 13", false},
	{"the peer was heard, and is no more", with(running(func(s *tunnel.Status) { s.LastHeard = time.Now().Add(-40 * time.Second) }), replies(Reply{Echo: true, Size: 1500})),
		[]Code{Protocol4Unanswered}, "", false},
	{"an unreachable of earlier", replies(Reply{Echo: true, Size: 1500, Reporter: netip.MustParseAddr(local), Code: 1}), []Code{Protocol4Unanswered}, "answers pings", false},
	{"no SA", with(secret, running(func(s *tunnel.Status) {
		warns("ipsec-not-established", "no proposal chosen")(s)
		s.IPsec = "not established: no proposal chosen"
	}), replies(fine)), []Code{IPsecNotEstablished}, "no proposal chosen", false},
	{"no SA yet, and plain text", with(secret, running(func(s *tunnel.Status) {
		s.IPsec, s.KeepaliveState, s.Drops = "negotiating", "never-heard", map[string]uint64{"esp-plain-text": 7}
	}), replies(fine)), []Code{IPsecNotEstablished}, "there is no SA: negotiating; and 7 packets have come from 192.0.2.2 in plain text;", false},
	{"the kernel refuses to send", with(running(func(s *tunnel.Status) { s.Drops = map[string]uint64{"send-failed": 3} }), replies(fine)),
		[]Code{SendRefused}, "refused to send 3 packets", false},
	{"no ESP", with(secret, running(warns("esp-filtered", "")), replies(fine)), []Code{ESPFiltered}, "", false},
	{"fragments are lost", with(running(warns("fragment-loss", "7 packets not reassembled")), replies(fine)), []Code{"fragment-loss"}, "7 packets not reassembled", false},
	{"what the tunnel says itself is not found again", with(running(warns("route-loop", "seen")), replies(fine), func(l *lab) {
		l.status.CurrentRemoteAddress = "198.51.100.1"
		l.here.Run("ip", "route", "add", "198.51.100.0/24", "dev", "ipip1")
	}), []Code{RouteLoop}, "seen", false},
	{"the tunnel hears nothing, and it is known why", with(running(func(s *tunnel.Status) {
		warns("peer-not-heard", "silent for 20s")(s)
		s.KeepaliveState = "lost"
	}), replies(Reply{Echo: true, Size: 1500})), []Code{Protocol4Filtered}, "", false},
	{"an SA, and nothing comes", with(secret, running(func(s *tunnel.Status) { s.IPsec, s.KeepaliveState = "established aes", "lost" }), replies(Reply{Echo: true, Size: 1500})),
		[]Code{PeerNotHeard}, "heard it last at", false},
	{"an MTU that is too large", with(replies(fine), func(l *lab) { l.config.MTU = 1500 }), []Code{MTUAbovePath}, "the MTU is 1500, and packets of 1500 are the longest that leave by eth0;", false},
	{"a path with less than its jumbo frames", with(replies(fine), func(l *lab) { l.here.Run("ip", "link", "set", "eth0", "mtu", "9000") }),
		[]Code{MTUAbovePath}, "--mtu 1480", false},
	{"Azure", with(file("sys/class/dmi/id/chassis_asset_tag", "7783-7084-3265-9085-8269-3286-77\n"), replies(Reply{Echo: true, Size: 1500})),
		[]Code{CloudDropsProtocol4, Protocol4Unanswered}, "this is Azure", false},
	{"nftables drops what comes", with(replies(fine), nft(strings.Replace(base, "%", "ip protocol 4 drop", 1))),
		[]Code{FirewallDrops, FastPathOff}, "received from 192.0.2.2 is dropped: nftables: table inet filter, chain input", true},
	{"nftables drops what is sent", with(replies(fine), nft("table ip x { chain y { type filter hook output priority 0; policy drop; ip protocol icmp accept; }; }")),
		[]Code{FirewallDrops, FastPathOff}, "table ip x, chain y, its policy", true},
	{"iptables drops", with(replies(fine), func(l *lab) {
		l.here.Run("iptables-nft", "-N", "mine")
		l.here.Run("iptables-nft", "-A", "INPUT", "-i", "eth0", "-m", "conntrack", "--ctstate", "NEW,ESTABLISHED", "-j", "mine")
		l.here.Run("iptables-nft", "-A", "mine", "-s", remote, "-p", "4", "-m", "comment", "--comment", "no \"IPIP\" here", "-j", "REJECT")
	}), []Code{FirewallDrops, FastPathOff}, "iptables: table filter, chain mine", true},
	{"only answers", with(replies(fine), nft(strings.Replace(base, "accept; %", "drop; ct state vmap { established : accept, related : accept }; iif lo accept", 1))),
		[]Code{FirewallConntrack, FastPathOff}, "only as an answer", true},
	{"protocol 94", with(replies(fine), nft(strings.Replace(base, "%", "ip protocol 94 accept", 1))), []Code{FirewallProtocol94, FastPathOff}, "protocol 94", false},
	{"Calico", with(replies(fine), environment(func(e *Environment) {
		e.Command = func(_ context.Context, name string, _ ...string) ([]byte, error) {
			if name == "nft" {
				return nil, errors.New("not permitted")
			}
			return []byte("*filter\n:INPUT ACCEPT [0:0]\n:cali-INPUT - [0:0]\n-A INPUT -m comment --comment \"cali:Cz_u1\" -j cali-INPUT\n" +
				"-A cali-INPUT -p ipencap -m comment --comment \"Drop IPIP packets from non-Calico hosts\" -j DROP\nCOMMIT\n"), nil
		}
	})), []Code{CalicoDrops}, "Calico drops protocol 4", false},
	{"rp_filter is strict and the way back another", with(replies(fine), func(l *lab) {
		l.here.Run("ip", "link", "add", "eth1", "type", "veth", "peer", "name", "nowhere")
		l.here.Run("ip", "address", "add", "203.0.113.1/24", "dev", "eth1")
		l.here.Run("ip", "link", "set", "eth1", "up")
		l.here.Run("ip", "link", "set", "nowhere", "up")
		l.here.Run("ip", "rule", "add", "fwmark", "7", "table", "77")
		l.here.Run("ip", "route", "add", remote, "dev", "eth1", "table", "77")
		l.config.FwMark = 7
		l.here.Sysctl("net.ipv4.conf.all.rp_filter", "1")
	}), []Code{RPFilterUnderlay}, "net.ipv4.conf.all.rp_filter", true},
	{"rp_filter is strict and nothing routed", with(replies(fine), func(l *lab) {
		l.config.Addresses = nil
		l.here.Sysctl("net.ipv4.conf.all.rp_filter", "1")
	}), []Code{RPFilterTunnel}, "nothing is routed into it", false},
	{"rp_filter is strict and has dropped", with(running(func(*tunnel.Status) {}), replies(fine), func(l *lab) {
		l.here.Sysctl("net.ipv4.conf.ipip1.rp_filter", "1")
		l.files["proc/thread-self/net/netstat"] = "TcpExt: SyncookiesSent IPReversePathFilter\nTcpExt: 1 77\nIpExt: InNoRoutes\nIpExt: 3\n"
	}), []Code{RPFilterTunnel}, "dropped 77 packets", false},
	{"no /dev/net/tun", with(replies(fine), file("dev/net/tun", "-")), []Code{NoTUN}, "does not exist", false},
	{"no TUN in the kernel", with(replies(fine), environment(func(e *Environment) { e.OpenTUN = func() error { return syscall.ENODEV } })), []Code{NoTUN}, "modprobe tun", false},
	{"the container's device list", with(replies(fine), environment(func(e *Environment) { e.OpenTUN = func() error { return syscall.EPERM } })),
		[]Code{TUNForbidden}, "cgroup", false},
	{"no capabilities", with(replies(fine), file("proc/self/status", "Name:\tx\nCapEff:\t0000008000002000\n")), []Code{NoCapabilities}, "lacks CAP_NET_ADMIN;", false},
	{"no CAP_BPF", with(replies(fine), file("proc/self/status", "CapEff:\t0000000000003000\n")), []Code{NoFastPathCapability}, "", false},
	{"a path with a small MTU", func(l *lab) {
		l.upThere()
		l.there.Run("ip", "link", "set", "eth0", "mtu", "1400")
	}, []Code{MTUAbovePath}, "--mtu 1380", false},
	{"a route that is too large", with(running(func(*tunnel.Status) {}), replies(fine), func(l *lab) {
		l.here.Run("ip", "route", "add", "10.20.0.0/16", "dev", "ipip1", "advmss", "1460")
	}), []Code{RouteIgnoresMTU}, "10.20.0.0/16 dev ipip1 has advmss 1460", true},
	{"a route of a table that is too large", with(running(func(*tunnel.Status) {}), replies(fine), func(l *lab) {
		l.here.Run("ip", "route", "add", "10.20.0.0/16", "via", "10.255.0.2", "dev", "ipip1", "src", "10.255.0.1", "mtu", "1500", "metric", "7", "table", "77")
	}), []Code{RouteIgnoresMTU}, "ip route change 10.20.0.0/16 via 10.255.0.2 dev ipip1 onlink src 10.255.0.1 metric 7 table 77", true},
	{"one of two next hops that is too large", with(running(func(*tunnel.Status) {}), replies(fine), func(l *lab) {
		l.here.Run("sh", "-c", "ip route add 10.20.0.0/16 mtu 1500 nexthop dev ipip1 nexthop via "+remote)
	}), []Code{RouteIgnoresMTU}, "ip route show 10.20.0.0/16, and", false},
	{"MSS", with(replies(fine), func(l *lab) { l.config.ClampTCPMSS = false }), []Code{MSSNotClamped}, "", false},
	{"1:1 NAT", with(replies(fine), func(l *lab) {
		l.here.Run("ip", "address", "add", "10.0.0.5/24", "dev", "eth0")
		l.config.LocalAddress = netip.MustParseAddr("10.0.0.5")
	}), []Code{KeepaliveBehindNAT}, "10.0.0.5 to 192.0.2.2", false},
	{"the peer is behind a NAT and reflects nothing", func(l *lab) {
		natThere(l)
		l.there.Run("nft", "table ip x { chain y { type filter hook output priority 0; ip protocol 4 ip length 20 drop; }; }")
		l.up(func(s *tunnel.Status) bool {
			return slices.ContainsFunc(s.Warnings, func(w tunnel.Warning) bool { return Code(w.Code) == PeerBehindNAT })
		}, "--keepalive", "1s,2")
	}, []Code{PeerBehindNAT}, "says that it is 10.9.9.9, and comes from 192.0.2.2", false},
	{"the peer reflects nothing", replies(Reply{Echo: true, Protocol4: true, Size: 1500}), []Code{KeepaliveUnanswered}, "--keepalive-target 10.255.0.2", false},
	{"the kernel's module", with(replies(fine), file("sys/module/ipip", "")), []Code{KernelIPIP}, "rmmod ipip", false},
	{"the underlay is down", func(l *lab) { l.here.Run("ip", "link", "set", "eth0", "down") }, []Code{UnderlayDown, NoRoute}, "ip link set eth0 up", false},
	{"the underlay has no carrier", with(replies(fine), func(l *lab) {
		l.there.Run("ip", "link", "set", "eth0", "down")
		netlab.Eventually(l.t, "the kernel has seen it", func() bool { return strings.Contains(l.here.Run("ip", "link", "show", "eth0"), "NO-CARRIER") })
	}), []Code{UnderlayDown}, "no carrier", false},
	{"the interface is down", with(running(func(s *tunnel.Status) { s.Disabled, s.Running = true, false }), replies(fine)), []Code{InterfaceDown}, "ip link set ipip1 up", false},
	{"the name is taken", with(running(func(*tunnel.Status) {}), replies(fine), func(l *lab) { l.status = nil }), []Code{NameTaken}, "ip link delete ipip1", false},
	{"no such name", func(l *lab) {
		l.config.RemoteAddress = "nobody.invalid"
		l.change = func(e *Environment) {
			e.Resolve = func(context.Context, string) (netip.Addr, error) { return netip.Addr{}, errors.New("no such host") }
		}
	}, []Code{NameNotResolved}, "nobody.invalid", false},
	{"no route", func(l *lab) { l.config.RemoteAddress = "198.51.100.7" }, []Code{NoRoute}, "ip route add 198.51.100.7 via GATEWAY", false},
	{"no underlay device", func(l *lab) { l.config.UnderlayDevice = "nil0" }, []Code{NoRoute}, "ip link show", false},
	{"itself", func(l *lab) {
		l.here.Run("ip", "address", "add", "192.0.2.9/24", "dev", "eth0")
		l.config.RemoteAddress = "192.0.2.9"
	}, []Code{RemoteIsLocal}, "", false},
	{"a loop", with(replies(fine), func(l *lab) {
		l.here.Run("ip", "route", "add", "default", "via", "192.0.2.77", "dev", "eth0")
		l.config.RemoteAddress = "198.51.100.1"
		l.config.Routes = []netstate.InterfaceRoute{{Prefix: netip.MustParsePrefix("198.51.0.0/16")}}
	}), []Code{RouteLoop}, "route 198.51.0.0/16 would be the one to remote-address 198.51.100.1 as well", true},
	{"a loop while it runs", with(running(func(s *tunnel.Status) { s.CurrentRemoteAddress = "198.51.100.1" }), replies(fine), func(l *lab) {
		l.here.Run("ip", "route", "add", "198.51.100.0/24", "dev", "ipip1")
	}), []Code{RouteLoop}, "leads into the tunnel itself", false},
	{"no local address", func(l *lab) { l.config.LocalAddress = netip.MustParseAddr("192.0.2.200") }, []Code{NoLocalAddress}, "", false},
	{"many remotes, and no route", with(manyRunning, func(l *lab) { l.here.Run("ip", "address", "flush", "dev", "ipip1") }), []Code{NoRemotes}, "nothing is routed into ipip1", false},
	{"a gateway that is no IPv4 address", with(manyRunning, environment(func(e *Environment) {
		device, err := net.InterfaceByName("ipip1")
		e.Routes = func() (map[int][]netstate.RouteMetrics, error) {
			return map[int][]netstate.RouteMetrics{device.Index: {{Prefix: netip.MustParsePrefix("10.20.0.0/16"), Unusable: true}}}, err
		}
	})), []Code{GatewayNotUsable}, "the route of 10.20.0.0/16 names", false},
	{"a route without a gateway, and a secret", with(secret, manyRunning, func(l *lab) { l.here.Run("ip", "route", "add", "10.20.0.0/16", "dev", "ipip1") }),
		[]Code{RouteWithoutGateway}, "10.20.0.0/16", false},
	{"a rule that drops what comes from some of many remotes", with(manyRunning,
		nft(strings.Replace(base, "%", "ip protocol 4 ip saddr != 192.0.2.7 drop", 1)), func(l *lab) {
			l.here.Run("sh", "-ec", "for i in 2 5 6 7; do ip route add 10.$i.0.0/16 via 192.0.2.$i dev ipip1 onlink; done")
		}), []Code{FirewallDrops}, "received from 192.0.2.2, 192.0.2.5, 192.0.2.6 is dropped", false},
	{"a rule that drops what is sent to one of many remotes", with(manyRunning,
		nft("table ip x { chain y { type filter hook output priority 0; ip daddr 192.0.2.7 drop; }; }"), func(l *lab) {
			l.here.Run("sh", "-ec", "for i in 6 7; do ip route add 10.$i.0.0/16 via 192.0.2.$i dev ipip1 onlink; done")
		}), []Code{FirewallDrops}, "sent to 192.0.2.7 is dropped", false},
	{"a rule that drops what a load balancer sends", with(
		nft("table ip x { chain y { type filter hook input priority 0; policy drop; ip protocol != 4 accept; }; }"), func(l *lab) {
			l.config.RemoteAddress = tunnel.AnyRemote
			l.config.AcceptFrom = []netip.Prefix{netip.MustParsePrefix("192.0.2.10/32")}
			l.config.AcceptTo = []netip.Prefix{netip.MustParsePrefix("203.0.113.5/32")}
		}), []Code{FirewallDrops}, "received from 192.0.2.10 is dropped", true},
	{"remotes without a route", with(manyRunning, func(l *lab) {
		l.here.Run("sh", "-ec", "for i in 1 2 3 4 5; do ip route add 10.$i.0.0/16 via 198.51.100.$i dev ipip1 onlink; done")
	}), []Code{NoRoute}, "and 2 more", false},
	{"a remote that the tunnel itself leads to", with(manyRunning, func(l *lab) {
		l.here.Run("sh", "-ec", "ip route add 10.20.0.0/16 via 198.51.100.7 dev ipip1 onlink; ip route add 198.51.100.0/24 via "+remote+" dev ipip1 onlink")
	}), []Code{RouteLoop}, "198.51.100.7 (of 10.20.0.0/16) leads into ipip1 itself", false},
	{"peers that would be a loop", with(func(l *lab) {
		l.config.RemoteAddress = tunnel.AnyRemote
		l.here.Run("ip", "route", "add", "default", "via", remote)
		l.config.Routes = []netstate.InterfaceRoute{{Prefix: netip.MustParsePrefix("198.51.0.0/16"), Gateway: netip.MustParseAddr("198.51.100.7")}}
	}), []Code{RouteLoop}, "198.51.100.7 (of 198.51.0.0/16)", true},
	{"this host as one of many remotes", with(func(l *lab) {
		l.config.RemoteAddress = tunnel.AnyRemote
		l.config.Routes = []netstate.InterfaceRoute{{Prefix: netip.MustParsePrefix("10.20.0.0/16"), Gateway: netip.MustParseAddr(local)}}
	}), []Code{RemoteIsLocal}, local, false},
	{"many remotes without the local address", func(l *lab) {
		l.config.RemoteAddress, l.config.LocalAddress = tunnel.AnyRemote, netip.MustParseAddr("192.0.2.200")
	}, []Code{NoLocalAddress}, "192.0.2.200", false},
	{"the kernel's tunl0 is up", with(func(l *lab) { l.config.RemoteAddress = tunnel.AnyRemote }, environment(func(e *Environment) {
		e.KernelTunnels = func() ([]netstate.KernelTunnel, error) {
			any := netip.IPv4Unspecified()
			return []netstate.KernelTunnel{{Name: "eth0", Local: any, Remote: any}, {Name: "tunl0", Local: any, Remote: any}}, nil // tunl0 is not up
		}
	})), []Code{SamePair}, "ip link set eth0 down", false},
	{"another process has the local address", func(l *lab) {
		l.config.RemoteAddress = tunnel.AnyRemote
		other := tunnel.NewStatus(&l.config)
		other.CurrentLocalAddress, other.CurrentRemoteAddress = local, tunnel.AnyRemote
		l.others = []tunnel.Status{other}
	}, []Code{SamePair}, "whose remote-address is any as well", false},
	{"another process has no local address either", func(l *lab) {
		l.config.RemoteAddress, l.config.LocalAddress = tunnel.AnyRemote, netip.Addr{}
		other := tunnel.NewStatus(&l.config)
		other.CurrentRemoteAddress = tunnel.AnyRemote
		l.others = []tunnel.Status{other}
	}, []Code{SamePair}, "it has no local-address, as ", false},
	{"accept-from and a strict rp_filter", func(l *lab) {
		l.config.RemoteAddress, l.config.AcceptAnyPeer = tunnel.AnyRemote, true
		l.here.Sysctl("net.ipv4.conf.all.rp_filter", "1")
	}, []Code{RPFilterTunnel}, "accept-from lets in", false},
	{"two with the same pair", with(replies(fine), func(l *lab) { l.more = []Tunnel{{Config: l.config}}; l.more[0].Config.Name = "ipip2" }),
		[]Code{SamePair}, "as ipip1", false},
	{"another process has the pair", with(replies(fine), func(l *lab) {
		other := tunnel.NewStatus(&l.config)
		other.CurrentLocalAddress, other.CurrentRemoteAddress = local, remote
		l.others = []tunnel.Status{other}
	}), []Code{SamePair}, "", false},
	{"the kernel has the pair", with(replies(fine), environment(func(e *Environment) {
		e.KernelTunnels = func() ([]netstate.KernelTunnel, error) {
			return []netstate.KernelTunnel{{Name: "tunl1", Local: netip.MustParseAddr(local), Remote: netip.MustParseAddr(remote)}}, nil
		}
	})), []Code{SamePair}, "ip link delete tunl1", false},
	{"UDP 500", with(secret, replies(Reply{Echo: true, Size: 1500}), func(l *lab) {
		l.here.Do(func() {
			c, err := net.ListenPacket("udp4", "0.0.0.0:500")
			if err != nil {
				l.t.Fatal(err)
			}
			l.t.Cleanup(func() { c.Close() })
			six, err := net.ListenPacket("udp6", "[::]:500")
			if err != nil {
				l.t.Fatal(err)
			}
			l.t.Cleanup(func() { six.Close() })
		})
	}), []Code{UDPPortTaken}, "doctor.test", false},
	{"networkd", with(running(func(*tunnel.Status) {}), replies(fine), func(l *lab) {
		l.files["run/systemd/netif/links/"+index(l)] = "ADMIN_STATE=configured\nOPER_STATE=routable\n"
	}), []Code{ManagedByNetworkd}, "Name=ipip1", false},
	{"NetworkManager", with(running(func(*tunnel.Status) {}), replies(fine), func(l *lab) {
		l.files["run/NetworkManager/devices/"+index(l)] = "[device]\nmanaged=true\n"
	}), []Code{ManagedByNM}, "", false},
	{"Cilium", with(replies(fine), func(l *lab) {
		l.here.Run("ip", "link", "add", "cilium_host", "type", "veth", "peer", "name", "nowhere")
	}),
		[]Code{CiliumDrops}, "", false},
	{"the fast path", with(running(func(s *tunnel.Status) { s.FastPath = "nftables has rules in chain x of table y" }), replies(fine)), []Code{FastPathOff}, "chain x", false},
	{"the clock", with(running(func(*tunnel.Status) {}), replies(fine), func(l *lab) { l.started = time.Now().Add(time.Hour) }), []Code{ClockJump}, "1h0m", false},
	{"no NTP", with(replies(fine), environment(func(e *Environment) { e.ClockSynchronized = func() (bool, error) { return false, nil } })),
		[]Code{ClockNotSynchronized}, "", false},
	{"no sandbox", with(running(func(s *tunnel.Status) { s.Sandbox = &sandbox.State{Mode: sandbox.Off} }), replies(fine)),
		[]Code{SandboxNotWhole}, "--sandbox off", false},
	{"no Landlock", with(running(func(s *tunnel.Status) {
		s.Sandbox = &sandbox.State{Mode: sandbox.On, Seccomp: true, Missing: []string{"the kernel has no Landlock"}}
	}), replies(fine)), []Code{SandboxNotWhole}, "the kernel has no Landlock", false},
	{"capabilities", with(running(func(s *tunnel.Status) {
		s.Sandbox = &sandbox.State{Mode: sandbox.On, Capabilities: []sandbox.Capability{{Name: "CAP_NET_ADMIN", Why: "interfaces"}}}
	}), replies(fine)), []Code{CapabilitiesLeft}, "CAP_NET_ADMIN for interfaces", false},
	{"few files", with(replies(fine), environment(func(e *Environment) { e.MaxFiles = func() (uint64, error) { return 32, nil } })), []Code{TooFewFiles}, "the limit is 32", false},
	{"little memory, cgroup v1", with(replies(fine), file("proc/self/cgroup", "4:memory:/a/b\n0::/\n"), file("sys/fs/cgroup/memory/a/b/memory.limit_in_bytes", "8388608\n")),
		[]Code{TooLittleMemory}, "8 MiB", false},
	{"little memory", with(replies(fine), file("proc/self/cgroup", "0::/a/b\n"), file("sys/fs/cgroup/a/memory.max", "8388608\n")), []Code{TooLittleMemory}, "8 MiB", false},
}

// manyRunning is running for a tunnel with many remotes.
func manyRunning(l *lab) {
	l.config.RemoteAddress = tunnel.AnyRemote
	running(func(s *tunnel.Status) {
		s.CurrentRemoteAddress, s.Remotes, s.KeepaliveState = tunnel.AnyRemote, &tunnel.Remotes{}, keepalive.Off.String()
	})(l)
}

// index returns the index of the tunnel's interface.
func index(l *lab) string {
	return strings.TrimSpace(l.here.Run("sh", "-c", "cut -d: -f1 <<E | head -1\n$(ip -o link show ipip1)\nE"))
}
