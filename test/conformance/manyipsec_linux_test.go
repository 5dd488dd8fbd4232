package conformance

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"ipipd/internal/ipv4"
	"ipipd/internal/warning"
	"ipipd/test/netlab"
)

// encryptedUpAny starts a tunnel with many remotes and a secret.
func encryptedUpAny(t *testing.T, ns *netlab.NS, n int, more ...string) *netlab.Daemon {
	t.Helper()
	return variant{}.upAny(t, ns, n, append([]string{"--ipsec-secret-file", secretFile(t, secret), "--ipsec-dpd", "2s,2"}, more...)...)
}

// remoteIPsec returns what print says about the SAs with a remote; zero if nothing.
func remoteIPsec(d *netlab.Daemon, n int) netlab.RemoteIPsec {
	for _, r := range d.Status().IPsecRemotes {
		if r.Remote == outerOf(n) {
			return r
		}
	}
	return netlab.RemoteIPsec{}
}

// ikeMessages captures packets to UDP port 500.
func ikeMessages(t *testing.T, ns *netlab.NS, ifname string) *netlab.Recorder {
	t.Helper()
	return netlab.Capture(t, ns, ifname, func(f netlab.Frame) bool {
		p := f.Packet
		return len(p) > 28 && p[9] == 17 && p[22] == 500>>8 && p[23] == 500&0xff
	})
}

// answeredFrom is answered with a source address.
func answeredFrom(ns *netlab.NS, source, to string) bool {
	_, err := ns.Try("ping", "-c", "1", "-W", netlab.Seconds(netlab.Scale(time.Second)), "-I", source, to)
	return err == nil
}

// The first packet to a remote starts the negotiation of an SA, and only packets authenticated by the SA of their route's
// gateway come in. The SA goes with the route, and comes back with the next packet.
func TestManyIPsec_twoRemotes(t *testing.T) {
	t.Parallel()
	for name, flags := range ipsecModes {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			flags := append([]string{"--ipsec-lifetime", "1m,10s"}, flags...)
			hub, spoke := mesh(t, 2)
			encrypted := rejectCleartext(t, hub, "br0")
			ike := ikeMessages(t, hub, "br0")
			d := encryptedUpAny(t, hub, 1, flags...)
			if s := d.Status(); !s.Running || !strings.HasPrefix(s.IPsec, "no SA") {
				t.Errorf("at the start: running %v, ipsec %q", s.Running, s.IPsec)
			}
			routeTo(hub, "10.11.0.0/16", 11)
			routeTo(hub, "10.12.0.0/16", 12)
			many := encryptedUpAny(t, spoke[1], 12, flags...)
			routeTo(spoke[1], "10.10.0.0/16", 1)
			routeTo(spoke[1], "10.255.0.1/32", 1)
			netlab.Eventually(t, "the routes are followed", func() bool {
				_, _ = hub.Try("ping", "-c", "1", "-W", "1", "-I", "10.10.0.1", "10.12.0.1")
				return remoteIPsec(d, 12).SPI != ""
			})
			if got := ike.Matching(netlab.Source(outerOf(11))); len(got) != 0 || remoteIPsec(d, 11).Remote != "" {
				t.Error("a remote that no packet goes to is negotiated with")
			}
			ping(t, hub, "-I", "10.10.0.1", "10.12.0.1")
			ping(t, spoke[1], "-I", "10.12.0.1", "10.10.0.1")
			transfer(t, hub, spoke[1], "10.12.0.1", 1<<20)

			// The peer of one remote begins by itself.
			single := netlab.Up(t, spoke[0], "t0", append([]string{"--local-address", outerOf(11), "--remote-address", outerOf(1), "--address", "10.255.0.11/32",
				"--keepalive", "off", "--route", "10.10.0.0/16", "--route", "10.255.0.1/32", "--ipsec-dpd", "2s,2", "--ipsec-secret-file", secretFile(t, secret)}, flags...)...)
			awaitRunning(t, single)
			ping(t, spoke[0], "-I", "10.11.0.1", "10.10.0.1")
			ping(t, hub, "-I", "10.10.0.1", "-s", "5000", "10.11.0.1")
			if s := d.Status(); s.IPsec != "SAs with 2 remotes" || len(s.IPsecRemotes) != 2 {
				t.Errorf("print has %q, %+v", s.IPsec, s.IPsecRemotes)
			}

			// An inner source of the other remote.
			spoke[0].Run("ip", "address", "add", "10.12.0.9/32", "dev", "lo")
			if _, err := spoke[0].Try("ping", "-c", "1", "-W", "1", "-I", "10.12.0.9", "10.10.0.1"); err == nil || d.Drops("reverse-path") == 0 {
				t.Error("an inner source of another remote is accepted")
			}
			first := remoteIPsec(d, 12).SPI
			netlab.Eventually(t, "the keys are replaced", func() bool { s := remoteIPsec(d, 12).SPI; return s != "" && s != first })
			ping(t, hub, "-I", "10.10.0.1", "10.12.0.1")

			hub.Run("ip", "route", "del", "10.12.0.0/16")
			netlab.Eventually(t, "the SA goes with the route", func() bool { return remoteIPsec(d, 12).Remote == "" })
			netlab.Eventually(t, "the remote is told", func() bool { return remoteIPsec(many, 1).SPI == "" })
			routeTo(hub, "10.12.0.0/16", 12)
			netlab.Eventually(t, "and it comes back", func() bool { return answeredFrom(hub, "10.10.0.1", "10.12.0.1") })

			// The hub is killed: the spokes send by SAs that are gone, until it negotiates anew.
			d.Stop(syscall.SIGKILL)
			d = d.Restart()
			routeTo(hub, "10.11.0.0/16", 11)
			routeTo(hub, "10.12.0.0/16", 12)
			netlab.Eventually(t, "a remote that sends by an old SA gets a new one", func() bool { return answeredFrom(spoke[1], "10.12.0.1", "10.10.0.1") })
			netlab.Eventually(t, "another one too", func() bool { return answeredFrom(spoke[0], "10.11.0.1", "10.10.0.1") })
			d.Stop(syscall.SIGTERM)
			netlab.Eventually(t, "the peer of one remote is told of the end", func() bool { return !single.Status().Running })
			if encrypted.Load() < 500 {
				t.Errorf("%d packets were encrypted: was anything captured?", encrypted.Load())
			}
		})
	}
}

