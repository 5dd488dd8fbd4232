package conformance

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"ipipd/internal/drop"
	"ipipd/internal/ipv4"
	"ipipd/test/netlab"
)

// dropsLab has a tunnel t0, in a process with another one, and a capture of the packets that it drops.
type dropsLab struct {
	t               *testing.T
	a, b            *netlab.NS
	d               *netlab.Daemon
	metrics         string
	capture         *runningCapture
	inside, outside *injector // into t0, and from the peer's veth0
	pause           func()    // stops the process
	resume          func()
	sealing         *espPeer // the peer, nil unless it is encrypted
}

func newDropsLab(t *testing.T, properties string, encrypted bool) *dropsLab {
	t.Helper()
	a, b := hosts(t)
	sinkIPIP(t, b)
	l := &dropsLab{t: t, a: a, b: b, metrics: filepath.Join(t.TempDir(), "metrics.sock")}
	file := filepath.Join(t.TempDir(), "tunnels.yaml")
	text := fmt.Sprintf("metrics-address: unix:%s\nthreads: 1\ntunnels:\n- {name: t0, local-address: %s, remote-address: %s, address: %s/24, keepalive: off, allow-fast-path: no, %s}\n- {name: t1, remote-address: 192.0.2.3, keepalive: off}\n",
		l.metrics, outerA, outerB, innerA, properties)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	var process int
	if encrypted { // kept, for espPeer.exhaust
		l.sealing = newESPPeer(t, b)
		l.d = netlab.KeepConfig(t, a, "t0", file)
		process = l.d.Child()
	} else {
		l.d = netlab.UpConfig(t, a, "t0", file)
		process = l.d.PID()
	}
	l.inside, l.outside = newInjector(t, a, "t0", nil, ""), newInjector(t, b, "veth0", a, "veth0")
	l.pause, l.resume = func() { _ = syscall.Kill(process, syscall.SIGSTOP) }, func() { _ = syscall.Kill(process, syscall.SIGCONT) }
	l.capture = startCapture(t, l.d, "--drops")
	return l
}

// seen returns which of print, the metrics and the capture do not show a reason.
func (l *dropsLab) seen(reason string) (missing []string) {
	l.t.Helper()
	return dropSeen(l.t, l.d, l.metrics, l.capture, reason)
}

// dropSeen is dropsLab.seen for any process.
func dropSeen(t *testing.T, d *netlab.Daemon, metrics string, capture *runningCapture, reason string) (missing []string) {
	t.Helper()
	if d.Drops(reason) == 0 {
		return []string{"print"}
	}
	r := reasonOf(reason)
	counted := func() bool {
		for series, n := range scrape(t, metrics) {
			if n > 0 && strings.Contains(series, fmt.Sprintf("reason=%q", reason)) {
				return true
			}
		}
		return false
	}
	if !counted() {
		missing = append(missing, "the metrics")
	}
	if !slices.ContainsFunc(capture.read().Packets, func(p netlab.CapturedPacket) bool {
		return strings.HasSuffix(p.Comment, r.Error()+"; remedy: "+r.Remedy())
	}) {
		missing = append(missing, "the capture")
	}
	return missing
}

func reasonOf(name string) drop.Reason {
	for r := range drop.All() {
		if r.String() == name {
			return r
		}
	}
	panic(name)
}

// provocation makes a tunnel drop packets for a reason: again is called until that is seen, and after undoes
// what before has changed.
type provocation struct {
	reason               string
	before, again, after func(*dropsLab)
}

func fromPeer(inner []byte) func(*dropsLab) {
	return func(l *dropsLab) { l.outside.send(outerBToA(inner)) }
}

func fromHost(inner []byte) func(*dropsLab) { return func(l *dropsLab) { l.inside.send(inner) } }

func errorAbout(message []byte) func(*dropsLab) { return func(l *dropsLab) { l.outside.send(message) } }

// flood sends n packets while the process is stopped.
func flood(n int, packet []byte, from func(*dropsLab) *injector) func(*dropsLab) {
	return func(l *dropsLab) {
		l.pause()
		defer l.resume()
		for range n {
			from(l).send(packet)
		}
	}
}

func host(l *dropsLab) *injector { return l.inside }
func peer(l *dropsLab) *injector { return l.outside }

