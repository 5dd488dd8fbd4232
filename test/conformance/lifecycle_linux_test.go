package conformance

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"ipipd/internal/warning"
	"ipipd/test/netlab"
)

// The example of RouterOS's documentation: three pings between R1 and R2.
func TestLifecycle_routerOSExample(t *testing.T) {
	t.Parallel()
	r1, internet, r2 := netlab.New(t), netlab.New(t), netlab.New(t)
	netlab.Veth(t, r1, internet, netlab.End{Name: "ether1", Address: "10.0.0.1/24"}, netlab.End{Name: "to-r1", Address: "10.0.0.254/24"})
	netlab.Veth(t, r2, internet, netlab.End{Name: "ether1", Address: "22.63.11.6/24"}, netlab.End{Name: "to-r2", Address: "22.63.11.254/24"})
	internet.Sysctl("net.ipv4.ip_forward", "1")
	r1.Run("ip", "route", "add", "default", "via", "10.0.0.254")
	r2.Run("ip", "route", "add", "default", "via", "22.63.11.254")
	d1 := netlab.Up(t, r1, "ipip1", "--local-address", "10.0.0.1", "--remote-address", "22.63.11.6", "--address", "1.1.1.1/24")
	d2 := netlab.Up(t, r2, "ipip1", "--local-address", "22.63.11.6", "--remote-address", "10.0.0.1", "--address", "1.1.1.2/24")

	for _, d := range []*netlab.Daemon{d1, d2} {
		netlab.Eventually(t, "it has heard the other", func() bool { return d.Status().KeepaliveState == "up" })
	}
	out := r1.Run("ping", "-c", "3", "-i", "0.2", "-W", netlab.Seconds(netlab.Timeout()), "1.1.1.2")
	if !strings.Contains(out, "3 packets transmitted, 3 received, 0% packet loss") || strings.Count(out, "ttl=64") != 3 {
		t.Error(out)
	}
	for _, x := range []struct {
		d    *netlab.Daemon
		want string
	}{
		{d1, "0 R  ipip1  1480  10.0.0.1       22.63.11.6"},
		{d2, "0 R  ipip1  1480  22.63.11.6     10.0.0.1"},
	} {
		if out, err := x.d.Run("print"); err != nil || !strings.Contains(out, x.want) {
			t.Errorf("print says %v\n%swant the line\n%s", err, out, x.want)
		}
	}
}

// SIGTERM and SIGINT remove the interface and the control socket; the exit status is 0.
func TestLifecycle_signal(t *testing.T) {
	t.Parallel()
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		a, _ := hosts(t)
		d := upA(t, a)
		if status := d.Stop(signal); status != 0 {
			t.Errorf("exit status %d after %v: %s", status, signal, d.Log())
		}
		if out, err := a.Try("ip", "link", "show", "t0"); err == nil {
			t.Errorf("the interface is still there after %v: %s", signal, out)
		}
		if out, err := d.Run("print"); err != nil || strings.Contains(out, "t0") {
			t.Errorf("print after %v: %v %s", signal, err, out)
		}
	}
}

func TestLifecycle_down(t *testing.T) {
	t.Parallel()
	a, _ := hosts(t)
	d := upA(t, a)
	if out, err := d.Run("down", "t0"); err != nil {
		t.Fatalf("down: %v %s", err, out)
	}
	if out, err := a.Try("ip", "link", "show", "t0"); err == nil {
		t.Errorf("down returned, and the interface is still there: %s", out)
	}
	if status := d.Wait(); status != 0 {
		t.Errorf("exit status %d", status)
	}
}

func TestLifecycle_killed(t *testing.T) {
	t.Parallel()
	a, b := hosts(t)
	d := upA(t, a)
	upB(t, b)
	ping(t, a, innerB)
	d.Stop(syscall.SIGKILL)
	if out, err := a.Try("ip", "link", "show", "t0"); err == nil {
		t.Errorf("the interface outlived its process: %s", out)
	}
	d.Restart()
	ping(t, a, innerB)
}

// An interface that is deleted, or goes with the network namespace that it was moved to, is made again, with
// all that it had; another tunnel of the process loses no packet.
func TestLifecycle_interfaceDeleted(t *testing.T) {
	for _, fastPath := range []string{"no", "yes"} {
		t.Run("fast-path-"+fastPath, func(t *testing.T) {
			t.Parallel()
			a, b := hosts(t)
			const other = "192.0.2.3"
			b.Run("ip", "address", "add", other+"/24", "dev", "veth0")
			file := filepath.Join(t.TempDir(), "ipipd.yaml")
			text := fmt.Sprintf("defaults: {allow-fast-path: %s, local-address: %s}\ntunnels:\n- {name: t0, remote-address: %s, address: %s/24}\n"+
				"- {name: t1, remote-address: %s, address: 10.9.0.1/24, route: 10.10.0.0/16, mtu: 1400}\n", fastPath, outerA, outerB, innerA, other)
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			d := netlab.UpConfig(t, a, "t0", file)
			upB(t, b)
			netlab.Up(t, b, "t1", "--local-address", other, "--remote-address", outerA, "--address", "10.9.0.2/24")
			ping(t, a, "10.9.0.2")
			index := func() string {
				out, err := a.Try("ip", "-o", "link", "show", "t1")
				if err != nil {
					return ""
				}
				number, _, _ := strings.Cut(out, ":")
				return number
			}
			stop := netlab.Stream(t, a, innerA, b, innerB)
			elsewhere := netlab.New(t)
			for _, remove := range [][]string{{"link", "delete", "t1"}, {"link", "set", "t1", "netns", elsewhere.Path()}} {
				before := index()
				a.Run("ip", remove...)
				if remove[1] == "set" {
					elsewhere.Run("ip", "link", "delete", "t1")
				}
				netlab.Eventually(t, "it is made again", func() bool { now := index(); return now != "" && now != before })
				netlab.Eventually(t, "the tunnel works", func() bool { return answered(a, "10.9.0.2") })
				if out := a.Run("ip", "address", "show", "t1"); !strings.Contains(out, "mtu 1400") || !strings.Contains(out, "inet 10.9.0.1/24") {
					t.Errorf("it has\n%s", out)
				}
				netlab.Eventually(t, "its route is there", func() bool { return strings.Contains(a.Run("ip", "route", "show", "10.10.0.0/16"), "dev t1") })
			}
			stop()
			if fast := d.Status().FastPath == "active"; fast != (fastPath == "yes") {
				t.Errorf("fast-path: %s", d.Status().FastPath)
			}
		})
	}
}

