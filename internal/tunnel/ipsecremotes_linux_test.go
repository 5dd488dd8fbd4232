package tunnel

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"
	"time"

	"ipipd/internal/drop"
	"ipipd/internal/fib"
	"ipipd/internal/ipsec"
	"ipipd/internal/ipv4"
	"ipipd/internal/netstate"
	"ipipd/internal/packet"
	"ipipd/internal/warning"
	"ipipd/test/netlab"
)

// gateway returns the i-th gateway of protectedControl.
func gateway(i int) [4]byte { return [4]byte{203, 0, byte(113 + i>>8), byte(i)} }

// protectedControl returns a control with that many gateways, a secret and the sockets of IKE, in a network
// namespace of its own.
func protectedControl(t *testing.T, gateways int) (c *control, log *bytes.Buffer) {
	t.Helper()
	log = new(bytes.Buffer)
	c = warningControl(log)
	cfg := Default()
	cfg.RemoteAddress, cfg.LocalAddress, cfg.IPsec.Secret = AnyRemote, netip.MustParseAddr("192.0.2.1"), []byte("mellon-mellon-mellon")
	c.cfg, c.many = &cfg, newRemotes(&cfg)
	c.config.Store(&cfg)
	manager := ipsec.NewManager(ipsec.Options{})
	t.Cleanup(func() { _ = manager.Close() })
	c.ipsecPolicy = newIPsecPolicy(manager, &cfg, cfg.IPsec.Secret, c.log, func() {}, func(drop.Reason, int) {})
	c.protectMany()
	c.engine = &Engine{}
	c.engine.table.Store(&table{})
	c.remotes = map[[4]byte]*remote{}
	var changes []netstate.RouteChange
	routes := map[[4]byte]*route{}
	for i := range gateways {
		g := gateway(i)
		r := &remote{}
		c.remotes[g], routes[g] = r, &route{remote: r, many: true}
		changes = append(changes, netstate.RouteChange{Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24), Routes: []fib.Route{{Hops: []fib.Hop{{Gateway: g}}}}})
	}
	c.many.follow(1, changes)
	c.many.routes.Store(newRouteTable(routes))
	ns := netlab.New(t)
	ns.Do(func() {
		if err := c.ipsecPolicy.listen([4]byte{192, 0, 2, 1}, 0); err != nil {
			t.Fatal(err)
		}
	})
	return c, log
}

// outerTo returns an outer packet to a remote.
func outerTo(remote [4]byte) *packet.Buffer {
	b := packet.New(200)
	h := ipv4.Header{TTL: 64, Protocol: ipv4.ProtocolIPIP, Source: [4]byte{192, 0, 2, 1}, Destination: remote, TotalLen: 40}
	p := make([]byte, 40)
	h.Put(p)
	b.Set(p)
	return b
}

