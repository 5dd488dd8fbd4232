package tunnel

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ipipd/internal/resolve"
	"ipipd/test/memory"
	"ipipd/test/netlab"
)

// engineProcess is an Engine on the kernel of a network namespace, which all its threads must be in.
type engineProcess struct {
	t   *testing.T
	in  *json.Encoder
	out *json.Decoder
	log netlab.Buffer
}

func startEngine(t *testing.T, ns *netlab.NS) *engineProcess {
	t.Helper()
	p := &engineProcess{t: t}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), engineProcessEnv+"=1")
	cmd.Stderr = &p.log
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.in, p.out = json.NewEncoder(in), json.NewDecoder(out)
	ns.Start(cmd)
	t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("%v:\n%s", err, p.log.String())
		}
		if t.Failed() {
			t.Log(p.log.String())
		}
	})
	return p
}

// apply applies configurations, and returns the state of each tunnel's fast path.
func (p *engineProcess) apply(lines ...string) (fastPath map[string]string) {
	p.t.Helper()
	fastPath = map[string]string{}
	for name, s := range p.status(lines...) {
		fastPath[name] = s.FastPath
	}
	return fastPath
}

// tunnelStatus is what the tests look at of a Status.
type tunnelStatus struct {
	FastPath   string `json:"fast-path"`
	WaitingFor string `json:"waiting-for"`
}

// status applies configurations, and returns the Status of each tunnel.
func (p *engineProcess) status(lines ...string) (all map[string]tunnelStatus) {
	p.t.Helper()
	var a applied
	if err := p.in.Encode(lines); err != nil {
		p.t.Fatal(err)
	}
	if err := p.out.Decode(&a); err != nil {
		p.t.Fatalf("%v\n%s", err, p.log.String())
	}
	if a.Error != "" {
		p.t.Fatal(a.Error)
	}
	all = map[string]tunnelStatus{}
	for name, text := range a.Status {
		var s tunnelStatus
		if err := json.Unmarshal(text, &s); err != nil {
			p.t.Fatal(err)
		}
		all[name] = s
	}
	return all
}

// awaitFastPath waits until the tunnels of these lines use the fast path.
func (p *engineProcess) awaitFastPath(lines ...string) {
	p.t.Helper()
	netlab.Eventually(p.t, "the fast path is active", func() bool {
		for _, state := range p.apply(lines...) {
			if state != "active" {
				return false
			}
		}
		return true
	})
}

// applyPeers returns a host, 10.7.0.N, and two peers of it on another one: 10.255.N.2 by 192.0.2.1N.
func applyPeers(t *testing.T) (ns, peers *netlab.NS) {
	ns, peers = netlab.New(t), netlab.New(t)
	netlab.Veth(t, ns, peers, netlab.End{Name: "veth0", Address: "192.0.2.1/24"}, netlab.End{Name: "veth0", Address: "192.0.2.2/24"})
	ns.Sysctl("net.ipv4.conf.all.promote_secondaries", "0")
	ns.Sysctl("net.ipv4.conf.default.promote_secondaries", "0")
	ns.Run("ip", "link", "set", "lo", "up")
	for n := 1; n <= 2; n++ {
		local := fmt.Sprintf("192.0.2.1%d", n)
		peers.Run("ip", "address", "add", local+"/24", "dev", "veth0")
		ns.Run("ip", "address", "add", fmt.Sprintf("10.7.0.%d/32", n), "dev", "lo")
		netlab.Up(t, peers, fmt.Sprintf("p%d", n), "--local-address", local, "--remote-address", "192.0.2.1", "--keepalive", "off",
			"--address", fmt.Sprintf("10.255.%d.2/32", n), "--route", fmt.Sprintf("10.7.0.%d/32", n))
	}
	return ns, peers
}

// applyLine returns the configuration of a tunnel to peer n of applyPeers, with a route to it.
func applyLine(n int, more string) string {
	return fmt.Sprintf("name=t%d remote-address=192.0.2.1%d route=10.255.%d.2/32 ", n, n, n) + more
}