// One of ten remotes has another secret: the nine others do not suffer, and a warning names it.
func TestManyIPsec_tenRemotes(t *testing.T) {
	t.Parallel()
	const n = 10
	hub, spoke := mesh(t, n)
	encrypted := rejectCleartext(t, hub, "br0")
	d := encryptedUpAny(t, hub, 1, "--ipsec-exchange", "ike2", "--ipsec-pfs-group", "ecp256")
	for i, s := range spoke {
		key := secret
		if i == 3 {
			key = "another secret than that of the others"
		}
		variant{}.upAny(t, s, 11+i, "--ipsec-exchange", "ike2", "--ipsec-pfs-group", "ecp256", "--ipsec-secret-file", secretFile(t, key))
		routeTo(s, "10.10.0.0/16", 1)
		routeTo(hub, fmt.Sprintf("10.%d.0.0/16", 11+i), 11+i)
	}
	for i := range spoke {
		if i != 3 {
			to := fmt.Sprintf("10.%d.0.1", 11+i)
			netlab.Eventually(t, "the first packets have an SA negotiated", func() bool { return answeredFrom(hub, "10.10.0.1", to) })
		}
	}
	netlab.Eventually(t, "the warning names the one", func() bool {
		_, _ = hub.Try("ping", "-c", "1", "-W", "1", "-I", "10.10.0.1", "10.14.0.1")
		status := d.Status()
		detail := status.Warning(warning.IPsecNotEstablished).Detail
		return strings.Contains(detail, "192.0.2.14 the secret is not the peer's") && !strings.Contains(detail, "192.0.2.15")
	})
	for i := range spoke {
		if i != 3 {
			ping(t, hub, "-I", "10.10.0.1", fmt.Sprintf("10.%d.0.1", 11+i))
		}
	}
	s := d.Status()
	if !strings.HasPrefix(s.IPsec, "SAs with 9 of 10 remotes: 192.0.2.14 not established: the secret is not the peer's") {
		t.Errorf("print has %q", s.IPsec)
	}
	if encrypted.Load() == 0 {
		t.Error("nothing was encrypted: was anything captured?")
	}
}

