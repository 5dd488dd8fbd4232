package conformance

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"ipipd/internal/ipv4"
	"ipipd/internal/warning"
	"ipipd/test/netlab"
)

const secret = "correct horse battery staple"

// secretFile writes a file for --ipsec-secret-file and returns its path.
func secretFile(t *testing.T, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(file, []byte(text+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// encryptedUpA and encryptedUpB start one end of an encrypted tunnel.
func encryptedUpA(t *testing.T, a *netlab.NS, more ...string) *netlab.Daemon {
	t.Helper()
	return upA(t, a, append([]string{"--ipsec-secret-file", secretFile(t, secret)}, more...)...)
}

func encryptedUpB(t *testing.T, b *netlab.NS, more ...string) *netlab.Daemon {
	t.Helper()
	return upB(t, b, append([]string{"--ipsec-secret-file", secretFile(t, secret)}, more...)...)
}

// awaitRunning waits until each daemon's tunnel is running.
func awaitRunning(t *testing.T, daemons ...*netlab.Daemon) {
	t.Helper()
	for _, d := range daemons {
		netlab.Eventually(t, "the tunnel is running", func() bool { return d.Status().Running })
	}
}

// marked is the payload of sendMarked, which rejectCleartext looks for.
var marked = strings.Repeat("clear text", 20)

// rejectCleartext captures an interface and fails the test on a cleartext tunnel packet. It
// counts the ESP packets.
func rejectCleartext(t *testing.T, ns *netlab.NS, ifname string) (encrypted *atomic.Int64) {
	t.Helper()
	encrypted = new(atomic.Int64)
	netlab.Capture(t, ns, ifname, func(f netlab.Frame) bool {
		switch p := f.Packet; {
		case len(p) < 20:
		case p[9] == 4 || bytes.Contains(p, []byte(marked[:10])):
			t.Errorf("on the wire: %s % x", netlab.Describe(p), p[:min(len(p), 60)])
		case p[9] == 50, p[9] == 17 && len(p) > 100:
			encrypted.Add(1)
		}
		return false
	})
	return encrypted
}

// ipsecModes are the flags of the IKE exchanges under test.
var ipsecModes = map[string][]string{
	"main":     nil,
	"main-cbc": {"--ipsec-phase1", "aes128-sha1-modp2048", "--ipsec-phase2", "aes256-sha1"},
	"ike2":     {"--ipsec-exchange", "ike2", "--ipsec-pfs-group", "ecp256"},
}

// A tunnel with a secret sends no cleartext: before there is an SA, while rekeying, and when
// the peer crashes, comes back, and terminates.
func TestIPsec_noCleartext(t *testing.T) {
	t.Parallel()
	for name, flags := range ipsecModes {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a, b := hosts(t)
			encrypted := rejectCleartext(t, a, "veth0")
			flags := append([]string{"--ipsec-lifetime", "1m,10s", "--ipsec-dpd", "2s,2"}, flags...)
			da := encryptedUpA(t, a, flags...)
			if s := da.Status(); s.Running || !strings.Contains(s.IPsec, "negotiating") {
				t.Errorf("before there is a peer: running %v, ipsec %q", s.Running, s.IPsec)
			}
			if out := a.Run("ip", "link", "show", "t0"); !strings.Contains(out, "NO-CARRIER") {
				t.Errorf("before there is an SA: %s", out)
			}
			sent, stop := sendMarked(t, a, innerB)
			netlab.Eventually(t, "a hundred datagrams have been tried", func() bool { return sent.Load() >= 100 })
			db := encryptedUpB(t, b, flags...)
			awaitRunning(t, da, db)
			ping(t, a, innerB)
			transfer(t, a, b, innerB, 8<<20)
			transfer(t, b, a, innerA, 8<<20)
			ping(t, a, "-s", "5000", innerB) // fragmented after encryption
			first := da.Status().IPsecSPI
			netlab.Eventually(t, "the keys are replaced", func() bool { return da.Status().IPsecSPI != first })
			ping(t, a, innerB)

			db.Stop(syscall.SIGKILL)
			netlab.Eventually(t, "the tunnel stops running when the peer is dead", func() bool { return !da.Status().Running })
			db = db.Restart()
			awaitRunning(t, da, db)
			netlab.Eventually(t, "the tunnel works again", func() bool { return answered(a, innerB) })
			if status := db.Stop(syscall.SIGTERM); status != 0 {
				t.Errorf("exit status %d", status)
			}
			netlab.Eventually(t, "the tunnel stops running when the peer has gone", func() bool { return !da.Status().Running })
			stop()
			s := da.Status()
			if s.Drops["esp-no-sa"] == 0 {
				t.Errorf("what was not sent is not counted: %v", s.AllDrops())
			}
			for reason, n := range s.AllDrops() {
				if strings.HasPrefix(reason, "esp-") && reason != "esp-no-sa" {
					t.Errorf("%d packets are dropped as %s", n, reason)
				}
			}
			if encrypted.Load() < 1000 {
				t.Errorf("%d packets were encrypted: was anything captured?", encrypted.Load())
			}
			for _, d := range []*netlab.Daemon{da, db} {
				if strings.Contains(d.Log(), "correct horse") {
					t.Error("the secret is in the log")
				}
			}
		})
	}
}

// sendMarked sends marked datagrams to an address until stop is called, and counts them.
func sendMarked(t *testing.T, from *netlab.NS, to string) (sent *atomic.Int64, stop func()) {
	t.Helper()
	sent = new(atomic.Int64)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	var conn net.Conn
	var err error
	from.Do(func() { conn, err = net.Dial("udp4", net.JoinHostPort(to, "9")) })
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(done)
		defer conn.Close()
		for ctx.Err() == nil {
			_, _ = conn.Write([]byte(marked)) // errors are expected: refused, no carrier
			sent.Add(1)
			time.Sleep(time.Millisecond)
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
	return sent, func() { cancel(); <-done }
}

// RFC 4301, section 5.2: cleartext packets from an encrypted peer are dropped, probes
// included.
func TestIPsec_cleartextReceived(t *testing.T) {
	t.Parallel()
	a, b := hosts(t)
	d := encryptedUpA(t, a)
	inside := netlab.Capture(t, a, "t0", nil)
	answers := netlab.Capture(t, a, "veth0", func(f netlab.Frame) bool { return f.Outgoing && f.Packet[9] == 4 })
	into := newInjector(t, b, "veth0", a, "veth0")
	reflect := build(bToA(2), nil)
	copy(reflect[12:], append(addr4(outerA), addr4(outerB)...))
	reflect[9] = 4
	into.send(outerBToA(datagram(bToA(1), 100)), outerBToA(updateChecksum(reflect)), outerBToA(nil))
	netlab.Eventually(t, "they are counted", func() bool { return d.Drops("esp-plain-text") == 3 })
	s := d.Status()
	if s.RxPacket != 0 || s.Running || s.KeepaliveState == "up" {
		t.Errorf("received %d, running %v, keepalive %s", s.RxPacket, s.Running, s.KeepaliveState)
	}
	if got := append(inside.Matching(netlab.Source(innerB)), answers.Matching()...); len(got) != 0 {
		t.Errorf("got through: %s", netlab.Describe(got[0].Packet))
	}
}

// An ESP packet with an unknown SPI is counted, and not answered.
func TestIPsec_unknownSPI(t *testing.T) {
	t.Parallel()
	a, b := hosts(t)
	d := encryptedUpA(t, a, "--keepalive", "off") // its probes without an SA would be counted too
	into := newInjector(t, b, "veth0", a, "veth0")
	stray := build(ipv4.Header{TTL: 64, Protocol: 50, Source: addr(outerB), Destination: addr(outerA)}, bytes.Repeat([]byte{0xa5}, 64))
	into.send(stray, stray, stray)
	netlab.Eventually(t, "they are counted", func() bool { return d.Drops("esp-no-sa") == 3 })
}

func addr4(s string) []byte { a := addr(s); return a[:] }

// The interface's MTU is the path MTU less the overhead of ESP, and of UDP encapsulation
// behind a NAT.
func TestIPsec_mtu(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		phase2 string
		nat    bool
		want   int
	}{
		{"aes256-sha1", false, 1438}, // as RouterOS's: 1500-20-8-16-12, rounded down to 16, less 2
		{"aes256gcm16", false, 1446},
		{"aes256-sha1", true, 1422},
	} {
		t.Run(fmt.Sprint(tt.phase2, " ", tt.nat), func(t *testing.T) {
			t.Parallel()
			a, router, b := routed(t)
			if tt.nat {
				// A NAPT that passes UDP only, as a home router.
				router.Run("nft", `add table ip n; add chain ip n post { type nat hook postrouting priority 100; };
					add rule ip n post oifname "to-b" ip protocol udp masquerade to :20000-30000;
					add chain ip n through { type filter hook forward priority 0; };
					add rule ip n through ip protocol { 4, 50 } drop`)
			}
			encrypted := rejectCleartext(t, router, "to-b")
			flags := []string{"--ipsec-secret-file", secretFile(t, secret), "--ipsec-phase2", tt.phase2, "--dont-fragment", "inherit"}
			da := netlab.Up(t, a, "t0", append([]string{"--remote-address", farB, "--address", innerA + "/24"}, flags...)...)
			remote := farA
			if tt.nat {
				remote = "198.51.100.254"
			}
			db := netlab.Up(t, b, "t0", append([]string{"--remote-address", remote, "--address", innerB + "/24"}, flags...)...)
			awaitRunning(t, da, db)
			for _, d := range []*netlab.Daemon{da, db} {
				netlab.Eventually(t, "the MTU is what the SA leaves", func() bool { return d.Status().ActualMTU == tt.want })
				if s := d.Status(); strings.Contains(s.IPsec, "in UDP") != tt.nat {
					t.Errorf("ipsec: %s", s.IPsec)
				}
			}
			transfer(t, a, b, innerB, 2<<20)
			transfer(t, b, a, innerA, 2<<20)
			a.Run("ping", "-M", "do", "-c", "1", "-w", netlab.Seconds(netlab.Timeout()), "-s", fmt.Sprint(tt.want-28), innerB)

			// The path MTU falls behind the first hop.
			router.Run("ip", "link", "set", "dev", "to-b", "mtu", fmt.Sprint(narrow))
			b.Run("ip", "link", "set", "dev", "veth0", "mtu", fmt.Sprint(narrow))
			if !tt.nat { // a NAT need not translate the quotes in ICMP errors
				netlab.Eventually(t, "the path MTU is learnt from errors about ESP", func() bool {
					_, _ = a.Try("ping", "-M", "do", "-c", "1", "-W", netlab.Seconds(netlab.Scale(time.Second)), "-s", fmt.Sprint(tt.want-28), innerB)
					return da.Status().PathMTU == narrow
				})
				transfer(t, a, b, innerB, 1<<20)
			}
			if encrypted.Load() == 0 {
				t.Error("nothing was encrypted")
			}
		})
	}
}

// The reason of a failed negotiation is in print. The secret is neither there nor in the log.
func TestIPsec_negotiationFailed(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		flags []string // of b
		want  string
	}{
		{"secret", []string{"--ipsec-secret", "another"}, "secret is not the peer's"},
		{"proposal", []string{"--ipsec-secret", secret, "--ipsec-phase1", "aes192-sha384-modp4096"}, "no common proposal in phase 1: ours "},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			a, b := hosts(t)
			da := encryptedUpA(t, a)
			db := upB(t, b, tt.flags...)
			for _, d := range []*netlab.Daemon{da, db} {
				netlab.Eventually(t, "print names the reason", func() bool { return strings.Contains(d.Status().IPsec, tt.want) })
				if w := d.AwaitWarning(warning.IPsecNotEstablished); !strings.Contains(w.Detail, tt.want) {
					t.Errorf("%+v", w)
				}
				if s := d.Status(); s.Running {
					t.Error("it is running")
				}
			}
			for _, d := range []*netlab.Daemon{da, db} {
				if out, _ := d.Run("print", "t0"); strings.Contains(out+d.Log(), "correct horse") || strings.Contains(out+d.Log(), "another\n") {
					t.Errorf("the secret is shown:\n%s%s", out, d.Log())
				}
			}
		})
	}
}

