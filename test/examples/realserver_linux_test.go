package examples

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"ipipd/internal/ipv4"
	"ipipd/internal/warning"
	"ipipd/test/netlab"
)

// vip is the address that the real servers of the examples serve.
const vip = "203.0.113.5"

// realServers are two real servers of an example, each with a TCP server that says its name, and a client on another
// segment.
type realServers struct {
	*underlay
	servers []*netlab.NS
	tunnels []*netlab.Daemon
	client  *netlab.NS
}

func newRealServers(t *testing.T, name string) *realServers {
	t.Helper()
	r := &realServers{underlay: newUnderlay(t)}
	for n := 1; n <= 2; n++ {
		s, _ := r.node(t, fmt.Sprintf("192.0.2.2%d", n))
		for _, of := range []string{"all", "default"} { // as some distributions have it
			s.Sysctl("net.ipv4.conf."+of+".rp_filter", "1")
		}
		d := netlab.UpConfig(t, s, "ipip0", filepath.Join(example(t, name), "ipipd.yaml"))
		d.AwaitWarning(warning.SYNACKMSS)
		s.Run("ip", "route", "change", "default", "via", "192.0.2.254", "dev", "eth0", "advmss", "1440")
		// The server sends its name at once, and the number of bytes received when the client has ended its side.
		start(t, s, "socat", "TCP-LISTEN:80,fork,reuseaddr", "SYSTEM:echo server "+strconv.Itoa(n)+"; wc -c")
		r.servers, r.tunnels = append(r.servers, s), append(r.tunnels, d)
	}
	r.client, _ = r.node(t, "198.51.100.7")
	return r
}

// finish fails unless the tunnels have worked, without a warning.
func (r *realServers) finish(t *testing.T) {
	t.Helper()
	for i, d := range r.tunnels {
		d.AwaitNoWarning(warning.SYNACKMSS)
		if s := d.Status(); s.TxPacket != 0 || s.RxPacket == 0 || len(s.Warnings) > 0 {
			t.Errorf("server %d has sent %d and received %d packets, and warns: %+v", i+1, s.TxPacket, s.RxPacket, s.Warnings)
		}
	}
}

// synAck checks for a TCP segment of the VIP with SYN and ACK, and that MSS.
func synAck(mss uint16) netlab.Check {
	return netlab.All(netlab.Protocol(ipv4.ProtocolTCP), netlab.Source(vip), func(p ipv4.Packet) error {
		tcp := p.Payload()
		if len(tcp) < 24 || tcp[13]&0x12 != 0x12 || tcp[20] != 2 || binary.BigEndian.Uint16(tcp[22:]) != mss {
			return fmt.Errorf("no SYN-ACK with an MSS of %d", mss)
		}
		return nil
	})
}

// Connections through IPVS reach both servers, and uploads fit the way to them.
func TestRealServer_ipvs(t *testing.T) {
	t.Parallel()
	need(t, "ipvsadm", "ipvsadm")
	r := newRealServers(t, "ipvs")
	r.router.Run("ip", "route", "add", vip, "via", "192.0.2.10")
	director := netlab.StartGuest(t, r.spare(t, "192.0.2.10"), "guest0", netlab.GuestOptions{Address: "192.0.2.10/24", Modules: []string{
		"lib/crc-ccitt", "net/ipv6/ipv6", "lib/libcrc32c", "net/ipv4/netfilter/nf_defrag_ipv4", "net/ipv6/netfilter/nf_defrag_ipv6",
		"net/netfilter/nf_conntrack", "net/netfilter/ipvs/ip_vs", "net/netfilter/ipvs/ip_vs_rr"}})
	rules, err := os.ReadFile("../../packaging/examples/ipvs/ipvsadm.rules")
	if err != nil {
		t.Fatal(err)
	}
	director.MustRun("ip address add " + vip + "/32 dev vec0; ip route add default via 192.0.2.254")
	if _, err := director.Run("ipvsadm -R <<'END'\n" + string(rules) + "END\n"); err != nil {
		t.Skipf("the guest has no IPVS: %v", err)
	}
	answers := netlab.CaptureReceived(t, r.client, "eth0")
	const size = 200_000
	heard := map[string]bool{}
	netlab.Eventually(t, "both servers answer, and count all of an upload", func() bool {
		out, _ := r.client.Try("sh", "-c", fmt.Sprintf("head -c %d /dev/zero | socat -t 20 - TCP:%s:80,connect-timeout=5", size, vip))
		for n := 1; n <= 2; n++ {
			if strings.HasPrefix(out, fmt.Sprintf("server %d\n%d\n", n, size)) {
				heard[strconv.Itoa(n)] = true
			}
		}
		return len(heard) == 2
	})
	answers.Await(synAck(1440))
	r.finish(t)
}

// The servers answer flows whose outer sources Katran makes up, and drop none of their packets.
func TestRealServer_katran(t *testing.T) {
	t.Parallel()
	if _, err := os.Stat("/usr/bin/scapy"); err != nil {
		t.Skip("needs scapy (package python3-scapy)")
	}
	r := newRealServers(t, "katran")
	katran, _ := r.node(t, "192.0.2.10")
	r.client.Run("ip", "route", "add", "local", "198.51.100.0/25", "dev", "lo") // all clients
	answers := netlab.CaptureReceived(t, r.client, "eth0")
	const flows = 2000
	out := katran.Run("/usr/bin/python3", filepath.Join(example(t, "katran"), "katran.py"), vip, "192.0.2.21", "192.0.2.22",
		"--clients", "198.51.100.0/25", "--flows", strconv.Itoa(flows))
	var sources int
	if _, err := fmt.Sscanf(out, "%d outer sources", &sources); err != nil || sources < flows/2 {
		t.Errorf("%s: want some %d", out, flows)
	}
	answered := map[string]bool{} // by destination and its port
	netlab.Eventually(t, "most flows are answered, with an MSS that fits", func() bool {
		for _, f := range answers.Matching(synAck(1440)) {
			if p, err := ipv4.Parse(f.Packet); err == nil {
				answered[string(p.Bytes()[ipv4.OffDestination:][:4])+string(p.Payload()[2:4])] = true
			}
		}
		return len(answered) > flows*9/10
	})
	for i, d := range r.tunnels {
		if drops := d.Status().AllDrops(); len(drops) > 0 {
			t.Errorf("server %d has dropped %v", i+1, drops)
		}
	}
	t.Logf("%d of %d flows from %d outer sources are answered", len(answered), flows, sources)
	r.finish(t)
}