// A remote gets a session for a packet to it, or when it negotiates itself, and loses it when idle, or no gateway any more.
func TestControlProtectRemotes(t *testing.T) {
	c, _ := protectedControl(t, 3)
	r, now := c.ipsecPolicy.remotes, time.Now()
	if why := c.ipsecPolicy.Seal(outerTo([4]byte{198, 51, 100, 9})); why != drop.ESPNoGateway {
		t.Errorf("to what is no gateway: %v", why)
	}
	if r.wanted(netip.MustParseAddr("198.51.100.9"), false) || r.wanted(netip.MustParseAddr("198.51.100.9"), true) {
		t.Error("a stranger is wanted")
	}
	c.protectRemotes(now)
	if len(r.protected) != 0 || !c.ipsecNext().IsZero() {
		t.Errorf("without a reason there are %d sessions", len(r.protected))
	}
	for range 3 {
		if why := c.ipsecPolicy.Seal(outerTo(gateway(0))); why != drop.ESPNoSA {
			t.Errorf("without an SA: %v", why)
		}
	}
	if !r.wanted(address(gateway(1)), false) || !r.wanted(address(gateway(2)), true) {
		t.Error("a gateway is not wanted")
	}
	c.protectRemotes(now)
	if len(r.protected) != 3 || c.ipsecNext().IsZero() {
		t.Fatalf("%d sessions, want 3", len(r.protected))
	}
	if n := testing.AllocsPerRun(100, func() { c.ipsecPolicy.Seal(outerTo0) }); n != 0 {
		t.Errorf("a packet without an SA takes %v allocations", n)
	}
	c.protectRemotes(now.Add(unprotectedIdle - time.Second)) // the first one was used now
	if len(r.protected) != 3 {
		t.Errorf("%d sessions are left after less than a minute", len(r.protected))
	}
	c.protectRemotes(now.Add(unprotectedIdle + idleCheck))
	if len(r.protected) != 1 || r.protected[gateway(0)] == nil {
		t.Errorf("%d sessions are left after a minute, want that of the packets", len(r.protected))
	}
	c.endRemoteIPsec(gateway(0))
	if why := c.ipsecPolicy.Seal(outerTo(gateway(0))); why != drop.ESPNoSA || len(r.protected) != 0 {
		t.Errorf("a session outlives its route: %v", why)
	}
	c.protectRemotes(now)
	if len(r.protected) != 1 {
		t.Error("a packet after that has none made")
	}
	c.ipsecPolicy.close()
	if len(r.protected) != 0 || r.listener != nil || c.remotes[gateway(0)].ipsec.protected.Load() != nil {
		t.Error("close leaves a session")
	}
}

var outerTo0 = outerTo(gateway(0))

// When there is no room, a packet of ours evicts an idle session; a packet that may be forged evicts none that may
// still negotiate.
func TestControlProtectRemotes_full(t *testing.T) {
	c, _ := protectedControl(t, maxProtected+3)
	r, now := c.ipsecPolicy.remotes, time.Now()
	for i := range maxProtected {
		if i < maxProtected/2 {
			c.ipsecPolicy.Seal(outerTo(gateway(i)))
		} else {
			r.wanted(address(gateway(i)), false)
		}
	}
	c.protectRemotes(now)
	if len(r.protected) != maxProtected {
		t.Fatalf("%d sessions", len(r.protected))
	}
	r.wanted(address(gateway(maxProtected)), false)
	c.protectRemotes(now)
	if len(r.protected) != maxProtected || r.protected[gateway(maxProtected)] != nil {
		t.Error("what is forged takes the place of a negotiation")
	}
	c.ipsecPolicy.Seal(outerTo(gateway(maxProtected + 1)))
	c.protectRemotes(now)
	if len(r.protected) != maxProtected || r.protected[gateway(maxProtected+1)] == nil {
		t.Error("a packet has no session made")
	}
	for i := range maxProtected / 2 {
		if r.protected[gateway(i)] == nil {
			t.Errorf("the session of packets to %v had to go", gateway(i))
		}
	}
}

// Warnings and log lines stay few and short, however many remotes have a problem.
func TestControlWarnIPsec_manyRemotes(t *testing.T) {
	c, log := protectedControl(t, 1)
	r := c.ipsecPolicy.remotes
	for i := range 200 {
		r.logEvent(address(gateway(i)), ipsec.Event{Kind: ipsec.EventProblem, Status: ipsec.Status{Problem: "the secret is not the peer's"}})
	}
	if n := strings.Count(log.String(), "level=WARN"); n != maxLines+1 {
		t.Errorf("%d lines are logged, want %d", n, maxLines+1)
	}
	var all []remoteStatus
	for i := range 200 {
		all = append(all, remoteStatus{address(gateway(i)), ipsec.Status{Problem: "the secret is not the peer's"}})
	}
	text, each := describeRemotes(all, time.Now())
	want := "SAs with 0 of 200 remotes: 203.0.113.0 not established: the secret is not the peer's, 203.0.113.1 not established: the secret is not the peer's, 203.0.113.2 not established: the secret is not the peer's, and 197 more"
	if text != want || len(each) != 200 {
		t.Errorf("%q, %d remotes", text, len(each))
	}
	if c.warnIPsec(); c.warned(warning.IPsecNotEstablished) {
		t.Error("it warns without a remote")
	}
}