// Another IKE daemon on UDP port 500 is a start-up error, and no interface is left behind.
func TestIPsec_port500Taken(t *testing.T) {
	t.Parallel()
	a, _ := hosts(t)
	var other net.PacketConn
	var err error
	a.Do(func() { other, err = net.ListenPacket("udp4", "0.0.0.0:500") })
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	d := netlab.Launch(t, a, "t0", "--local-address", outerA, "--remote-address", outerB, "--ipsec-secret-file", secretFile(t, secret))
	if status := d.Wait(); status != 1 {
		t.Errorf("exit status %d", status)
	}
	if log := d.Log(); strings.Count(log, "\n") != 1 || !strings.Contains(log, "UDP port 500 of 192.0.2.1 is taken: stop strongSwan, ") {
		t.Errorf("it says: %s", log)
	}
	if out, err := a.Try("ip", "link", "show", "t0"); err == nil {
		t.Errorf("left behind: %s", out)
	}
}

func TestIPsec_secretFileMode(t *testing.T) {
	t.Parallel()
	a, _ := hosts(t)
	file := secretFile(t, secret)
	if err := os.Chmod(file, 0o640); err != nil {
		t.Fatal(err)
	}
	d := netlab.Launch(t, a, "t0", "--local-address", outerA, "--remote-address", outerB, "--ipsec-secret-file", file)
	if status := d.Wait(); status != 1 {
		t.Errorf("exit status %d", status)
	}
	if log := d.Log(); strings.Count(log, "\n") != 1 || !strings.Contains(log, "chmod 600 ") || strings.Contains(log, "correct") {
		t.Errorf("it says: %s", log)
	}
}

