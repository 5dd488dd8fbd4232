package conformance

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"ipipd/internal/warning"
	"ipipd/test/netlab"
)

// nameServer answers every A query on 127.0.0.1:53 of ns with one address; say changes it.
func nameServer(t *testing.T, ns *netlab.NS, answer string) (say func(string)) {
	t.Helper()
	var current atomic.Value
	current.Store(answer)
	conn := listenUDP(t, ns, "127.0.0.1:53")
	_ = conn.SetDeadline(time.Time{}) // it is asked as long as the test runs
	go func() {
		buf := make([]byte, 1500)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			var m dnsmessage.Message
			if m.Unpack(buf[:n]) != nil || len(m.Questions) != 1 {
				continue
			}
			m.Response, m.Additionals = true, nil
			if q := m.Questions[0]; q.Type == dnsmessage.TypeA {
				m.Answers = []dnsmessage.Resource{{
					Header: dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 1},
					Body:   &dnsmessage.AResource{A: addr(current.Load().(string))},
				}}
			}
			if reply, err := m.Pack(); err == nil {
				_, _ = conn.WriteTo(reply, from)
			}
		}
	}()
	return func(answer string) { current.Store(answer) }
}

// ownResolvConf gives this goroutine, and the processes that it starts, an /etc/resolv.conf
// of their own. The goroutine stays locked to its thread, which ends with it.
func ownResolvConf(t *testing.T, content string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		t.Skipf("needs a mount namespace: %v", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Skipf("needs a mount namespace of its own: %v", err)
	}
	if err := unix.Mount(path, "/etc/resolv.conf", "", unix.MS_BIND, ""); err != nil {
		t.Skipf("needs an /etc/resolv.conf to mount over: %v", err)
	}
}

func TestDNS_remoteAddress(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, b := hosts(t)
		nameServer(t, a, outerB)
		c.upB(t, b)
		ownResolvConf(t, "nameserver 127.0.0.1\n")
		d := c.up(t, a, "--remote-address", "far.example.net", "--address", innerA+"/24")
		netlab.Eventually(t, "the name is resolved", func() bool { return d.Status().CurrentRemoteAddress == outerB })
		ping(t, a, innerB)
	})
}

// A name gets another address: no packet of a stream is lost, neither while the peer does not answer at
// the new address nor when it does.
func TestDNS_anotherAddress(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		const another = "192.0.2.3"
		a, b := hosts(t)
		b.Run("ip", "addr", "add", another+"/24", "dev", "veth0")
		b.Sysctl("net.ipv4.conf.all.rp_filter", "0")
		say := nameServer(t, a, outerB)
		c.upB(t, b)
		ownResolvConf(t, "nameserver 127.0.0.1\n")
		d := c.up(t, a, "--remote-address", "far.example.net", "--address", innerA+"/24", "--keepalive", "1s,300")
		netlab.Eventually(t, "b is heard", func() bool { return d.Status().KeepaliveState == "up" })
		stop := netlab.Stream(t, a, innerA, b, innerB)
		wire := netlab.Capture(t, a, "veth0", func(f netlab.Frame) bool {
			return netlab.Match(f.Packet, netlab.Destination(another), netlab.Protocol(4)) == nil
		})

		say(another)
		netlab.Eventually(t, "the other address is a candidate", func() bool { return d.Status().CandidateRemote == another })
		first := d.AwaitWarning(warning.OtherAddress)
		wire.AwaitN(3, netlab.Source(outerA))
		if now := d.AwaitWarning(warning.OtherAddress); now != first {
			t.Errorf("it warned of %+v, and then of %+v", first, now)
		}
		if s := d.Status(); s.CurrentRemoteAddress != outerB || !s.Running {
			t.Errorf("without an answer from there, current-remote-address is %s, running %v", s.CurrentRemoteAddress, s.Running)
		}

		netlab.Up(t, b, "t1", "--local-address", another, "--remote-address", outerA, "--keepalive", "off")
		netlab.Eventually(t, "the other address is used", func() bool { return d.Status().CurrentRemoteAddress == another })
		wire.AwaitN(100, netlab.Inner(netlab.Destination(innerB)))
		stop()
		if s := d.Status(); s.CandidateRemote != "" || s.KeepaliveState != "up" {
			t.Errorf("candidate-remote-address is %q, and the keepalive %s", s.CandidateRemote, s.KeepaliveState)
		}
		d.AwaitNoWarning(warning.OtherAddress)
	})
}