// run returns a step of a provocation that runs a command in a's network namespace.
func run(command ...string) func(*dropsLab) {
	return func(l *dropsLab) { l.a.Run(command[0], command[1:]...) }
}

// runIfThere is run, but skips the rest of the test if the command fails.
func runIfThere(command string) func(*dropsLab) {
	return func(l *dropsLab) { runOrSkip(l.t, l.a, command) }
}

// A packet is dropped for each reason, which print, the metrics and the comment of the packet in a capture show.
func TestDrops(t *testing.T) {
	t.Parallel()
	good, reply := datagram(aToB(1), 100), datagram(bToA(1), 100)
	df := aToB(2)
	df.DF = true
	big := datagram(df, 1600)
	multicast := df
	multicast.Destination = addr("224.0.0.5")
	wrongSum := bytes.Clone(reply)
	wrongSum[10]++
	outward := func(inner []byte) []byte {
		return build(ipv4.Header{ID: 9, TTL: 64, Protocol: ipv4.ProtocolIPIP, Source: addr(outerA), Destination: addr(outerB)}, inner)
	}
	quote := outward(datagram(df, 1400))
	probe := func(ttl uint8) []byte {
		return build(ipv4.Header{ID: 3, TTL: ttl, Protocol: ipv4.ProtocolIPIP, Source: addr(outerA), Destination: addr(outerB)}, nil)
	}
	monotonic := []byte{1, 2} // padding, RFC 4303, section 2.4
	const noNextHeader = 59   // a dummy packet, RFC 4303, section 2.6
	stranger := build(ipv4.Header{ID: 9, TTL: 64, Protocol: ipv4.ProtocolIPIP, Source: addr("192.0.2.77"), Destination: addr(outerA)}, reply)
	esp := func(payload []byte) []byte {
		return build(ipv4.Header{TTL: 64, Protocol: ipv4.ProtocolESP, Source: addr(outerB), Destination: addr(outerA)}, payload)
	}
	// sealed makes the peer seal a packet with this padding and next header, and send it n times.
	sealed := func(n int, padding []byte, next uint8) func(*dropsLab) {
		return func(l *dropsLab) {
			l.outside.send(slices.Repeat([][]byte{l.sealing.seal(reply, padding, next)}, n)...)
		}
	}
	provoked := map[string]bool{}
	for _, group := range []struct {
		name, properties string
		encrypted        bool
		rows             []provocation
	}{
		{"cleartext", "mtu: 65515, dont-fragment: inherit", false, []provocation{
			{reason: "inner-not-ipv4", again: fromHost(append([]byte{0x60, 0, 0, 0, 0, 0, 59, 64}, make([]byte, 32)...))},
			{reason: "inner-malformed", again: fromHost(withByte(good, 0, 0x44))},
			{reason: "inner-ttl-zero", again: fromHost(withByte(good, 8, 0))},
			{reason: "inner-too-long", before: run("ip", "link", "set", "dev", "t0", "mtu", "65535"), again: fromHost(datagram(aToB(2), 65516-28))},
			{reason: "loop", again: fromHost(outward(good))},
			{reason: "too-big", again: fromHost(big)},
			{reason: "icmp-forbidden", again: fromHost(datagram(multicast, 1600))},
			{reason: "icmp-limited", before: run("ip", "link", "set", "dev", "t0", "txqueuelen", "4000"), again: flood(3000, big, host)},
			{reason: "received-not-ipv4", again: fromPeer(append([]byte{0x60, 0, 0, 0, 0, 0, 59, 64}, make([]byte, 32)...))},
			{reason: "received-truncated", again: fromPeer(reply[:len(reply)-1])},
			{reason: "received-malformed", again: fromPeer(withByte(reply, 0, 0x44))},
			{reason: "received-checksum", again: fromPeer(wrongSum)},
			{reason: "received-ttl-zero", again: fromPeer(withByte(reply, 8, 0))},
			{reason: "received-loop", again: fromPeer(build(ipv4.Header{ID: 2, Protocol: ipv4.ProtocolUDP, Source: addr(outerA), Destination: addr(outerB)}, pattern(20)))},
			{reason: "ecn-ce-on-not-ect", again: func(l *dropsLab) { l.outside.send(withByte(outerBToA(reply), 1, 3)) }},
			{reason: "reflect-ttl-expired", again: fromPeer(probe(1))},
			{reason: "reflect-limited", again: flood(3000, outerBToA(probe(255)), peer)},
			{reason: "unknown-peer", again: func(l *dropsLab) { l.outside.send(stranger) }},
			{reason: "receive-overflow", again: flood(20000, outerBToA(datagram(bToA(1), 1400)), peer)},
			{reason: "outer-error-malformed", again: errorAbout(withByte(icmpError(3, 1, 0, quote), 23, 0))},
			{reason: "outer-error-ignored", again: errorAbout(icmpError(3, 3, 0, quote))},
			{reason: "outer-error-not-believed", again: errorAbout(icmpError(3, 1, 0, withByte(quote, 9, 50)))},
			{reason: "no-path", before: run("ip", "route", "del", "192.0.2.0/24", "dev", "veth0"), again: fromHost(good),
				after: run("ip", "route", "add", "192.0.2.0/24", "dev", "veth0", "src", outerA)},
			{reason: "received-not-running", before: run("ip", "link", "set", "dev", "t0", "down"), again: fromPeer(reply),
				after: run("ip", "link", "set", "dev", "t0", "up")},
			// Last, since they are skipped where there is no such program.
			{reason: "queue-full", before: runIfThere("tc qdisc add dev veth0 root tbf rate 8kbit burst 1600 limit 3000"),
				again: flood(30, datagram(aToB(4), 1200), host), after: run("tc", "qdisc", "del", "dev", "veth0", "root")},
			{reason: "send-failed", before: runIfThere("nft 'add table ip x; add chain ip x y { type filter hook output priority 0; }; add rule ip x y ip protocol 4 drop'"),
				again: fromHost(good)},
		}},
		{"small MTU", "mtu: 1480", false, []provocation{
			{reason: "superpacket-size-unknown", again: func(l *dropsLab) {
				l.outside.send(fragment(outerBToA(partialChecksum(bToA(1), 4000)), 1480)...)
			}},
		}},
		{"encrypted", "ipsec-secret: " + secret + ", mtu: 65515, dont-fragment: no", true, []provocation{
			{reason: "esp-plain-text", again: fromPeer(reply)},
			{reason: "esp-no-sa", again: func(l *dropsLab) { l.outside.send(esp(bytes.Repeat([]byte{0xa5}, 64))) }},
			{reason: "esp-malformed", again: func(l *dropsLab) { l.outside.send(esp([]byte{1, 2, 3})) }},
			{reason: "esp-authentication", again: func(l *dropsLab) {
				p := l.sealing.seal(reply, monotonic, ipv4.ProtocolIPIP)
				p[26]++ // a byte of the sequence number
				l.outside.send(updateChecksum(p))
			}},
			{reason: "esp-padding", again: sealed(1, []byte{1, 3}, ipv4.ProtocolIPIP)},
			{reason: "esp-selector", again: sealed(1, monotonic, ipv4.ProtocolUDP)},
			{reason: "esp-dummy", again: sealed(1, monotonic, noNextHeader)},
			{reason: "esp-replay", again: sealed(2, monotonic, ipv4.ProtocolIPIP)},
			{reason: "esp-no-room", again: fromHost(datagram(aToB(2), 65510-28))},
			{reason: "esp-exhausted", again: func(l *dropsLab) {
				l.sealing.exhaust(l.d.PID())
				l.inside.send(good, good)
			}},
		}},
	} {
		for _, row := range group.rows {
			provoked[row.reason] = true
		}
		t.Run(group.name, func(t *testing.T) {
			t.Parallel()
			l := newDropsLab(t, group.properties, group.encrypted)
			if group.encrypted {
				awaitRunning(t, l.d)
			}
			for _, row := range group.rows {
				if row.before != nil {
					row.before(l)
				}
				var missing []string
				if !netlab.WaitFor(func() bool {
					row.again(l)
					missing = l.seen(row.reason)
					return len(missing) == 0
				}) {
					t.Errorf("%s is not in %s, which say %v", row.reason, strings.Join(missing, " and "), l.d.Status().AllDrops())
				}
				if row.after != nil {
					row.after(l)
				}
			}
			l.capture.end()
		})
	}
	if want := netlab.DropsProvoked(netlab.FromOutside); !maps.Equal(provoked, want) {
		t.Errorf("provoked are %v, want %v", provoked, want)
	}
}