// Packets that are not protected by the SA of a remote do not come in, and packets without a gateway do not go out.
func TestManyIPsec_cleartext(t *testing.T) {
	t.Parallel()
	hub, spoke := mesh(t, 1)
	metrics := filepath.Join(t.TempDir(), "metrics.sock")
	d := encryptedUpAny(t, hub, 1, "--accept-from", "any-peer", "--metrics-address", "unix:"+metrics)
	drops := startCapture(t, d, "--drops")
	routeTo(hub, "10.11.0.0/16", 11)
	inside := netlab.Capture(t, hub, "t0", func(f netlab.Frame) bool { return !f.Outgoing })
	wire := netlab.Capture(t, spoke[0], "veth0", func(f netlab.Frame) bool { return !f.Outgoing && f.Packet[9] == 4 })
	into := newInjector(t, spoke[0], "veth0", hub, "br0")
	outer := func(inner []byte) []byte {
		return build(ipv4.Header{TTL: 64, Protocol: ipv4.ProtocolIPIP, Source: addr(outerOf(11)), Destination: addr(outerOf(1))}, inner)
	}
	reflect := build(ipv4.Header{TTL: 2, Protocol: ipv4.ProtocolIPIP, Source: addr(outerOf(1)), Destination: addr(outerOf(11))}, nil)
	from := ipv4.Header{TTL: 64, Protocol: ipv4.ProtocolUDP, Source: addr("10.11.0.1"), Destination: addr("10.10.0.1")}
	into.send(outer(datagram(from, 100)), outer(reflect), outer(nil))
	netlab.Eventually(t, "clear text is counted", func() bool { return d.Drops("esp-plain-text") == 3 })

	// Without a gateway the inner destination would be the remote, but with a secret a route has to name it.
	hub.Run("ip", "route", "add", "192.0.2.128/25", "dev", "t0")
	for reason := range netlab.DropsProvoked(netlab.ManyEncrypted) {
		netlab.Eventually(t, "what has no gateway is counted", func() bool {
			_, _ = hub.Try("ping", "-c", "1", "-W", "1", "-I", "10.10.0.1", "192.0.2.200")
			return len(dropSeen(t, d, metrics, drops, reason)) == 0
		})
	}
	if got := append(inside.Frames(), wire.Frames()...); len(got) != 0 {
		t.Errorf("got through: %s", netlab.Describe(got[0].Packet))
	}
	if s := d.Status(); len(s.IPsecRemotes) != 0 {
		t.Errorf("clear text has an SA negotiated: %+v", s.IPsecRemotes)
	}
}

// Another secret at reload ends the SAs, and is negotiated with once the remotes have it.
func TestManyIPsec_reload(t *testing.T) {
	t.Parallel()
	hub, spoke := mesh(t, 2)
	rejectCleartext(t, hub, "br0")
	file := filepath.Join(t.TempDir(), "tunnels.yaml")
	write := func(key string) {
		t.Helper()
		keyFile := filepath.Join(filepath.Dir(file), fmt.Sprintf("secret-%d", len(key))) // a folder that the sandbox has
		text := fmt.Sprintf("tunnels:\n- {name: t0, local-address: %s, remote-address: any, address: 10.255.0.1/32, ipsec-secret-file: %s}\n", outerOf(1), keyFile)
		for name, content := range map[string]string{file: text, keyFile: key} {
			if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	write(secret)
	d := netlab.UpConfig(t, hub, "t0", file)
	for i, s := range spoke {
		n := 11 + i
		routeTo(hub, fmt.Sprintf("10.%d.0.0/16", n), n)
		encryptedUpAny(t, s, n)
		routeTo(s, "10.10.0.0/16", 1)
		netlab.Eventually(t, "there is an SA", func() bool { return answeredFrom(hub, "10.10.0.1", fmt.Sprintf("10.%d.0.1", n)) })
	}
	write("another secret than that of the remotes")
	if out, err := d.Run("reload"); err != nil {
		t.Fatal(out)
	}
	if s := d.Status(); len(s.IPsecRemotes) != 0 || !s.Running {
		t.Errorf("after another secret: running %v, %+v", s.Running, s.IPsecRemotes)
	}
	netlab.Eventually(t, "the remotes do not have it", func() bool {
		_, _ = hub.Try("ping", "-c", "1", "-W", "1", "-I", "10.10.0.1", "10.11.0.1")
		return strings.Contains(remoteIPsec(d, 11).IPsec, "the secret is not the peer's")
	})
	write(secret)
	if out, err := d.Run("reload"); err != nil {
		t.Fatal(out)
	}
	for i := range spoke {
		netlab.Eventually(t, "the secret is theirs again", func() bool { return answeredFrom(hub, "10.10.0.1", fmt.Sprintf("10.%d.0.1", 11+i)) })
	}
	d.AwaitNoWarning(warning.IPsecNotEstablished)
}
