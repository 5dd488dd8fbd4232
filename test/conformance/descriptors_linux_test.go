package conformance

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/internal/ipv4"
	"ipipd/internal/warning"
	"ipipd/test/netlab"
)

// exhausted is a daemon that can open no descriptor.
type exhausted struct {
	*netlab.Daemon
	t      *testing.T
	before unix.Rlimit
	conn   net.Conn // to the control socket: accept takes a descriptor
	answer *bufio.Reader
}

// lowLimit is a limit of open descriptors below those that are in use: what is opened and closed
// later has higher numbers. With 0 poll(2) fails, too.
const lowLimit = 8

// exhaust lowers the daemon's limit of open descriptors: those that are open stay.
func exhaust(t *testing.T, d *netlab.Daemon) *exhausted {
	t.Helper()
	for fd := range lowLimit {
		if _, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", d.PID(), fd)); err != nil {
			t.Fatalf("a descriptor below the limit is free: %v", err)
		}
	}
	e := &exhausted{Daemon: d, t: t}
	if err := unix.Prlimit(d.PID(), unix.RLIMIT_NOFILE, nil, &e.before); err != nil {
		t.Fatal(err)
	}
	e.connect()
	return e
}

// limit lowers the limit, or sets it back.
func (e *exhausted) limit(low bool) {
	limit := e.before
	if low {
		limit.Cur = lowLimit
	}
	if err := unix.Prlimit(e.PID(), unix.RLIMIT_NOFILE, &limit, nil); err != nil {
		e.t.Fatal(err)
	}
}

func (e *exhausted) connect() {
	e.limit(false)
	defer e.limit(true)
	var err error
	if e.conn, err = net.Dial("unix", e.Socket()); err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() { e.conn.Close() })
	e.answer = bufio.NewReader(e.conn)
	if _, err := e.get(); err != nil {
		e.t.Fatal(err)
	}
}

func (e *exhausted) get() (s netlab.Status, err error) {
	_ = e.conn.SetDeadline(time.Now().Add(netlab.Timeout()))
	if _, err = e.conn.Write([]byte("GET /status?name=t0 HTTP/1.1\r\nHost: ipipd\r\n\r\n")); err != nil {
		return s, err
	}
	response, err := http.ReadResponse(e.answer, nil)
	if err != nil {
		return s, err
	}
	defer response.Body.Close()
	return s, json.NewDecoder(response.Body).Decode(&s)
}

// Status is Daemon.Status by a connection that stays open. The daemon closes one that is idle
// for seconds, which takes a new one.
func (e *exhausted) Status() netlab.Status {
	e.t.Helper()
	s, err := e.get()
	for end := time.Now().Add(netlab.Timeout()); err != nil; s, err = e.get() {
		if time.Now().After(end) {
			e.t.Fatalf("the control socket: %v", err)
		}
		e.connect()
	}
	return s
}

