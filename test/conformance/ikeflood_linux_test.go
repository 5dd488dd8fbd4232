package conformance

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"ipipd/internal/ipv4"
	"ipipd/test/netlab"
)

// Forged neighbours: they answer no ARP, so that packets to them wait in the send buffer of the sockets that all
// tunnels of a local address share.
const (
	firstForged = 100
	forged      = 40
)

// ikeOf captures the IKE messages between the hub and a remote, in both directions.
func ikeOf(t *testing.T, hub *netlab.NS, remote int) *netlab.Recorder {
	t.Helper()
	return netlab.Capture(t, hub, "br0", func(f netlab.Frame) bool {
		p := f.Packet
		return len(p) > 28 && p[9] == syscall.IPPROTO_UDP && (int(p[15]) == remote || int(p[19]) == remote)
	})
}

// floodIKE sends first messages of negotiations to the hub, until the test ends, from the forged neighbours and from half
// as many other addresses. Each is the first one captured, with an SPI of its own. It returns when some thousands are sent.
func floodIKE(t *testing.T, from, hub *netlab.NS, messages *netlab.Recorder) {
	t.Helper()
	begins := func(p ipv4.Packet) error { // the responder's SPI is 0
		if b := p.Payload(); len(b) < 24 || binary.BigEndian.Uint64(b[16:]) != 0 {
			return errors.New("no beginning")
		}
		return nil
	}
	first := slices.Clone(messages.Await(netlab.Destination(outerOf(1)), begins).Packet)
	first[26], first[27] = 0, 0 // no UDP checksum
	into := newInjector(t, from, "veth0", hub, "br0")
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	t.Cleanup(func() { cancel(); <-done })
	var sent atomic.Int64
	go func() {
		defer close(done)
		for i := 0; ctx.Err() == nil; i++ {
			p := slices.Clone(first)
			p[15] = byte(firstForged + i%(forged+forged/2))
			binary.BigEndian.PutUint32(p[28:], uint32(1+i))
			into.send(updateChecksum(p))
			sent.Add(1)
			if i%4 == 0 {
				time.Sleep(time.Millisecond)
			}
		}
	}()
	netlab.Eventually(t, "thousands are sent", func() bool { return sent.Load() > 5000 })
}

// Forged first messages from addresses of remotes begin a session for each at most, end no SA, and keep no remote from
// getting one. Those from other addresses begin none.
func TestIKEFlood_manyRemotes(t *testing.T) {
	t.Parallel()
	for name, flags := range map[string][]string{"main": nil, "ike2": ipsecModes["ike2"]} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			flags := append([]string{"--ipsec-dpd", "2s,20"}, flags...) // a busy machine ends no SA
			hub, spoke := mesh(t, 3)
			d := encryptedUpAny(t, hub, 1, flags...)
			for i, s := range spoke[:2] {
				routeTo(hub, fmt.Sprintf("10.%d.0.0/16", 11+i), 11+i)
				encryptedUpAny(t, s, 11+i, flags...)
				routeTo(s, "10.10.0.0/16", 1)
			}
			for i := range forged {
				routeTo(hub, fmt.Sprintf("10.%d.0.0/16", firstForged+i), firstForged+i)
			}
			ike := ikeOf(t, hub, 11)
			netlab.Eventually(t, "there is an SA", func() bool { return answeredFrom(spoke[0], "10.11.0.1", "10.10.0.1") })
			before := remoteIPsec(d, 11).SPI

			floodIKE(t, spoke[2], hub, ike)
			probes := len(ike.Matching(netlab.Source(outerOf(1))))
			// Try again: under a flood the kernel may drop packets before any process sees them.
			netlab.Eventually(t, "another remote gets an SA", func() bool { return answeredFrom(spoke[1], "10.12.0.1", "10.10.0.1") })
			netlab.Eventually(t, "the one with an SA is heard", func() bool { return answeredFrom(spoke[0], "10.11.0.1", "10.10.0.1") })
			netlab.Eventually(t, "the one with an SA is probed, or answered", func() bool {
				return len(ike.Matching(netlab.Source(outerOf(1)))) >= probes+3
			})
			s := d.Status()
			if n := len(s.IPsecRemotes); n <= 2 || n > forged+2 {
				t.Errorf("%d remotes have sessions, of %d that were forged", n, forged)
			}
			for _, r := range s.IPsecRemotes {
				if n := addr(r.Remote)[3]; n >= firstForged+forged {
					t.Errorf("%s is no gateway, and has a session", r.Remote)
				}
			}
			if after := remoteIPsec(d, 11).SPI; after != before {
				t.Errorf("the SA of another remote is %s, was %s", after, before)
			}
			if n := strings.Count(d.Log(), "level=WARN"); n > 20 {
				t.Errorf("%d warnings are logged", n)
			}
		})
	}
}

// The same holds for tunnels with one remote each and the same local address. Each has a limit of answers of its own.
func TestIKEFlood_oneRemoteEach(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"main", "ike2"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			hub, spoke := mesh(t, 3)
			text := fmt.Sprintf("defaults: {local-address: %s, keepalive: off, ipsec-exchange: %s, ipsec-dpd: '2s,20', ipsec-secret-file: %s}\ntunnels:\n",
				outerOf(1), mode, secretFile(t, secret))
			for i, remote := range []int{11, 12} {
				text += fmt.Sprintf("- {name: t%d, remote-address: %s, route: 10.%d.0.0/16}\n", i, outerOf(remote), remote)
			}
			for i := range forged {
				text += fmt.Sprintf("- {name: forged%d, remote-address: %s}\n", i, outerOf(firstForged+i))
			}
			file := filepath.Join(t.TempDir(), "tunnels.yaml")
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			ike := ikeOf(t, hub, 11)
			d := netlab.UpConfig(t, hub, "t0", file)
			up := func(i int) {
				netlab.Up(t, spoke[i], "t0", "--local-address", outerOf(11+i), "--remote-address", outerOf(1), "--keepalive", "off", "--route", "10.10.0.0/16",
					"--ipsec-exchange", mode, "--ipsec-dpd", "2s,20", "--ipsec-secret-file", secretFile(t, secret))
			}
			up(0)
			netlab.Eventually(t, "there is an SA", func() bool { return answeredFrom(spoke[0], "10.11.0.1", "10.10.0.1") })

			floodIKE(t, spoke[2], hub, ike)
			sent := len(ike.Matching(netlab.Source(outerOf(1))))
			up(1)
			netlab.Eventually(t, "another tunnel gets an SA", func() bool { return answeredFrom(spoke[1], "10.12.0.1", "10.10.0.1") })
			netlab.Eventually(t, "the peer with an SA is probed, or answered", func() bool {
				return len(ike.Matching(netlab.Source(outerOf(1)))) >= sent+3
			})
			netlab.Eventually(t, "the peer with an SA is heard", func() bool { return answeredFrom(spoke[0], "10.11.0.1", "10.10.0.1") })
			if s := d.Status(); s.IPsecSPI == "" { // both ends negotiate: it may be a second one
				t.Errorf("another tunnel has no SA: %s", s.IPsec)
			}
		})
	}
}