// A change in place loses no packet, of that tunnel or another, in userspace and on the fast path.
func TestEngineApply_noLoss(t *testing.T) {
	for _, allow := range []string{"no", "yes"} {
		t.Run("fast-path-"+allow, func(t *testing.T) {
			ns, peers := applyPeers(t)
			p := startEngine(t, ns)
			line := func(n int, more string) string { return applyLine(n, "allow-fast-path="+allow+" "+more) }
			address := func(n, host int) string { return fmt.Sprintf("address=10.255.%d.%d/24 ", n, host) }
			start := []string{line(1, address(1, 1)), line(2, address(2, 1))}
			p.apply(start...)
			if allow == "yes" {
				p.awaitFastPath(start...)
			}
			var ends [2]func()
			for i := range ends {
				ends[i] = netlab.Stream(t, ns, fmt.Sprintf("10.7.0.%d", i+1), peers, fmt.Sprintf("10.255.%d.2", i+1))
			}
			a := address(2, 1)
			changes := []string{a + "dscp=46", a + "ttl=inherit", a + "mtu=1400", a + "keepalive=10s,10", a + "comment=x", a + "clamp-tcp-mss=no",
				a + "route=10.9.0.0/16", a + "address=10.8.0.1/24", a + "rps=1", a + "allow-fast-path=no", a + "local-address=192.0.2.1",
				a + "underlay-device=veth0", a + address(2, 3), address(2, 3)}
			for began, rounds := time.Now(), 0; time.Since(began) < 2*time.Second || rounds < len(changes); rounds++ {
				p.apply(line(1, address(1, 1)), line(2, changes[rounds%len(changes)]))
			}
			for _, end := range ends {
				end()
			}
		})
	}
}

// When a tunnel gets another underlay-device, the UDP ports of IKE are bound to that.
func TestEngineApply_ipsecDevice(t *testing.T) {
	ns, _ := applyPeers(t)
	p := startEngine(t, ns)
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("mellon-mellon-mellon"), 0o600); err != nil {
		t.Fatal(err)
	}
	line := applyLine(1, "local-address=192.0.2.1 allow-fast-path=no ipsec-secret-file="+secret)
	for _, device := range []string{"", " underlay-device=veth0", "", " underlay-device=veth0"} {
		if s := p.status(line + device)["t1"]; s.WaitingFor != "" {
			t.Errorf("with%q it waits for %q", device, s.WaitingFor)
		}
	}
}

// A tunnel that takes over the outer addresses of another one has the fast path at once.
func TestEngineApply_fastPathTakenOver(t *testing.T) {
	ns, _ := applyPeers(t)
	p := startEngine(t, ns)
	one, two := applyLine(1, "address=10.255.1.1/24"), applyLine(2, "address=10.255.2.1/24")
	p.awaitFastPath(one, two)
	for i := range 3 {
		p.awaitFastPath(strings.Replace(two, "name=t2", fmt.Sprintf("name=n%d", i), 1), one)
	}
	two = strings.Replace(two, "name=t2", "name=n2", 1)
	for range 3 {
		p.awaitFastPath(strings.Replace(one, "192.0.2.11", "192.0.2.12", 1), strings.Replace(two, "192.0.2.12", "192.0.2.11", 1))
		p.awaitFastPath(one, two)
	}
	if strings.Contains(p.log.String(), "another tunnel of this process has the same local and remote address") {
		t.Error("a tunnel has found the entry of another one")
	}
}

