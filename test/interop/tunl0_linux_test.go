package interop

import (
	"fmt"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"ipipd/internal/drop"
	"ipipd/internal/ipv4"
	"ipipd/test/netlab"
	"ipipd/test/routesets"
)

// manyDevices are the guest's tunnels with many remotes, and what makes them. tunl0 comes with the module.
var manyDevices = []struct{ name, script string }{
	{"tunl0", "ip link set tunl0 up"},
	{"many", "ip tunnel add many mode ipip remote any local " + peerOuter + " && ip link set many up"},
}

// underlayTable gives the guest's outer packets a routing table of their own, which no set of routes changes.
const underlayTable = "ip rule add pref 5 ipproto 4 lookup 99; ip route add default via " + ourOuter + " dev vec0 table 99"

// Linux's own tunnels with many remotes send each packet where routesets.Sets says.
func TestTunl0_routesets(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("python3"); err != nil {
		t.Skip("needs python3 (package python3)")
	}
	l := newKernelLab(t)
	wire := l.record(t)
	l.guest.MustRun("set -e; " + underlayTable + "; sysctl -qw net.ipv4.fib_multipath_hash_policy=1")
	markers := 0
	for _, device := range manyDevices {
		l.guest.MustRun(fmt.Sprintf("%s && ip address add %s/32 dev %s", device.script, peerInner, device.name))
		for _, s := range routesets.Sets {
			t.Run(device.name+"/"+s.Name, func(t *testing.T) {
				begun := len(wire.Frames())
				markers++
				out := l.guest.MustRun(sendAll(&s, device.name, markers))
				// Packets arrive in order: this one is the last.
				wire.Await(netlab.Protocol(ipv4.ProtocolUDP), netlab.TotalLen(28+markers))
				went := map[string]map[string]bool{} // inner destination, outer destinations
				for _, f := range wire.Frames()[begun:] {
					p, err := ipv4.Parse(f.Packet)
					if err != nil || p.Protocol() != ipv4.ProtocolIPIP {
						continue
					}
					inner, err := ipv4.Parse(p.Payload())
					if err != nil {
						t.Fatal(err)
					}
					to := netip.AddrFrom4(inner.Destination()).String()
					if went[to] == nil {
						went[to] = map[string]bool{}
					}
					went[to][netip.AddrFrom4(p.Destination()).String()] = true
				}
				for _, want := range s.Want {
					refused := slices.Contains(strings.Fields(out), want.Destination)
					switch got := went[want.Destination]; {
					case want.Drop == drop.RemoteNotUsable: // Linux sends it to the group; ipipd does not
					case refused != want.Kernel:
						t.Errorf("%s: the kernel refuses it: %v, want %v\n%s", want.Destination, refused, want.Kernel, out)
					case len(got) == 0 != want.Kernel:
						t.Errorf("%s: goes to %v, want %v", want.Destination, got, want.Remotes)
					default:
						for remote := range got {
							if !slices.Contains(want.Remotes, remote) {
								t.Errorf("%s: goes to %v, want one of %v", want.Destination, remote, want.Remotes)
							}
						}
						if len(want.Remotes) > 1 && len(got) < 2 {
							t.Errorf("%s: all flows go to %v, want them among %v", want.Destination, got, want.Remotes)
						}
					}
				}
			})
		}
		l.guest.MustRun(fmt.Sprintf("ip address flush dev %[1]s; ip link set %[1]s down", device.name))
	}
}

// sendAll returns a script for the guest: it adds the routes, sends UDP datagrams of several flows to each
// destination, prints the destinations that the kernel refuses, sends a datagram of marker bytes outside the
// tunnel, and removes the routes.
//
// The sockets are not bound to a source: with one, Linux sends multicast without asking its routes.
func sendAll(s *routesets.Set, device string, marker int) string {
	var flows []string
	for _, want := range s.Want {
		n := 1
		if len(want.Remotes) > 1 {
			n = 40
		}
		flows = append(flows, fmt.Sprintf("('%s', %d)", want.Destination, n))
	}
	add := strings.ReplaceAll("\n"+s.Script(device), "\nip ", "\n")
	return fmt.Sprintf(`set -e
ip -batch - <<'E'
%s
E
python3 -IS -c "
from _socket import *
for to, flows in [%s]:
    try:
        for i in range(flows): socket(AF_INET, SOCK_DGRAM).sendto(b'.', (to, 9))
    except OSError: print(to)
plain = socket(AF_INET, SOCK_DGRAM)
plain.setsockopt(SOL_SOCKET, SO_BINDTODEVICE, b'vec0')
plain.sendto(%d * b'.', ('%s', 9))
"
ip -batch - <<'E'
%s
E`, add, strings.Join(flows, ", "), marker, ourOuter, strings.ReplaceAll(add, " add ", " del "))
}

// upAny starts ipipd with many remotes.
func upAny(t *testing.T, ns *netlab.NS, inner, fastPath string) *netlab.Daemon {
	t.Helper()
	return netlab.Up(t, ns, "t0", "--local-address", ourOuter, "--remote-address", "any", "--address", inner+"/32", "--allow-fast-path", fastPath)
}

