package interop

import (
	"strings"
	"testing"

	"ipipd/test/netlab"
)

// linuxPeer returns the script that peer-config prints for the guest.
func linuxPeer(t *testing.T, d *netlab.Daemon) string {
	t.Helper()
	out, err := d.Run("peer-config", "t0", "--for", "linux", "--show-sensitive")
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var script strings.Builder
	for line := range strings.Lines(out) {
		if !strings.HasPrefix(line, "ipipd: ") && !strings.HasPrefix(line, "nft ") { // on standard error; there may be none in the guest
			script.WriteString(line)
		}
	}
	return script.String()
}

// A Linux kernel, configured by the output of peer-config, is the other end, with fixed and inherited values.
func TestPeerConfig_kernel(t *testing.T) {
	t.Parallel()
	l := newKernelLab(t)
	for name, flags := range map[string][]string{
		"default": nil,
		"inherit": {"--ttl", "inherit", "--mtu", "1400", "--dscp", "46", "--dont-fragment", "inherit"},
	} {
		t.Run(name, func(t *testing.T) {
			d := up(t, l.ours, flags...)
			l.guest.MustRun("ip link delete t0 2>/dev/null; set -e\n" + linuxPeer(t, d))
			wire := l.record(t)
			ping(t, inNamespace(l.ours), peerInner, 1300, "")
			ping(t, l.guest.Run, ourInner, 1300, "-t 9 -M dont")
			ttl, tos, df := uint8(255), uint8(0), true
			if name == "inherit" {
				ttl, tos, df = 9, 46<<2, false
			}
			wire.Await(received(netlab.TTL(ttl), netlab.TOS(tos), netlab.DF(df), request(netlab.TTL(9), netlab.DF(false))))
		})
	}
}

// strongSwan, configured by the output of peer-config, is the other end of an encrypted tunnel, in IKEv1 and IKEv2, whoever
// initiates the negotiation.
func TestPeerConfig_strongSwan(t *testing.T) {
	t.Parallel()
	for name, flags := range map[string][]string{
		"main": nil,
		"ike2": {"--ipsec-exchange", "ike2", "--ipsec-pfs-group", "ecp256"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ours, spare := netlab.New(t), netlab.New(t)
			netlab.Veth(t, ours, spare, netlab.End{Name: "eth0", Address: ourOuter + "/24"}, netlab.End{Name: "guest0"})
			s := netlab.StartStrongSwan(t, spare, "guest0", peerOuter+"/24", "")
			d := up(t, ours, append([]string{"--ipsec-secret", `mellon "mellon" #mellon`, "--keepalive", "1s,5", "--keepalive-probe", "echo", "--keepalive-target", peerInner}, flags...)...)
			s.MustRun("mount -t tmpfs none /etc/swanctl && mkdir /etc/swanctl/conf.d && echo 'include conf.d/*.conf' >/etc/swanctl/swanctl.conf")
			s.MustRun("export STRONGSWAN_CONF=/tmp/strongswan.conf\n" + linuxPeer(t, d))
			awaitRunning(t, d, true, "up")
			ping(t, inNamespace(ours), peerInner, 1300, "")
			ping(t, s.Run, ourInner, 56, "")
		})
	}
}