// capturing opens a packet socket on t0, as tcpdump does, until stop.
func capturing(t *testing.T, ns *netlab.NS) (stop func()) {
	t.Helper()
	var fd int
	var err error
	ns.Do(func() {
		var ifi *net.Interface
		if ifi, err = net.InterfaceByName("t0"); err != nil {
			return
		}
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err == nil {
			const all = unix.ETH_P_ALL<<8 | unix.ETH_P_ALL>>8
			err = unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: ifi.Index})
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return func() { unix.Close(fd) }
}

// A tunnel opens all descriptors that it needs when it starts: later changes around it take none.
// (An underlay device that was not used before takes one for the fast path: until there is one,
// packets are carried in userspace.)
func TestDescriptors(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, b := hosts(t)
		netlab.Veth(t, a, b, netlab.End{Name: "veth1", Address: wire1A + "/24"}, netlab.End{Name: "veth1", Address: wire1B + "/24"})
		for _, which := range []string{"all", "veth0", "veth1"} {
			a.Sysctl("net.ipv4.conf."+which+".rp_filter", "0")
		}
		sinkIPIP(t, b)
		const rule = "add table ip test; add chain ip test stop { type filter hook input priority 0 ; } ; add rule ip test stop ip protocol 4 accept"
		_, err := a.Try("nft", rule)
		filtered := err == nil
		started := c.up(t, a, "--remote-address", outerB, "--address", innerA+"/24", "--route", "10.254.0.0/24")
		d := exhaust(t, started)
		// The interface as it was at first; the others take descriptors of the test.
		inside := netlab.CaptureReceived(t, a, "t0")
		into := newInjector(t, a, "t0", nil, "")
		wires := map[string]*netlab.Recorder{"veth0": outgoing(t, a, "veth0"), "veth1": outgoing(t, a, "veth1")}
		from := map[string]*injector{"veth0": newInjector(t, b, "veth0", a, "veth0"), "veth1": newInjector(t, b, "veth1", a, "veth1")}
		id := uint16(0)
		// pass sends a packet in each direction, and waits until print says this of the fast path.
		pass := func(when, local, underlay string, fast bool) {
			t.Helper()
			netlab.Eventually(t, when+": a packet is sent from "+local+" by "+underlay, func() bool {
				id++
				into.send(datagram(aToB(id), 100))
				return len(wires[underlay].Matching(netlab.Source(local), carries(id))) > 0 && d.Status().CurrentLocalAddress == local
			})
			netlab.Eventually(t, when+": a packet is received by "+underlay, func() bool {
				id++
				h := ipv4.Header{ID: id, Protocol: ipv4.ProtocolIPIP, Source: addr(outerB), Destination: addr(local)}
				from[underlay].send(build(h, datagram(bToA(id), 100)))
				return len(inside.Matching(netlab.ID(id))) > 0
			})
			if !c.fast {
				return
			}
			netlab.Eventually(t, when+": the fast path is as it should be", func() bool {
				id++
				into.send(datagram(aToB(id), 100)) // poll looks for captures while there is traffic
				return (d.Status().FastPath == "active") == fast
			})
		}
		if filtered {
			pass("a rule", outerA, "veth0", false)
			a.Run("nft", "delete", "table", "ip", "test")
		}
		if c.fast {
			if !netlab.WaitFor(func() bool { return d.Status().FastPath == "active" }) && !filtered {
				t.Skipf("no fast path here: %s", d.Status().FastPath)
			}
		}
		pass("no rule", outerA, "veth0", true)
		if !c.fast && c.name == "two-threads" {
			netlab.Eventually(t, "packets are received from the link layer", func() bool {
				return strings.Count(a.Run("cat", "/proc/net/packet"), " 0800 ") == 3 // and inside
			})
		}
		for range 2 {
			stop := capturing(t, a)
			pass("a capture", outerA, "veth0", false)
			stop()
			pass("no capture", outerA, "veth0", true)
			if _, err := a.Try("tc", "qdisc", "add", "dev", "t0", "root", "handle", "1:", "pfifo"); err == nil {
				pass("a qdisc", outerA, "veth0", false)
				a.Run("tc", "qdisc", "del", "dev", "t0", "root")
				pass("no qdisc", outerA, "veth0", true)
			}
			if filtered {
				a.Run("nft", rule)
				pass("a rule again", outerA, "veth0", false)
				a.Run("nft", "delete", "table", "ip", "test")
				pass("no rule again", outerA, "veth0", true)
			}
			a.Run("ip", "address", "add", "192.0.2.101/24", "dev", "veth0")
			a.Run("ip", "route", "add", outerB+"/32", "dev", "veth0", "src", "192.0.2.101")
			pass("another local address", "192.0.2.101", "veth0", true)
			a.Run("ip", "address", "delete", "192.0.2.101/24", "dev", "veth0") // and the route with it
			pass("the first local address", outerA, "veth0", true)
			a.Run("ip", "route", "add", outerB+"/32", "via", wire1B, "src", outerA)
			pass("another underlay device", outerA, "veth1", false)
			if s := d.Status().FastPath; c.fast && !strings.HasPrefix(s, "no file descriptor is left") {
				t.Errorf("on another underlay device print says: %s", s)
			}
			a.Run("ip", "route", "delete", outerB+"/32")
			pass("the first underlay device", outerA, "veth0", true)
			a.Run("ip", "link", "set", "t0", "down")
			netlab.Eventually(t, "it is seen that the interface is down", func() bool { return !d.Status().Running })
			a.Run("ip", "link", "set", "t0", "name", "renamed")
			a.Run("ip", "link", "set", "renamed", "up")
			pass("renamed and up", outerA, "veth0", true)
			netlab.Eventually(t, "the route is back", func() bool { return strings.Contains(a.Run("ip", "route"), "10.254.0.0/24 dev renamed") })
			a.Run("ip", "link", "set", "renamed", "down")
			a.Run("ip", "link", "set", "renamed", "name", "t0")
			a.Run("ip", "link", "set", "t0", "up")
			pass("named as at first", outerA, "veth0", true)
		}
		elsewhere := netlab.New(t)
		a.Run("ip", "link", "set", "t0", "netns", elsewhere.Path())
		netlab.Eventually(t, "it is seen that the interface was moved", func() bool { // print needs a descriptor
			return strings.Contains(d.Log(), "warning="+warning.InterfaceMoved.String())
		})
		elsewhere.Run("ip", "link", "set", "t0", "netns", a.Path())
		a.Run("ip", "link", "set", "t0", "up")
		netlab.Eventually(t, "the address is back", func() bool { return strings.Contains(a.Run("ip", "address", "show", "t0"), innerA) })
		inside, into = netlab.CaptureReceived(t, a, "t0"), newInjector(t, a, "t0", nil, "")
		if c.fast { // some kernels detach the program of an interface that is moved
			d.limit(false)
		}
		pass("moved and back", outerA, "veth0", true)
	})
}

// An encrypted tunnel has enough sockets for ESP and for UDP 500 and 4500 to change the local
// address once, and back.
func TestDescriptors_ipsec(t *testing.T) {
	t.Parallel()
	a, b := hosts(t)
	file := secretFile(t, secret)
	d := exhaust(t, netlab.Up(t, a, "t0", "--remote-address", outerB, "--address", innerA+"/24", "--ipsec-secret-file", file))
	// peer is the other end, for as long as a's address is local.
	peer := func(local string) {
		t.Helper()
		netlab.Eventually(t, "the local address is "+local, func() bool { return d.Status().CurrentLocalAddress == local })
		db := netlab.Up(t, b, "t0", "--local-address", outerB, "--remote-address", local, "--address", innerB+"/24", "--ipsec-secret-file", file)
		for range 2 { // the second time it is another SA
			awaitRunning(t, db) // first, since a may have the last SA still
			netlab.Eventually(t, "the tunnel is running from "+local, func() bool { return d.Status().Running })
			ping(t, a, innerB)
			db.Stop(unix.SIGKILL)
			db = db.Restart()
		}
		db.Stop(unix.SIGTERM)
	}
	peer(outerA)
	for range 2 {
		a.Run("ip", "address", "add", "192.0.2.7/24", "dev", "veth0")
		a.Run("ip", "route", "change", "192.0.2.0/24", "dev", "veth0", "src", "192.0.2.7")
		peer("192.0.2.7")
		a.Run("ip", "route", "change", "192.0.2.0/24", "dev", "veth0", "src", outerA)
		a.Run("ip", "address", "delete", "192.0.2.7/24", "dev", "veth0")
		peer(outerA)
	}
}
