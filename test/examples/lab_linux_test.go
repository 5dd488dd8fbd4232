package examples

import (
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"ipipd/test/netlab"
)

func TestMain(m *testing.M) { netlab.Main(m, 2) }

// underlay is a router with one Ethernet segment for each /24: a bridge, on which the router is .254.
type underlay struct {
	router   *netlab.NS
	segments map[netip.Prefix]string // the bridges
	ports    int
}

func newUnderlay(t *testing.T) *underlay {
	t.Helper()
	u := &underlay{router: netlab.New(t), segments: map[netip.Prefix]string{}}
	u.router.Sysctl("net.ipv4.ip_forward", "1")
	return u
}

// node returns a namespace whose eth0 has an address of a /24, and the default route by the router. port is
// the router's end of its cable.
func (u *underlay) node(t *testing.T, address string) (ns *netlab.NS, port string) {
	t.Helper()
	ns = netlab.New(t)
	return ns, u.join(t, ns, "eth0", address)
}

// join is node for a namespace that is there: it gets one more interface.
func (u *underlay) join(t *testing.T, ns *netlab.NS, device, address string) (port string) {
	t.Helper()
	port = u.plug(t, ns, address, netlab.End{Name: device, Address: address + "/24"})
	ns.Run("ip", "route", "append", "default", "via", gateway(address).String(), "dev", device)
	return port
}

// spare returns a namespace whose guest0 is for a guest with an address of a /24.
func (u *underlay) spare(t *testing.T, address string) *netlab.NS {
	t.Helper()
	ns := netlab.New(t)
	u.plug(t, ns, address, netlab.End{Name: "guest0"})
	return ns
}

// gateway returns the router's address in the /24 of an address.
func gateway(address string) netip.Addr {
	a := netip.MustParseAddr(address).As4()
	a[3] = 254
	return netip.AddrFrom4(a)
}

// plug joins a namespace to the segment of an address.
func (u *underlay) plug(t *testing.T, ns *netlab.NS, address string, end netlab.End) (port string) {
	t.Helper()
	prefix := netip.PrefixFrom(netip.MustParseAddr(address), 24).Masked()
	bridge := u.segments[prefix]
	if bridge == "" {
		bridge = "br" + strconv.Itoa(len(u.segments))
		u.segments[prefix] = bridge
		// Without a MAC address set, the bridge's changes with its ports, and neighbour entries keep the old one.
		u.router.Run("ip", "link", "add", bridge, "address", "02:00:00:00:00:fe", "type", "bridge")
		u.router.Run("ip", "address", "add", gateway(address).String()+"/24", "dev", bridge)
		u.router.Run("ip", "link", "set", bridge, "up")
	}
	port = "port" + strconv.Itoa(u.ports)
	u.ports++
	netlab.Veth(t, u.router, ns, netlab.End{Name: port}, end)
	u.router.Run("ip", "link", "set", port, "master", bridge)
	return port
}

// example copies the folder of an example, so that the test can edit what differs between hosts.
func example(t *testing.T, name string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(filepath.Join("../../packaging/examples", name))); err != nil {
		t.Fatal(err)
	}
	return dir
}

// replace writes a file with the first word of each pair replaced by the second.
func replace(t *testing.T, file, to string, pairs ...string) {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(pairs); i += 2 {
		if !strings.Contains(string(text), pairs[i]) {
			t.Fatalf("%s has no %q", file, pairs[i])
		}
	}
	if err := os.WriteFile(to, []byte(strings.NewReplacer(pairs...).Replace(string(text))), 0o600); err != nil {
		t.Fatal(err)
	}
}

// need returns the path of a program, and skips the test without it.
func need(t *testing.T, program, pkg string) string {
	t.Helper()
	for _, dir := range []string{"", "/usr/sbin/", "/usr/lib/frr/"} {
		if path, err := exec.LookPath(dir + program); err == nil {
			return path
		}
	}
	t.Skipf("needs %s (package %s)", program, pkg)
	return ""
}

// process is a running program, with its output so far.
type process struct {
	*exec.Cmd
	log netlab.Buffer
}

// start starts a program that stays in the foreground until the end of the test. If the test fails, it logs
// the program's output.
func start(t *testing.T, ns *netlab.NS, name string, args ...string) *process {
	t.Helper()
	p := &process{Cmd: exec.Command(name, args...)}
	p.Stdout, p.Stderr = &p.log, &p.log
	t.Cleanup(func() {
		if strings.Contains(p.log.String(), "DATA RACE") {
			t.Errorf("the race detector found a race in %s", name)
		}
		if t.Failed() {
			t.Logf("%s:\n%s", strings.Join(p.Args, " "), p.log.String())
		}
	})
	ns.Start(p.Cmd)
	return p
}

// answered reports whether an echo request from an address, with any other options of ping, is answered.
func answered(ns *netlab.NS, to string, options ...string) bool {
	_, err := ns.Try("ping", append([]string{"-n", "-c", "1", "-W", netlab.Seconds(netlab.Scale(time.Second)), to}, options...)...)
	return err == nil
}
