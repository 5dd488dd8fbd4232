package conformance

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"ipipd/test/netlab"
)

// A reload that changes one tunnel, in place and by making it again, removes and adds it, loses no
// packet of the other.
func TestReload_otherTunnel(t *testing.T) {
	for _, fastPath := range []string{"no", "yes"} {
		t.Run("fast-path-"+fastPath, func(t *testing.T) {
			t.Parallel()
			a, b := hosts(t)
			file := filepath.Join(t.TempDir(), "ipipd.yaml")
			write := func(other string) {
				t.Helper()
				t0 := fmt.Sprintf("- {name: t0, local-address: %s, remote-address: %s, address: %s/24, allow-fast-path: %s}\n", outerA, outerB, innerA, fastPath)
				if err := os.WriteFile(file, []byte("tunnels:\n"+t0+other), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			other := func(more string) string {
				return "- {name: t1, remote-address: 192.0.2.9, address: 10.9.0.1/24" + more + "}\n"
			}
			write(other(""))
			da := netlab.UpConfig(t, a, "t0", file)
			upB(t, b)
			ping(t, a, innerB)

			lost := countedStream(t, a, b)
			for round := range 3 {
				for _, step := range []struct{ other, want string }{
					{other(", dscp: 46, ttl: 9"), "t0: nothing\nt1: in place: dscp, ttl\n"},
					{other(", tun-queues: 2"), "t0: nothing\nt1: again: tun-queues, dscp, ttl (tun-queues always: the queues are made with the interface)\n"},
					{"", "t0: nothing\nt1: remove\n"},
					{other(""), "t0: nothing\nt1: add\n"},
				} {
					write(step.other)
					if out, err := da.Run("diff"); err != nil || out != step.want {
						t.Errorf("diff: %v, got\n%swant\n%s", err, out, step.want)
					}
					if out, err := da.Run("reload"); err != nil || out != "" {
						t.Errorf("round %d, reload to %q: %v\n%s", round, step.other, err, out)
					}
				}
			}
			lost()
		})
	}
}

// countedStream sends numbered datagrams through the tunnel t0, 1,000 a second. The function that it
// returns ends it, and fails the test if one is lost.
func countedStream(t *testing.T, a, b *netlab.NS) (lost func()) {
	t.Helper()
	var server net.PacketConn
	var client net.Conn
	var err, clientErr error
	b.Do(func() { server, err = net.ListenPacket("udp4", innerB+":7") })
	a.Do(func() { client, clientErr = net.Dial("udp4", innerB+":7") })
	if err != nil || clientErr != nil {
		t.Fatal(err, clientErr)
	}
	t.Cleanup(func() {
		server.Close()
		client.Close()
	})
	var received sync.Map
	go func() {
		buf := make([]byte, 64)
		for {
			n, _, err := server.ReadFrom(buf)
			if err != nil {
				return
			}
			received.Store(string(buf[:n]), true)
		}
	}()
	stop, sent := make(chan struct{}), make(chan int, 1)
	go func() {
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for n := 0; ; n++ {
			select {
			case <-stop:
				sent <- n
				return
			case <-tick.C:
			}
			if _, err := fmt.Fprint(client, n); err != nil {
				t.Errorf("datagram %d: %v", n, err)
			}
		}
	}()
	return func() {
		t.Helper()
		close(stop)
		total := <-sent
		if total == 0 {
			t.Fatal("nothing was sent meanwhile")
		}
		missing := func() (lost []string) {
			for n := range total {
				if _, ok := received.Load(fmt.Sprint(n)); !ok {
					lost = append(lost, fmt.Sprint(n))
				}
			}
			return lost
		}
		if !netlab.WaitFor(func() bool { return len(missing()) == 0 }) {
			t.Errorf("of %d datagrams these are lost: %s", total, strings.Join(missing(), " "))
		}
	}
}
