package conformance

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"ipipd/internal/ipv4"
	"ipipd/test/netlab"
)

// What an administrator sets up about protocol 4 while a tunnel runs holds for its
// outer packets, both ways, and until it is taken away again.
func TestNetfilterRulesAddedWhileRunningHoldForOuterPackets(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip("needs nft (package nftables)")
	}
	for _, hook := range []string{"output", "postrouting", "prerouting", "input"} {
		t.Run(hook, func(t *testing.T) {
			eachVariant(t, func(t *testing.T, c variant) {
				a, b := hosts(t)
				d := c.upA(t, a)
				c.upB(t, b)
				ping(t, a, innerB)
				if out, err := a.Try("nft", "add table ip test; add chain ip test stop { type filter hook "+hook+" priority 0 ; } ; add rule ip test stop ip protocol 4 drop"); err != nil {
					t.Skipf("needs a kernel with nftables: %s", out)
				}
				// The tunnel hears of the rule; nothing says when it has.
				netlab.Eventually(t, "packets stop", func() bool { return !answered(a, innerB) })
				wire := outgoing(t, a, "veth0")
				inside := netlab.CaptureReceived(t, a, "t0")
				before := d.Status()
				inject(t, a, "t0", nil, "").send(datagram(aToB(1), 100))
				inject(t, b, "t0", nil, "").send(datagram(bToA(2), 100))
				if hook == "output" || hook == "postrouting" {
					inside.Await(netlab.ID(2))
					netlab.Eventually(t, "the packet was tried", func() bool {
						s := d.Status()
						return s.TxPacket+s.Drops["send-failed"] > before.TxPacket+before.Drops["send-failed"]
					})
				} else {
					wire.Await(about(1))
				}
				if answered(a, innerB) {
					t.Error("a ping gets through")
				}
				if hook == "output" || hook == "postrouting" {
					if got := wire.Matching(netlab.Protocol(ipv4.ProtocolIPIP)); len(got) != 0 {
						t.Errorf("and yet there left %s", netlab.Describe(got[0].Packet))
					}
				} else if got := inside.Frames(); len(got) != 0 {
					t.Errorf("and yet there came %s", netlab.Describe(got[0].Packet))
				}
				a.Run("nft", "delete table ip test")
				pingsAgain(t, a, "the rule was taken away")
			})
		})
	}
}

// nameServer answers every question on 127.0.0.1 of ns with one address.
func nameServer(t *testing.T, ns *netlab.NS, answer string) {
	t.Helper()
	conn := listenUDP(t, ns, "127.0.0.1:53")
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
					Body:   &dnsmessage.AResource{A: addr(answer)},
				}}
			}
			if reply, err := m.Pack(); err == nil {
				_, _ = conn.WriteTo(reply, from)
			}
		}
	}()
}

// ownResolvConf gives this goroutine, and the processes that it starts, a
// /etc/resolv.conf of its own. It stays on its thread, which ends with it.
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

func TestTheRemoteMayBeADNSName(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, b := hosts(t)
		nameServer(t, a, outerB)
		c.upB(t, b)
		ownResolvConf(t, "nameserver 127.0.0.1\n")
		d := c.up(t, a, "--remote-address", "far.example.net", "--address", innerA+"/24")
		if s := d.Status(); s.CurrentRemoteAddress != outerB {
			t.Errorf("current-remote-address is %q", s.CurrentRemoteAddress)
		}
		ping(t, a, innerB)
	})
}

func TestADNSNameThatDoesNotResolveIsRefused(t *testing.T) {
	t.Parallel()
	a, _ := hosts(t)
	ownResolvConf(t, "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n") // where nobody listens
	d := netlab.Launch(t, a, "t0", "--remote-address", "far.example.net")
	if status := d.Wait(); status != 1 {
		t.Errorf("exit status %d, want 1", status)
	}
	if log := d.Log(); strings.Count(log, "\n") != 1 || !strings.Contains(log, `"far.example.net"`) || !strings.Contains(log, "or give its IPv4 address") {
		t.Errorf("want one line about the name and what to do, got:\n%s", log)
	}
}
