//go:build linux && soak

package soak

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// event is something that happens to an end. do makes it happen, and returns a line for the schedule; restore
// and reconfigure undo it.
type event struct {
	name     string
	restarts bool
	do       func(e *end, random *rand.Rand) string
}

var events = []event{
	// The processes.
	{"restart", true, restart},
	{"kill-child", true, func(e *end, _ *rand.Rand) string {
		kept := e.kept
		e.kill(unix.SIGKILL)
		if !kept {
			e.start(false, 0)
		}
		return map[bool]string{true: "kept", false: "cold"}[kept]
	}},
	{"replace", true, func(e *end, _ *rand.Rand) string {
		if !e.kept || !e.running() {
			return "not kept"
		}
		_ = e.cmd.Process.Signal(unix.SIGUSR2)
		return ""
	}},
	{"kill-keeper", true, func(e *end, random *rand.Rand) string {
		if !e.kept {
			return "not kept"
		}
		pid := e.pid()
		e.stop(unix.SIGKILL)
		for end := time.Now().Add(time.Minute); pid != 0 && time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
			if unix.Kill(pid, 0) != nil { // it is process 1's child then, or the subreaper's
				break
			}
			if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err != nil || strings.Contains(string(b), ") Z ") {
				break
			}
		}
		e.start(random.IntN(2) == 0, 0)
		return ""
	}},
	{"pause", false, func(e *end, random *rand.Rand) string {
		pid, pause := e.pid(), time.Duration(200+random.IntN(6000))*time.Millisecond
		if pid == 0 {
			return "not there"
		}
		_ = unix.Kill(pid, unix.SIGSTOP)
		e.s.background.Go(func() {
			time.Sleep(pause)
			_ = unix.Kill(pid, unix.SIGCONT)
		})
		return pause.String()
	}},
	// The configuration.
	{"reload", false, reload},
	{"reload", false, reload},
	{"set", false, func(e *end, random *rand.Rand) string {
		t := e.tunnels[random.IntN(len(e.tunnels))]
		p := changeOf(t, random)
		if p.name == "disabled" {
			return e.command([]string{"disable", "enable"}[random.IntN(2)], t.name)
		}
		args := []string{"set", t.name, p.name + "=" + strings.Trim(p.value, "\"")}
		if random.IntN(3) == 0 {
			args = append(args, "--confirm", "2s")
		}
		return e.command(args...)
	}},
	{"add", false, func(e *end, random *rand.Rand) string {
		return e.command("add", "name=x"+strconv.Itoa(random.IntN(3)), fmt.Sprintf("remote-address=198.51.100.%d", 1+random.IntN(9)), "address=10.8.0.1/24")
	}},
	{"remove", false, func(e *end, random *rand.Rand) string {
		name := e.tunnels[random.IntN(len(e.tunnels))].name
		if random.IntN(2) == 0 {
			name = "x" + strconv.Itoa(random.IntN(3))
		}
		return e.command("remove", name)
	}},
	{"hang-up", false, func(e *end, _ *rand.Rand) string {
		if pid := e.pid(); pid != 0 && e.ready() {
			_ = unix.Kill(pid, unix.SIGHUP)
		}
		return ""
	}},
	// The underlay.
	{"impair", false, func(e *end, random *rand.Rand) string {
		i := impairment{loss: random.Float64() * 0.3, double: random.Float64() * 0.2, reorder: random.Float64() * 0.3, damage: random.Float64() * 0.2}
		e.port.set(i)
		return fmt.Sprintf("loss %.2f, double %.2f, reorder %.2f, damage %.2f", i.loss, i.double, i.reorder, i.damage)
	}},
	{"dark", false, func(e *end, random *rand.Rand) string {
		pause := time.Duration(random.IntN(8000)) * time.Millisecond
		e.port.setDark(true)
		e.s.background.Go(func() {
			time.Sleep(pause)
			e.port.setDark(false)
		})
		return pause.String()
	}},
	{"carrier", false, func(e *end, random *rand.Rand) string {
		on := random.IntN(2) == 0
		return fmt.Sprint(on, " ", e.port.setCarrier(on))
	}},
	{"link", false, func(e *end, random *rand.Rand) string {
		pause := time.Duration(random.IntN(3000)) * time.Millisecond
		e.try("ip link set eth0 down")
		e.s.background.Go(func() {
			time.Sleep(pause)
			e.try("ip link set eth0 up")
		})
		return pause.String()
	}},
	{"address", false, func(e *end, random *rand.Rand) string {
		locals := e.locals()
		local := locals[random.IntN(len(locals))]
		return e.line([]string{"ip address del %s/32 dev eth0", "ip address replace %s/32 dev eth0", "ip address replace %s/32 dev other0"}[random.IntN(3)], local)
	}},
	{"neighbour", false, func(e *end, random *rand.Rand) string {
		if random.IntN(3) == 0 {
			return e.line("ip neigh replace 192.0.2.%d lladdr 02:00:00:00:00:%02x dev eth0 nud reachable", 10+random.IntN(120), random.IntN(256))
		}
		return e.line("ip neigh flush dev eth0")
	}},
	{"mac", false, func(e *end, random *rand.Rand) string {
		return e.line("ip link set eth0 address 02:00:00:00:01:%02x", random.IntN(256))
	}},
	{"mtu", false, func(e *end, random *rand.Rand) string {
		return e.line("ip link set eth0 mtu %d", []int{576, 1300, 1400, 1492, 1500, 9000}[random.IntN(6)])
	}},
	{"queue", false, func(e *end, random *rand.Rand) string {
		return e.line("%s", []string{"tc qdisc replace dev eth0 root pfifo limit 1", "tc qdisc replace dev eth0 root tbf rate 2mbit burst 3k limit 6k", "tc qdisc del dev eth0 root"}[random.IntN(3)])
	}},
	{"rules", false, func(e *end, random *rand.Rand) string {
		switch random.IntN(4) {
		case 0:
			return e.line("ip rule add pref 100 ipproto 4 lookup main")
		case 1:
			return e.line("ip rule del pref 100")
		case 2:
			return e.line("nft delete table ip soak")
		}
		return e.line("nft add table ip soak ; add chain ip soak out { type filter hook output priority 0 ; } ; add rule ip soak out ip protocol 4 counter")
	}},
	// What somebody does to the interfaces. Only routes of --route are removed: nobody puts back the kernel's own.
	{"vandal", false, func(e *end, random *rand.Rand) string {
		e.lock.Lock()
		e.vandals++
		n := e.vandals
		e.lock.Unlock()
		if n > 3 { // what is removed five times within a minute is left alone
			return "enough"
		}
		name := e.tunnels[random.IntN(len(e.tunnels))].name
		return e.line([]string{"ip link del %s", "ip address flush dev %s", "ip route flush dev %s proto static", "ip link set %s down", "tc filter del dev %s egress"}[random.IntN(5)], name)
	}},
	// Clients, and what the kernel refuses.
	{"client", false, client},
	{"capture", false, func(e *end, random *rand.Rand) string {
		name, pause := e.tunnels[random.IntN(len(e.tunnels))].name, time.Duration(500+random.IntN(5000))*time.Millisecond
		e.s.background.Go(func() {
			ctx, cancel := context.WithTimeout(e.s.ctx, pause+20*time.Second) // the process may be stopped
			defer cancel()
			_ = exec.CommandContext(ctx, *soakBinary, "capture", name, "--duration", pause.String(), "--runtime-dir", e.runtime()).Run()
		})
		return fmt.Sprint(name, " for ", pause)
	}},
	{"disk-full", false, func(e *end, random *rand.Rand) string {
		pause := time.Duration(random.IntN(5000)) * time.Millisecond
		f, err := os.Create(e.s.logFile("filler"))
		if err != nil {
			return err.Error()
		}
		n, b := 0, make([]byte, 4096)
		for err == nil {
			var wrote int
			wrote, err = f.Write(b)
			n += wrote
		}
		f.Close()
		e.s.background.Go(func() {
			time.Sleep(pause)
			_ = os.Remove(e.s.logFile("filler"))
		})
		return fmt.Sprintf("%d bytes for %v: %v", n, pause, err)
	}},
	{"signals", false, func(e *end, random *rand.Rand) string {
		pid, end := e.pid(), time.Now().Add(time.Duration(500+random.IntN(2500))*time.Millisecond)
		if pid == 0 {
			return "not there"
		}
		e.s.background.Go(func() { // SIGURG does nothing, but to interrupt a system call
			for time.Now().Before(end) {
				tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
				for _, task := range tasks {
					tid, _ := strconv.Atoi(filepath.Base(task))
					_ = unix.Tgkill(pid, tid, unix.SIGURG)
				}
				time.Sleep(time.Millisecond)
			}
		})
		return ""
	}},
	{"fault", false, fault},
	{"fault", false, fault},
}