// The SAs of a tunnel outlive its interface: there is no new negotiation.
func TestLifecycle_interfaceDeletedIKE(t *testing.T) {
	t.Parallel()
	a, b := hosts(t)
	da, db := encryptedUpA(t, a), encryptedUpB(t, b)
	awaitRunning(t, da, db)
	before := da.Status().IPsecSPI
	a.Run("ip", "link", "delete", "t0")
	netlab.Eventually(t, "the interface is made again", func() bool { return da.Status().Restored["interface"] == 1 })
	awaitPing(t, a, "the interface was deleted")
	if now := da.Status().IPsecSPI; now != before || before == "" {
		t.Errorf("the SPIs were %s, and are %s", before, now)
	}
}

func TestLifecycle_nameTaken(t *testing.T) {
	t.Parallel()
	a, _ := hosts(t)
	upA(t, a)
	second := netlab.Launch(t, a, "t0", "--local-address", outerA, "--remote-address", "192.0.2.77")
	if status := second.Wait(); status != 1 {
		t.Errorf("exit status %d, want 1", status)
	}
	if log := second.Log(); strings.Count(log, "\n") != 1 || !strings.Contains(log, "t0 is taken") {
		t.Errorf("want one line that says that the name is taken, got:\n%s", log)
	}
	if out := a.Run("ip", "-o", "link", "show", "t0"); !strings.Contains(out, "UP") {
		t.Errorf("the first tunnel suffered: %s", out)
	}
}

func TestLifecycle_noRoute(t *testing.T) {
	t.Parallel()
	a, _ := hosts(t)
	d := netlab.Up(t, a, "t0", "--remote-address", "198.51.100.1")
	if w := d.AwaitWarning(warning.NoRoute); w.Detail != "route to 198.51.100.1" || w.Remedy != "ip route add 198.51.100.1 via GATEWAY, or set --underlay-device" {
		t.Errorf("%+v", w)
	}
	if s := d.Status(); s.Running || !noCarrier(a) {
		t.Errorf("running %v", s.Running)
	}
	a.Run("ip", "route", "add", "198.51.100.1", "via", outerB)
	netlab.Eventually(t, "it runs", func() bool { return d.Status().Running && !noCarrier(a) })
}

// A tunnel starts on a host without any interface, and runs once all that it needs is there. With a named
// underlay device that has an address the kernel needs no route.
func TestLifecycle_nothingThere(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name        string
		flags       []string
		first, last string
	}{
		{"device", []string{"--underlay-device", "veth0"}, "underlay-device veth0", "local-address " + outerA + ", which is not on this host"},
		{"route", nil, "local-address " + outerA + ", which is not on this host", "route to " + loopbackB},
	} {
		t.Run(test.name, func(t *testing.T) {
			eachVariant(t, func(t *testing.T, c variant) {
				a, b := netlab.New(t), netlab.New(t)
				d := c.up(t, a, append([]string{"--local-address", outerA, "--remote-address", loopbackB, "--address", innerA + "/24", "--route", "0.0.0.0/0"}, test.flags...)...)
				waits := func(want string) {
					t.Helper()
					netlab.Eventually(t, "print says waiting-for: "+want, func() bool {
						out, err := d.Run("print", "t0")
						return err == nil && strings.Contains(out, "waiting-for: "+want+"\n") && strings.Contains(out, "running: no\n")
					})
					if !noCarrier(a) || strings.Contains(a.Run("ip", "route", "show", "default"), "t0") {
						t.Errorf("without %s there is a carrier, or a default route", want)
					}
				}
				waits(test.first)
				underlay := "192.0.2.77/24"
				if test.flags == nil {
					underlay = outerA + "/24"
				}
				netlab.Veth(t, a, b, netlab.End{Name: "veth0", Address: underlay}, netlab.End{Name: "veth0", Address: outerB + "/24"})
				b.Run("ip", "address", "add", loopbackB+"/32", "dev", "lo")
				netlab.Up(t, b, "t0", "--local-address", loopbackB, "--remote-address", outerA, "--address", innerB+"/24")
				waits(test.last)
				a.Run("ip", "route", "add", loopbackB, "via", outerB)
				if test.flags != nil {
					a.Run("ip", "address", "add", outerA+"/24", "dev", "veth0")
				}
				netlab.Eventually(t, "it runs", func() bool { return d.Status().Running && !noCarrier(a) })
				netlab.Eventually(t, "its route is there", func() bool { return strings.Contains(a.Run("ip", "route", "show", "default"), "dev t0") })
				awaitPing(t, a, "all has come")
				if c.fast {
					netlab.Eventually(t, "the fast path is taken", func() bool { return d.Status().FastPath == "active" })
				}
			})
		})
	}
}