// When the local address changes, SAs are negotiated for the new one.
func TestIPsec_addressChanged(t *testing.T) {
	t.Parallel()
	a, b := hosts(t)
	encrypted := rejectCleartext(t, a, "veth0")
	file := secretFile(t, secret)
	da := netlab.Up(t, a, "t0", "--remote-address", outerB, "--address", innerA+"/24", "--ipsec-secret-file", file, "--ipsec-dpd", "2s,2")
	db := encryptedUpB(t, b)
	awaitRunning(t, da, db)
	_, stop := sendMarked(t, a, innerB)
	a.Run("ip", "addr", "add", "192.0.2.7/24", "dev", "veth0")
	a.Run("ip", "route", "change", "192.0.2.0/24", "dev", "veth0", "src", "192.0.2.7")
	netlab.Eventually(t, "the new address is used", func() bool { return da.Status().CurrentLocalAddress == "192.0.2.7" })
	db.Stop(syscall.SIGTERM)
	db = netlab.Up(t, b, "t0", "--local-address", outerB, "--remote-address", "192.0.2.7", "--address", innerB+"/24", "--ipsec-secret-file", file)
	awaitRunning(t, da, db)
	ping(t, a, innerB)
	stop()
	if encrypted.Load() == 0 {
		t.Error("nothing was encrypted")
	}
}