// ipipd with many remotes and a Linux tunnel with many remotes reach each other.
func TestTunl0_peer(t *testing.T) {
	t.Parallel()
	for _, fastPath := range []string{"no", "yes"} {
		t.Run("fast path "+fastPath, func(t *testing.T) {
			t.Parallel()
			l := newKernelLab(t)
			if fastPath == "yes" {
				netlab.DisableOffload(l.ours, "eth0") // as in TestKernel_bulkTCPFastPath
			}
			l.ours.Run("ip", "address", "add", "10.10.0.1/16", "dev", "lo")
			l.guest.MustRun("ip address add 10.20.0.1/16 dev lo; ip link set lo up")
			wire := l.record(t)
			d := upAny(t, l.ours, "10.10.0.2", fastPath)
			l.ours.Run("ip", "route", "add", "10.20.0.0/16", "via", peerOuter, "dev", "t0", "onlink")
			for _, device := range manyDevices {
				l.guest.MustRun(fmt.Sprintf("set -e; %s; ip address add 10.20.0.2/32 dev %s; ip route replace 10.10.0.0/16 via %s dev %[2]s onlink", device.script, device.name, ourOuter))
				for _, size := range []int{56, fullSize, manyFrags} {
					ping(t, inNamespace(l.ours), "10.20.0.1", size, "")
					ping(t, l.guest.Run, "10.10.0.1", size, "")
				}
				if fastPath == "yes" && !netlab.WaitFor(func() bool { return d.Status().FastPath == "active" }) {
					t.Skipf("the fast path is not there: %s", d.Status().FastPath)
				}
				bulk(t, inNamespace(l.ours), l.guest.Run, "10.20.0.1", false)
				bulk(t, inNamespace(l.ours), l.guest.Run, "10.20.0.1", true)
				l.guest.MustRun(fmt.Sprintf("ip address flush dev %[1]s; ip link set %[1]s down", device.name))
			}
			wire.Await(sent(netlab.TotalLen(1500), request()))
			wire.Await(received(netlab.TotalLen(1500), request()))
			if drops := d.Status().AllDrops(); len(drops) > 0 {
				t.Errorf("drops are %v", drops)
			}
		})
	}
}

// A hub of ten namespaces carries packets between them: ipipd with many remotes, or Linux's own. Each spoke is
// ipipd with one remote, the hub.
func TestTunl0_hub(t *testing.T) {
	t.Parallel()
	const spokes = 10
	for _, hub := range []string{"ipipd", "tunl0"} {
		t.Run(hub, func(t *testing.T) {
			t.Parallel()
			link := netlab.New(t)
			link.Run("sh", "-ec", "ip link add br0 type bridge; ip link set br0 up")
			port := func(name string) { link.Run("ip", "link", "set", name, "master", "br0") }
			var run shell
			var daemon *netlab.Daemon
			if hub == "ipipd" {
				ns := netlab.New(t)
				netlab.Veth(t, link, ns, netlab.End{Name: "hub"}, netlab.End{Name: "eth0", Address: ourOuter + "/24"})
				daemon = upAny(t, ns, ourInner, "yes")
				run = inNamespace(ns)
			} else {
				spare := netlab.New(t)
				netlab.Veth(t, link, spare, netlab.End{Name: "hub"}, netlab.End{Name: "guest0"})
				guest := netlab.StartGuest(t, spare, "guest0", netlab.GuestOptions{Address: ourOuter + "/24", Modules: netlab.ModulesIPIP})
				guest.MustRun("ip link set tunl0 name t0; ip link set t0 up; ip address add " + ourInner + "/32 dev t0")
				run = guest.Run
			}
			port("hub")
			var spoke []*netlab.NS
			routes := "set -e; cd /proc/sys/net/ipv4; echo 1 >ip_forward; echo 0 | tee conf/t0/send_redirects >conf/all/send_redirects"
			for i := range spokes {
				ns := netlab.New(t)
				outer := fmt.Sprintf("192.0.2.%d", 11+i)
				netlab.Veth(t, link, ns, netlab.End{Name: fmt.Sprintf("port%d", i)}, netlab.End{Name: "eth0", Address: outer + "/24"})
				port(fmt.Sprintf("port%d", i))
				netlab.Up(t, ns, "t0", "--local-address", outer, "--remote-address", ourOuter, "--address", fmt.Sprintf("10.%d.0.1/32", 11+i), "--route", "10.0.0.0/8", "--keepalive", "off")
				routes += fmt.Sprintf("; ip route add 10.%d.0.0/16 via %s dev t0 onlink", 11+i, outer)
				spoke = append(spoke, ns)
			}
			if out, err := run(routes); err != nil {
				t.Fatal(err, out)
			}
			for i, ns := range spoke {
				ping(t, inNamespace(ns), ourInner, fullSize, "")
				ping(t, inNamespace(ns), fmt.Sprintf("10.%d.0.1", 11+(i+1)%spokes), fullSize, "")
			}
			if daemon != nil {
				if drops := daemon.Status().AllDrops(); len(drops) > 0 {
					t.Errorf("drops are %v", drops)
				}
			}
		})
	}
}