// The interface of a tunnel that is not allowed the fast path has no eBPF program, and gets one by a change in place.
func TestEngineApply_allowFastPath(t *testing.T) {
	ns, _ := applyPeers(t)
	p := startEngine(t, ns)
	line := func(allow string) string { return applyLine(1, "address=10.255.1.1/24 allow-fast-path="+allow) }
	shown := func() (clsact, program bool) {
		return strings.Contains(ns.Run("tc", "qdisc", "show", "dev", "t1"), "clsact"), strings.Contains(ns.Run("tc", "filter", "show", "dev", "t1", "egress"), "ipip_encap")
	}
	check := func(when string, want bool) {
		t.Helper()
		if clsact, program := shown(); clsact != want || program != want {
			t.Errorf("%s: clsact %v, program %v, want %v", when, clsact, program, want)
		}
		ns.Run("ping", "-c", "1", "-w", netlab.Seconds(netlab.Timeout()), "-I", "10.7.0.1", "10.255.1.2")
	}
	p.apply(line("no"))
	check("not allowed", false)
	if state := p.apply(line("yes"))["t1"]; state != "active" {
		t.Skipf("no fast path here: %s", state)
	}
	check("allowed", true)
	p.apply(line("no"))
	check("no longer allowed", true)
	ns.Run("tc", "qdisc", "del", "dev", "t1", "clsact")
	check("an operator has removed it", false)
	p.awaitFastPath(line("yes"))
	check("allowed again", true)
}

// A tunnel that is to be made again runs as before after an error, even if its name cannot be resolved any
// more, and its secret file has changed.
func TestEngineApply_restart(t *testing.T) {
	socket, _ := memory.NewSocketPair()
	e, m := newModel(t, socket)
	resolved := netip.MustParseAddr("198.51.100.1")
	e.lookupName = func(context.Context, string) (resolve.Answer, error) {
		if !resolved.IsValid() {
			return resolve.Answer{}, errors.New("no server")
		}
		return resolve.Answer{Addresses: []netip.Addr{resolved}}, nil
	}
	file := filepath.Join(t.TempDir(), "secret")
	write := func(secret string) {
		if err := os.WriteFile(file, []byte(secret), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("mellon-mellon-mellon")
	named := strings.Replace(lineA, "198.51.100.1", "peer.example", 1) + " ipsec-secret-file=" + file
	netlab.New(t).Do(func() { // the sockets of IKE are opened there
		apply(t, e, named, lineB)
		eventually(t, "the name is resolved", func() bool {
			return e.Tunnel("a").Status().CurrentRemoteAddress == "198.51.100.1" && m.hasRoute("10.20.0.0/16")
		})
		before := state(e, m)
		m.failRoute.Prefix = netip.MustParsePrefix("10.40.0.0/16")
		m.opening("a", func() {
			resolved = netip.Addr{}
			write("another-secret-now")
		})
		err := e.Apply(t.Context(), configs(t, named+" tun-queues=1 route=10.40.0.0/16", lineB))
		if err == nil {
			t.Fatal("no error")
		}
		if got := state(e, m); got != before {
			t.Errorf("after %v:\n%s\nbefore:\n%s", err, got, before)
		}
		if a := e.Tunnel("a"); a == nil || string(a.ipsecPolicy.config.Secret) != "mellon-mellon-mellon" {
			t.Error("it does not run with the secret that it had")
		}
	})
}

// After an error a tunnel that is to be made again has its outer addresses back from the one that was to
// get them.
func TestEngineApply_restartAddresses(t *testing.T) {
	const secret = " ipsec-secret=mellon-mellon-mellon"
	socket, _ := memory.NewSocketPair()
	e, m := newModel(t, socket)
	ns := netlab.New(t)
	ns.Run("ip", "link", "set", "lo", "up")
	ns.Run("ip", "address", "add", "192.0.2.7/32", "dev", "lo")
	ns.Do(func() {
		other, err := net.ListenPacket("udp4", "192.0.2.7:500") // another IKE daemon
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()
		apply(t, e, lineA+secret)
		before := state(e, m)
		err = e.Apply(t.Context(), configs(t, strings.Replace(lineA, "198.51.100.1", "198.51.100.9", 1)+secret+" tun-queues=1",
			"name=c remote-address=198.51.100.1"+secret, "name=d remote-address=198.51.100.3 local-address=192.0.2.7"+secret))
		if err == nil || !strings.Contains(err.Error(), "d: ") {
			t.Fatal(err)
		}
		if got := state(e, m); got != before {
			t.Errorf("after %v:\n%s\nbefore:\n%s", err, got, before)
		}
	})
}