// When the link's MTU falls under traffic, the kernel rejects packets that fit the tunnel's
// route (EMSGSIZE). They must not go to the cleartext socket that fragments.
func TestIPsec_linkMTUReduced(t *testing.T) {
	t.Parallel()
	a, b := hosts(t)
	encrypted := rejectCleartext(t, a, "veth0")
	da, db := encryptedUpA(t, a, "--mtu", "1400"), encryptedUpB(t, b, "--mtu", "1400")
	awaitRunning(t, da, db)
	into := newInjector(t, a, "t0", nil, "")
	for round := range 5 {
		a.Run("ip", "link", "set", "dev", "veth0", "mtu", "1300")
		before := db.Status().RxPacket
		netlab.Eventually(t, "packets too big for the link are fragmented", func() bool {
			for i := range 20 {
				into.send(datagram(aToB(uint16(round*100+i)), 1372))
			}
			return db.Status().RxPacket > before
		})
		a.Run("ip", "link", "set", "dev", "veth0", "mtu", "1500")
		netlab.Eventually(t, "the route is followed", func() bool { return da.Status().PathMTU == 1500 })
	}
	if encrypted.Load() == 0 {
		t.Error("nothing was encrypted: was anything captured?")
	}
	if n := db.Drops("esp-plain-text"); n != 0 {
		t.Errorf("%d packets came in cleartext", n)
	}
}

// An ICMP error about an encrypted tunnel must quote a packet of its SA: an off-path attacker
// knows the addresses, but neither the SPI nor whether there is a NAT.
func TestIPsec_forgedICMP(t *testing.T) {
	t.Parallel()
	a, b := hosts(t)
	da, db := encryptedUpA(t, a, "--dont-fragment", "inherit"), encryptedUpB(t, b)
	from := newInjector(t, b, "veth0", a, "veth0")
	quote := func(protocol uint8, payload ...byte) []byte {
		return build(ipv4.Header{DF: true, Protocol: protocol, Source: addr(outerA), Destination: addr(outerB)}, append(payload, make([]byte, 1300)...))
	}
	udp4500 := []byte{0x11, 0x94, 0x11, 0x94, 5, 0, 0, 0}
	forged := [][]byte{
		quote(50, 0, 0, 0, 0), quote(50, 0xde, 0xad, 0xbe, 0xef), // SPIs
		quote(17, udp4500...), quote(17, udp4500...)[:28], quote(17, append(udp4500, 0xde, 0xad, 0xbe, 0xef)...),
		quote(4, datagram(aToB(1), 100)...),
	}
	refused := func(n int) {
		t.Helper()
		for _, q := range forged {
			from.send(icmpError(3, 4, 600, q), icmpError(3, 1, 0, q))
		}
		netlab.Eventually(t, "all are counted", func() bool { return da.Drops("outer-error-not-believed") == uint64(n*2*len(forged)) })
		if s := da.Status(); s.PathMTU != 1500 || s.Warning(warning.RemoteUnreachable).Code != "" {
			t.Errorf("path-mtu is %d, and it warns of %+v", s.PathMTU, s.Warnings)
		}
	}
	awaitRunning(t, da, db)
	refused(1)
	if route := a.Run("ip", "route", "get", outerB); strings.Contains(route, "mtu 600") {
		t.Errorf("the kernel believes what ipipd does not: %s", route)
	}
	ping(t, a, innerB)
	db.Stop(syscall.SIGTERM)
	netlab.Eventually(t, "there is no SA", func() bool { return !da.Status().Running })
	refused(2)
}
