package doctor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"ipipd/internal/netstate"
	"ipipd/internal/tunnel"
	"ipipd/keepalive"
	"ipipd/test/netlab"
)

func needTools(t *testing.T) {
	for _, tool := range []string{"nft", "iptables-nft", "sysctl"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s", tool)
		}
	}
}

// Each broken lab is reported with its codes and no others, the first with a remedy, which mends it if mended says so.
func TestExamine_broken(t *testing.T) {
	needTools(t)
	for _, b := range brokens {
		t.Run(b.name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			b.by(l)
			r := l.examine()
			if !slices.Contains(b.want, CapabilitiesLeft) {
				withoutCapabilities(r)
			}
			got := codes(r)
			if len(got) != len(b.want) || slices.ContainsFunc(b.want, func(c Code) bool { return !slices.Contains(got, c) }) {
				t.Fatalf("%q is named, want %q: %+v, skipped %+v", got, b.want, r.Findings, r.Skipped)
			}
			f := r.Findings[slices.Index(got, b.want[0])]
			if !strings.Contains(f.What+";"+f.Why+";"+f.Do, b.says) {
				t.Errorf("%+v does not say %q", f, b.says)
			}
			if f.What == "" || f.Why == "" || f.Do == "" {
				t.Errorf("%+v lacks something", f)
			}
			if b.mended {
				do, _, _ := strings.Cut(f.Do, ", or ")
				l.here.Run("sh", "-c", do)
				if got := codes(l.examine()); slices.Contains(got, f.Code) {
					t.Errorf("after %s it is still so", f.Do)
				}
			}
		})
	}
}

// withoutCapabilities removes the note on which capabilities a running process has.
func withoutCapabilities(r *Report) {
	r.Findings = slices.DeleteFunc(r.Findings, func(f Finding) bool { return f.Code == CapabilitiesLeft && f.Severity == Note })
}

// Each code is wanted in brokens, but ProcessSilent, which a script of cmd/ipipd tests, and TestExamine_realServer's.
func TestCodes(t *testing.T) {
	seen := map[Code]bool{ProcessSilent: true, VIPMissing: true, VIPAnswered: true, SYNACKMSS: true}
	for _, b := range brokens {
		for _, c := range b.want {
			seen[c] = true
		}
	}
	for _, c := range Codes {
		if !seen[c.Code] {
			t.Errorf("no test sees %s named", c.Code)
		}
	}
}

// A healthy tunnel has no findings, whether it runs or not, but the note on capabilities, and no check is skipped but
// that of the interface's managers while there is no interface.
func TestExamine_healthy(t *testing.T) {
	needTools(t)
	l := newLab(t)
	l.upThere()
	r := l.examine()
	if len(r.Findings) != 0 || r.Status() != 0 || len(r.Skipped) != 1 || r.Skipped[0].Check != "managers" {
		t.Errorf("not running: %+v", r)
	}
	l.up(state(keepalive.Up), "--keepalive", "1s,10")
	r = l.examine()
	withoutCapabilities(r)
	if len(r.Findings) != 0 || r.Status() != 0 || len(r.Skipped) != 0 {
		t.Errorf("running: %+v", r)
	}
}

// A peer behind a 1:1 NAT that answers probes is no finding.
func TestExamine_natPeer(t *testing.T) {
	needTools(t)
	l := newLab(t)
	wire := netlab.CaptureReceived(t, l.here, "eth0")
	natThere(l)
	answers := []netlab.Check{netlab.Source(remote), netlab.Protocol(4), netlab.TotalLen(20)}
	l.up(func(s *tunnel.Status) bool {
		return s.KeepaliveState == keepalive.Up.String() && len(wire.Matching(answers...)) >= 5 // more than the unanswered ones that a warning takes
	}, "--keepalive", "1s,2")
	r := l.examine()
	withoutCapabilities(r)
	if len(r.Findings) != 0 {
		t.Errorf("%+v", r)
	}
}

