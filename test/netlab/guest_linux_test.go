package netlab

import (
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

func TestStartGuest(t *testing.T) {
	host, wire := New(t), New(t)
	Veth(t, host, wire, End{Name: "eth0", Address: "192.0.2.1/24"}, End{Name: "guest0"})
	g := StartGuest(t, wire, "guest0", GuestOptions{Address: "192.0.2.2/24", Modules: ModulesIPIP})

	if out := g.MustRun("uname -r; cat /proc/modules"); !strings.HasPrefix(out, g.Kernel) || !strings.Contains(out, "ipip") {
		t.Errorf("kernel %q says:\n%s", g.Kernel, out)
	}
	host.Run("ping", "-c", "2", "-i", "0.2", "-W", Seconds(Timeout()), "192.0.2.2")
	g.MustRun("ping -c 2 -i 0.2 -W " + Seconds(Timeout()) + " -s 1472 -M do 192.0.2.1")

	// The same as when the test process is killed.
	g.line.Close()
	select {
	case <-g.ended:
	case <-time.After(Timeout()):
		t.Error("the guest goes on without its host")
	}
}

// jitterentropy_rng does not load on some processors, and other kernels have some of
// Debian's modules built in.
func TestStartGuest_moduleRefused(t *testing.T) {
	wire, other := New(t), New(t)
	Veth(t, wire, other, End{Name: "guest0"}, End{Name: "eth0"})
	without := func(name string) (modules []string) {
		for _, m := range modulesESP {
			if m == name {
				m = "crypto/refused"
			}
			modules = append(modules, m)
		}
		return modules
	}
	g := StartGuest(t, wire, "guest0", GuestOptions{Modules: without("crypto/jitterentropy_rng")})
	if err := g.canESP(); err != nil {
		t.Errorf("no SA without jitterentropy_rng: %v", err)
	}
	g.MustRun("ip tunnel add t0 mode ipip local 192.0.2.2 remote 192.0.2.1")
	if _, err := g.Run("exit 1"); err == nil || !strings.Contains(err.Error(), "crypto/refused: ") {
		t.Errorf("the error of what does not work does not name the module that is missing: %v", err)
	}

	g.stop()
	g = StartGuest(t, wire, "guest0", GuestOptions{Modules: without("net/ipv4/esp4")})
	if err := g.canESP(); err == nil || !strings.Contains(err.Error(), "crypto/refused: ") {
		t.Errorf("the error of a kernel without ESP is: %v", err)
	}
}

func TestGuestRun(t *testing.T) {
	wire, other := New(t), New(t)
	Veth(t, wire, other, End{Name: "guest0"}, End{Name: "eth0"})
	g := StartGuest(t, wire, "guest0", GuestOptions{})

	var all sync.WaitGroup
	for range 5 {
		all.Go(func() {
			out, err := g.Run("mkdir -p /tmp/side; touch /tmp/side/$$; until [ $(ls /tmp/side | wc -l) = 5 ]; do sleep 0.02; done; seq 1 4000")
			if err != nil || !strings.HasSuffix(out, "\n3999\n4000\n") {
				t.Errorf("%d bytes of output, error %v", len(out), err)
			}
		})
	}
	all.Wait()
	if _, err := g.Run("echo no such thing >&2; exit 3"); err == nil || !strings.Contains(err.Error(), "exit status 3: no such thing") {
		t.Errorf("the error of a failing command is %v", err)
	}
	pid := g.cmd.Process.Pid
	g.stop()
	// A killed process stays a zombie until its parent has waited for it.
	Eventually(t, "no process of the guest is left", func() bool { return syscall.Kill(-pid, 0) == syscall.ESRCH })
}
