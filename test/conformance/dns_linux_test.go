package conformance

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"ipipd/test/netlab"
)

// nameServer answers every A query on 127.0.0.1:53 of ns with one address.
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
		if s := d.Status(); s.CurrentRemoteAddress != outerB {
			t.Errorf("current-remote-address is %q", s.CurrentRemoteAddress)
		}
		ping(t, a, innerB)
	})
}

func TestDNS_unresolved(t *testing.T) {
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