// The remedy printed for a peer behind a NAT works: the tunnel then runs by this end's own probes.
//
//	here ── 192.0.2.1/24 eth0 ── eth0 192.0.2.2/24 nat 10.9.9.1/24 eth1 ── eth0 10.9.9.9/24 there
func TestExamine_natPeerRemedy(t *testing.T) {
	needTools(t)
	l := newLab(t)
	nat := l.there
	l.there = netlab.New(t)
	netlab.Veth(t, nat, l.there, netlab.End{Name: "eth1", Address: "10.9.9.1/24"}, netlab.End{Name: "eth0", Address: "10.9.9.9/24"})
	nat.Sysctl("net.ipv4.ip_forward", "1")
	l.there.Run("ip", "route", "add", "default", "via", "10.9.9.1")
	nat.Run("nft", `add table ip n; add chain ip n pre { type nat hook prerouting priority -100; };
		add chain ip n post { type nat hook postrouting priority 100; };
		add rule ip n pre ip daddr `+remote+` dnat to 10.9.9.9; add rule ip n post ip saddr 10.9.9.9 snat to `+remote)
	// Like a peer that is not ipipd, it answers no reflect probe.
	l.there.Run("nft", "table ip x { chain y { type filter hook output priority 0; ip protocol 4 ip length 20 drop; }; }")
	peer := netlab.Up(t, l.there, "ipip1", "--local-address", "10.9.9.9", "--remote-address", local, "--address", "10.255.0.2/30", "--keepalive", "1s,10")
	d := l.up(func(s *tunnel.Status) bool {
		return slices.ContainsFunc(s.Warnings, func(w tunnel.Warning) bool { return Code(w.Code) == PeerBehindNAT })
	}, "--keepalive", "1s,2")
	r := l.examine()
	withoutCapabilities(r)
	if !slices.Equal(codes(r), []Code{PeerBehindNAT}) {
		t.Fatalf("%+v", r)
	}
	if out, err := peer.Run("set", "ipip1", "keepalive=off"); err != nil {
		t.Fatal(err, out)
	}
	netlab.Eventually(t, "without the peer's own probes the tunnel is down", func() bool { return d.Status().KeepaliveState == keepalive.Lost.String() })
	l.here.Run("unshare", "--mount", "sh", "-ec", fmt.Sprintf("mount -t tmpfs none /run; mkdir /run/ipipd /run/bin; mount --bind %s /run/ipipd; ln -s %s /run/bin/ipipd; PATH=/run/bin:$PATH; %s",
		filepath.Dir(d.Socket()), netlab.Binary(t), r.Findings[0].Do))
	netlab.Eventually(t, "with the remedy it runs", func() bool {
		s := d.Status()
		return s.KeepaliveState == keepalive.Up.String() && len(s.Warnings) == 0
	})
}

// What a user without privileges may not see is skipped, and no finding.
func TestExamine_unprivileged(t *testing.T) {
	l := newLab(t)
	replies(fine)(l)
	environment(func(e *Environment) {
		network := e.Network
		e.Network = func(q netstate.Query) (*netstate.Answer, error) {
			a, err := network(q)
			if err == nil {
				copied := *a
				copied.Bypass = "cannot tell: operation not permitted"
				a = &copied
			}
			return a, err
		}
		e.Probe = func(context.Context, []Ask) ([]Reply, error) { return nil, os.NewSyscallError("socket", syscall.EPERM) }
		e.Command = func(context.Context, string, ...string) ([]byte, error) { return nil, errors.New("permission denied") }
	})(l)
	r := l.examine()
	if len(r.Findings) != 0 {
		t.Errorf("%+v", r.Findings)
	}
	for _, check := range []string{"reachability", "firewall", "path-mtu", "fast-path"} {
		if !slices.ContainsFunc(r.Skipped, func(s Skipped) bool { return s.Check == check }) {
			t.Errorf("%s is not said to be skipped: %+v", check, r.Skipped)
		}
	}
}

// A thousand tunnels are examined by one round of probes and one list each of interfaces, routes and kernel tunnels.
func TestExamine_many(t *testing.T) {
	l := newLab(t)
	l.config.Addresses = nil
	running(func(*tunnel.Status) {})(l)
	var probed, listed int
	l.change = func(e *Environment) {
		e.Probe = func(_ context.Context, asks []Ask) ([]Reply, error) {
			probed++
			return slices.Repeat([]Reply{fine}, len(asks)), nil
		}
		interfaces, routes, kernel := e.Interfaces, e.Routes, e.KernelTunnels
		e.Interfaces = func() ([]net.Interface, error) { listed++; return interfaces() }
		e.Routes = func() (map[int][]netstate.RouteMetrics, error) { listed++; return routes() }
		e.KernelTunnels = func() ([]netstate.KernelTunnel, error) { listed++; return kernel() }
	}
	for i := range 1000 {
		status := *l.status
		status.CurrentRemoteAddress = fmt.Sprintf("192.0.2.%d", 2+i%250)
		l.more = append(l.more, Tunnel{Config: l.config, Status: &status})
	}
	l.examine()
	if probed != 1 || listed != 3 {
		t.Errorf("probed %d times, listed %d times: want 1 and 3", probed, listed)
	}
}