// With a secret there is an SA with one address. A new address gets no packet, and no negotiation, until the
// peer is not heard from the old one any more.
func TestDNS_anotherAddressEncrypted(t *testing.T) {
	t.Parallel()
	const another = "192.0.2.3"
	a, b := hosts(t)
	b.Run("ip", "addr", "add", another+"/24", "dev", "veth0")
	say := nameServer(t, a, outerB)
	peer := func(local string) *netlab.Daemon {
		return netlab.Up(t, b, "t0", "--local-address", local, "--remote-address", outerA, "--address", innerB+"/24", "--ipsec-secret-file", secretFile(t, secret))
	}
	db := peer(outerB)
	ownResolvConf(t, "nameserver 127.0.0.1\n")
	wire := netlab.Capture(t, a, "veth0", func(f netlab.Frame) bool { return netlab.Match(f.Packet, netlab.Destination(another)) == nil })
	d := netlab.Up(t, a, "t0", "--remote-address", "far.example.net", "--address", innerA+"/24", "--ipsec-secret-file", secretFile(t, secret), "--keepalive", "1s,10")
	netlab.Eventually(t, "b is heard", func() bool { s := d.Status(); return s.KeepaliveState == "up" && s.Running })

	say(another)
	netlab.Eventually(t, "the other address is a candidate", func() bool { return d.Status().CandidateRemote == another })
	ping(t, a, innerB)
	if s := d.Status(); s.CurrentRemoteAddress != outerB || !s.Running {
		t.Errorf("current-remote-address is %s, running %v", s.CurrentRemoteAddress, s.Running)
	}
	if sent := wire.Frames(); len(sent) > 0 {
		t.Errorf("the other address has got %s", netlab.Describe(sent[0].Packet))
	}

	db.Stop(syscall.SIGKILL)
	peer(another)
	netlab.Eventually(t, "there is an SA with the other address", func() bool {
		s := d.Status()
		return s.CurrentRemoteAddress == another && s.CandidateRemote == "" && s.KeepaliveState == "up" && s.Running
	})
	ping(t, a, innerB)
}

// A tunnel starts before its remote name is resolved, and waits for that, while another tunnel of the process runs.
func TestDNS_unresolved(t *testing.T) {
	t.Parallel()
	a, b := hosts(t)
	ownResolvConf(t, "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n") // where nobody listens
	file := filepath.Join(t.TempDir(), "ipipd.yaml")
	text := fmt.Sprintf("tunnels:\n- {name: t1, remote-address: far.example.net, route: 10.9.0.0/16}\n- {name: t0, local-address: %s, remote-address: %s, address: %s/24}\n", outerA, outerB, innerA)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	d := netlab.UpConfig(t, a, "t1", file)
	upB(t, b)
	ping(t, a, innerB)
	if w := d.AwaitWarning(warning.NameNotResolved); !strings.HasPrefix(w.Detail, "DNS name far.example.net: ") {
		t.Errorf("%+v", w)
	}
	if out, err := d.Run("print", "t1"); err != nil || !strings.Contains(out, "waiting-for: DNS name far.example.net: ") || !strings.Contains(out, "running: no\n") {
		t.Errorf("print: %v\n%s", err, out)
	}
	nameServer(t, a, "192.0.2.9")
	netlab.Eventually(t, "the tunnel runs", func() bool {
		s := d.Status()
		return s.Running && s.CurrentRemoteAddress == "192.0.2.9" && s.CurrentLocalAddress == outerA
	})
	netlab.Eventually(t, "its route is there", func() bool { return strings.Contains(a.Run("ip", "route", "show", "10.9.0.0/16"), "dev t1") })
	d.AwaitNoWarning(warning.NameNotResolved)
}