// restart ends ipipd and starts it with nothing kept, under keep or not, half of the time with other clocks.
func restart(e *end, random *rand.Rand) string {
	e.stop([]unix.Signal{unix.SIGTERM, unix.SIGINT}[random.IntN(2)])
	kept, offset := random.IntN(2) == 0, time.Duration(0)
	if random.IntN(2) == 0 {
		offset = time.Duration(random.IntN(100*86400)) * time.Second
	}
	e.start(kept, offset)
	return fmt.Sprintf("kept %v, clocks off by %v", kept, offset)
}

// reload loads a configuration with some tunnels changed, missing or added, and at times a wrong one.
func reload(e *end, random *rand.Rand) string {
	var tunnels []tunnel
	for _, t := range e.tunnels {
		switch random.IntN(8) {
		case 0:
			continue
		case 1, 2:
			t.properties = append(t.properties[:len(t.properties):len(t.properties)], changeOf(t, random))
		}
		tunnels = append(tunnels, t)
	}
	more := ""
	for i := range 3 {
		if random.IntN(2) == 0 {
			more += fmt.Sprintf("- {name: x%d, remote-address: 198.51.100.%d, address: 10.8.%d.1/24}\n", i, 1+random.IntN(9), i)
		}
	}
	if random.IntN(5) == 0 {
		more += []string{"- {name: x9}\n", "- {name: x9, remote-address: 192.0.2.250, dscp: 64}\n", "]\n", "- {name: x9, remote-address: 192.0.2.250, address: 10.8.0.1/24, route: 192.0.2.250/32}\n"}[random.IntN(4)]
	}
	e.write(tunnels, more)
	args := []string{"reload"}
	if random.IntN(4) == 0 {
		args = append(args, "--confirm", strconv.Itoa(1+random.IntN(4))+"s")
	}
	result := e.command(args...)
	if strings.Contains(result, "exit status") { // a start from a file that is wrong is refused, of course
		e.write(e.tunnels, "")
	}
	return result
}