// Names are looked up concurrently, and each once, however many tunnels have it.
func TestExamine_names(t *testing.T) {
	l := newLab(t)
	l.config.RemoteAddress = "a.invalid"
	for _, name := range []string{"b.invalid", "a.invalid"} {
		more := Tunnel{Config: l.config}
		more.Config.RemoteAddress = name
		l.more = append(l.more, more)
	}
	var asked atomic.Int32
	both := make(chan struct{})
	l.change = func(e *Environment) {
		e.Resolve = func(context.Context, string) (netip.Addr, error) {
			if asked.Add(1) == 2 {
				close(both)
			}
			<-both
			return netip.Addr{}, errors.New("no such host")
		}
	}
	if got := codes(l.examine()); !slices.Equal(got, []Code{NameNotResolved, NameNotResolved, NameNotResolved}) || asked.Load() != 2 {
		t.Errorf("%q is named, and %d names were looked up", got, asked.Load())
	}
}

// A peer that reflects no probe, such as Linux's ipip, is found to take protocol 4 by a ping of its inner address.
func TestExamine_linuxPeer(t *testing.T) {
	needTools(t)
	l := newLab(t)
	l.upThere()
	l.there.Run("nft", "table inet x { chain y { type filter hook prerouting priority 0; ip protocol 4 ip length 40 drop; }; }")
	r := l.examine()
	if !slices.Equal(codes(r), []Code{KeepaliveUnanswered}) || !strings.Contains(r.Findings[0].Do, "--keepalive-target 10.255.0.2") {
		t.Errorf("%+v", r)
	}
	l.config.KeepaliveProbe, l.config.KeepaliveTarget = keepalive.FormEcho, netip.MustParseAddr("10.255.0.2")
	if got := codes(l.examine()); len(got) != 0 {
		t.Errorf("with echo probes %q is named", got)
	}
	l.config.KeepaliveProbe, l.config.KeepaliveTarget = keepalive.FormReflect, netip.Addr{}
	l.config.Addresses = nil
	if got := codes(l.examine()); !slices.Equal(got, []Code{Protocol4Unanswered}) {
		t.Errorf("without an inner address to ping %q is named", got)
	}
}

// Where pings get lost, as by a rate limit, unanswered probes are sent again, and what may be a loss is not reported
// as a filter.
func TestExamine_loss(t *testing.T) {
	needTools(t)
	for _, c := range []struct {
		name, ping, protocol4 string // rules of the remote
		want                  []Code
		skipped               bool
	}{
		{"the first four pings", "numgen inc mod 16 < 4 drop", "drop", []Code{Protocol4Unanswered}, false},
		{"most pings", "numgen inc mod 10 < 7 drop", "drop", nil, true},
		{"the first probes, and as many pings", "numgen inc mod 16 < 4 drop", "numgen inc mod 16 < 4 drop", []Code{PeerNotSetUp}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			rules := fmt.Sprintf("table inet x; delete table inet x; table inet x { chain y { type filter hook prerouting priority 0; icmp type echo-request ip length %d %s; ip protocol 4 %s; }; }",
				pingSize, c.ping, c.protocol4)
			// The ICMP of other tests may have the kernel lose more answers.
			netlab.Eventually(t, fmt.Sprintf("%q is named", c.want), func() bool {
				l.there.Run("nft", rules)
				r := l.examineOnce()
				told := !slices.ContainsFunc(r.Skipped, func(s Skipped) bool {
					return s.Check == "reachability" && strings.Contains(s.Reason, "could not be told")
				})
				if slices.Equal(codes(r), c.want) && told != c.skipped {
					return true
				}
				t.Logf("%q is named, want %q; skipped: %+v", codes(r), c.want, r.Skipped)
				return false
			})
		})
	}
}