// command runs a command that may be refused, and returns how it ended.
func (e *end) command(args ...string) string {
	out, err := e.run(args...)
	text := strings.Join(args, " ")
	if err != nil {
		text += ": " + err.Error()
	}
	first, _, _ := strings.Cut(out, "\n")
	return text + " " + first
}

// line runs a command of the host.
func (e *end) line(format string, args ...any) string {
	line := fmt.Sprintf(format, args...)
	if command, ok := strings.CutPrefix(line, "nft "); ok {
		out, _ := e.ns.Try("nft", command)
		return line + " " + strings.TrimSpace(out)
	}
	return line + " " + e.try(line)
}

// ready reports whether ipipd has its tunnels: a signal that comes before it has its handlers would end it.
func (e *end) ready() bool {
	all, err := e.status()
	return err == nil && len(all) > 0 // while it starts print lists none
}

// client is a client of the control or the metrics socket that does not behave.
func client(e *end, random *rand.Rand) string {
	sockets, _ := filepath.Glob(filepath.Join(e.runtime(), "process*.sock"))
	sockets = append(sockets, e.metrics())
	socket := sockets[random.IntN(len(sockets))]
	which := random.IntN(5)
	seed := random.Uint64()
	what := []string{"garbage", "a request without an end", "a huge body", "1000 connections", "reads nothing"}[which]
	e.s.background.Go(func() {
		random := rand.New(rand.NewPCG(seed, 0))
		dial := func() net.Conn {
			c, err := net.DialTimeout("unix", socket, 5*time.Second)
			if err != nil {
				return nil
			}
			_ = c.SetDeadline(time.Now().Add(5 * time.Second))
			return c
		}
		if which == 3 {
			var all []net.Conn
			for range 1000 {
				if c := dial(); c != nil {
					all = append(all, c)
					_, _ = c.Write([]byte("GET /"))
				} else {
					break
				}
			}
			time.Sleep(time.Second)
			for _, c := range all {
				c.Close()
			}
			return
		}
		c := dial()
		if c == nil {
			return
		}
		defer c.Close()
		noise := make([]byte, 1<<16)
		for i := range noise {
			noise[i] = byte(random.Uint32())
		}
		switch which {
		case 0:
			_, _ = c.Write(noise[:random.IntN(len(noise))])
		case 1:
			_, _ = c.Write([]byte("GET /status HTTP/1.1\r\n"))
			for range 1000 {
				if _, err := fmt.Fprintf(c, "X-%d: %s\r\n", random.Uint32(), strings.Repeat("x", 1000)); err != nil {
					return
				}
			}
			time.Sleep(time.Second)
		case 2:
			_, _ = c.Write([]byte("POST /set HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000000000000\r\n\r\n{"))
			for range 500 {
				if _, err := c.Write(noise); err != nil {
					return
				}
			}
		case 4:
			for range 10000 {
				if _, err := c.Write([]byte("GET /status HTTP/1.1\r\nHost: localhost\r\n\r\nGET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")); err != nil {
					return
				}
			}
		}
	})
	return what + " at " + filepath.Base(socket)
}
