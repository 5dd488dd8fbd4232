package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/internal/control"
	"ipipd/internal/monitor"
	"ipipd/internal/tunnel"
	"ipipd/test/netlab"
)

// pty is a terminal, and what is on it.
type pty struct {
	t        *testing.T
	master   *os.File
	masterFD int
	slave    *os.File // stays open, so that the modes can be read when the program has ended

	mu   sync.Mutex
	all  bytes.Buffer
	read chan struct{} // closed at the end of the output
}

func openPTY(t *testing.T, width, height int) *pty {
	t.Helper()
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0) // so that Close ends a Read
	if err != nil {
		t.Skip(err)
	}
	p := &pty{t: t, master: os.NewFile(uintptr(fd), "/dev/ptmx"), masterFD: fd, read: make(chan struct{})}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		p.slave, err = os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|syscall.O_NOCTTY, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	p.resize(width, height)
	t.Cleanup(func() { p.slave.Close(); p.master.Close() })
	return p
}

func (p *pty) resize(width, height int) {
	p.t.Helper()
	if err := unix.IoctlSetWinsize(int(p.slave.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: uint16(height), Col: uint16(width)}); err != nil {
		p.t.Fatal(err)
	}
}

// drain reads what is written.
func (p *pty) drain() {
	go func() {
		defer close(p.read)
		buffer := make([]byte, 4096)
		for {
			n, err := p.master.Read(buffer)
			p.mu.Lock()
			p.all.Write(buffer[:n])
			p.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
}

// modes returns the terminal's modes.
func (p *pty) modes() unix.Termios {
	p.t.Helper()
	modes, err := unix.IoctlGetTermios(int(p.slave.Fd()), unix.TCGETS)
	if err != nil {
		p.t.Fatal(err)
	}
	return *modes
}

func (p *pty) raw() bool { return p.modes().Lflag&unix.ICANON == 0 }

func (p *pty) output() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.all.String()
}

func (p *pty) press(keys string) {
	p.t.Helper()
	if _, err := p.master.WriteString(keys); err != nil {
		p.t.Fatal(err)
	}
}

var sequence = regexp.MustCompile(`^\x1b\[(\??)([0-9;]*)([A-Za-z])`)

// screen returns what the terminal shows. It knows the sequences that package terminal uses, and no others.
func (p *pty) screen() (lines []string, alternate, cursor bool) {
	p.t.Helper()
	text, row := p.output(), 0
	cursor = true
	put := func(s string) {
		for len(lines) <= row {
			lines = append(lines, "")
		}
		lines[row] += s
	}
	for text != "" {
		if text[0] != 0x1b {
			n := strings.IndexByte(text, 0x1b)
			if n < 0 {
				n = len(text)
			}
			if alternate {
				put(text[:n])
			}
			text = text[n:]
			continue
		}
		m := sequence.FindStringSubmatch(text)
		if m == nil {
			if len(text) < 16 {
				break // not whole yet
			}
			p.t.Fatalf("a sequence that nobody knows: %.40q", text)
		}
		text = text[len(m[0]):]
		switch n, _ := strconv.Atoi(m[2]); m[1] + m[3] {
		case "H":
			row = max(n, 1) - 1
		case "K":
			put("")
			lines[row] = ""
		case "J":
			lines = nil
		case "m":
		case "?h", "?l":
			switch on := m[3] == "h"; n {
			case 1049:
				alternate = on
			case 25:
				cursor = on
			case 7:
			default:
				p.t.Fatalf("a mode that nobody knows: %q", m[0])
			}
		default:
			p.t.Fatalf("a sequence that nobody knows: %q", m[0])
		}
	}
	return lines, alternate, cursor
}

// shows waits until the terminal shows a text.
func (p *pty) shows(text string) {
	p.t.Helper()
	p.eventually("the screen to show "+strconv.Quote(text), func() bool {
		lines, _, _ := p.screen()
		return strings.Contains(strings.Join(lines, "\n"), text)
	})
}

func (p *pty) eventually(what string, is func() bool) {
	p.t.Helper()
	for end := time.Now().Add(netlab.Timeout()); !is(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			lines, _, _ := p.screen()
			p.t.Fatalf("waited for %s in vain. The screen:\n%s", what, strings.Join(lines, "\n"))
		}
	}
}

// start starts `ipipd args...`, as the leader of the terminal's session.
func (p *pty) start(args ...string) *exec.Cmd { return p.startProgram(ipipdLink(p.t), args...) }

func (p *pty) startProgram(program string, args ...string) *exec.Cmd {
	p.t.Helper()
	c := exec.Command(program, args...)
	c.Env = append(os.Environ(), "TERM=xterm", "LC_ALL=C.UTF-8", "NO_COLOR=", "PATH="+filepath.Dir(ipipdLink(p.t))+":"+os.Getenv("PATH"))
	c.Stdin, c.Stdout, c.Stderr = p.slave, p.slave, p.slave
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := c.Start(); err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() {
		if c.ProcessState == nil {
			_ = c.Process.Kill()
			_ = c.Wait()
		}
	})
	return c
}

// ipipdLink returns a link named ipipd to this test's binary, which TestMain makes ipipd.
func ipipdLink(t *testing.T) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), "ipipd")
	if err := os.Symlink(self, link); err != nil {
		t.Fatal(err)
	}
	return link
}

// wait returns the exit status, -1 for a signal.
func wait(t *testing.T, c *exec.Cmd) int {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- c.Wait() }()
	select {
	case err := <-done:
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		return c.ProcessState.ExitCode()
	case <-time.After(netlab.Timeout()):
		t.Fatal("the monitor does not end")
	}
	return 0
}

// monitored serves tunnels, and returns the folder. Each answer counts 1000 bytes more.
func monitored(t *testing.T, names ...string) (dir string, server *control.Server) {
	t.Helper()
	dir = shortDir(t)
	server, err := control.Listen(t.Context(), dir, names...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	var n atomic.Uint64
	go server.Serve(control.Handler{
		Samples: func() (any, error) {
			var a monitor.Answer
			for _, name := range names {
				a.Tunnels = append(a.Tunnels, tunnel.Sample{Name: name, Interface: name, Started: true, Running: true, RxBytes: 1000 * n.Add(1), Comment: "from \x1b[2Jhere"})
			}
			return a, nil
		},
		Status: func(name string) (any, error) {
			return tunnel.Status{Settings: []tunnel.Setting{{Name: "name", Value: name}, {Name: "comment", Value: "\x1b]0;hostile\x07"}}}, nil
		},
	})
	return dir, server
}

// Keys sort, filter and open pages; q ends it, and the terminal is as it was.
func TestMonitorRun_keys(t *testing.T) {
	dir, _ := monitored(t, "ipip1", "ipip2", "other")
	p := openPTY(t, 100, 50)
	before := p.modes()
	p.drain()
	c := p.start("monitor", "--interval", "100ms", "--runtime-dir", dir)
	p.shows("3 tunnels: 3 running")
	if _, alternate, cursor := p.screen(); !alternate || cursor || !p.raw() {
		t.Error("the terminal is not taken over")
	}
	p.press("s")
	p.shows("sort by STATE")
	p.press("/IPIP")
	p.shows("filter: IPIP_")
	p.shows("2 of 3 tunnels match")
	p.press("\r\x1b[B\r")
	p.shows("name: ipip2")
	p.shows("comment: ?]0;hostile?")
	p.shows("bit/s, ")
	p.press("\x1b")
	p.shows("2 of 3 tunnels match")
	p.press("?")
	p.shows("ipipd monitor: keys")
	p.press("\x1b[D")
	p.shows("from ?[2Jhere")
	p.resize(30, 5)
	if err := c.Process.Signal(syscall.SIGWINCH); err != nil { // the kernel sends one, too, but later
		t.Fatal(err)
	}
	p.eventually("a small table", func() bool {
		lines, _, _ := p.screen()
		return len(lines) > 0 && len(lines) <= 5 && len(lines[0]) <= 30
	})
	for _, size := range [][2]int{{1, 1}, {10000, 3}, {100, 50}} {
		p.resize(size[0], size[1])
		p.press("\x0c")
	}
	p.shows("q quit")
	p.press("q")
	if status := wait(t, c); status != 0 {
		t.Errorf("exit status %d", status)
	}
	p.restored(before)
}

// restored checks that the terminal is as it was.
func (p *pty) restored(before unix.Termios) {
	p.t.Helper()
	if after := p.modes(); after != before {
		p.t.Errorf("modes: %+v, they were %+v", after, before)
	}
	p.eventually("the end of the output", func() bool {
		_, alternate, cursor := p.screen()
		return !alternate && cursor
	})
}

// Each way out leaves the terminal as it was.
func TestMonitorRun_ends(t *testing.T) {
	for _, how := range []struct {
		name   string
		end    func(*pty, *exec.Cmd)
		status int
	}{
		{"Ctrl-C", func(p *pty, _ *exec.Cmd) { p.press("\x03") }, 0},
		{"SIGINT", func(_ *pty, c *exec.Cmd) { _ = c.Process.Signal(syscall.SIGINT) }, 0},
		{"SIGTERM", func(_ *pty, c *exec.Cmd) { _ = c.Process.Signal(syscall.SIGTERM) }, 0},
		{"SIGHUP", func(_ *pty, c *exec.Cmd) { _ = c.Process.Signal(syscall.SIGHUP) }, 0},
		{"SIGQUIT", func(_ *pty, c *exec.Cmd) { _ = c.Process.Signal(syscall.SIGQUIT) }, 0},
	} {
		t.Run(how.name, func(t *testing.T) {
			dir, _ := monitored(t, "ipip1")
			p := openPTY(t, 80, 50)
			before := p.modes()
			p.drain()
			c := p.start("monitor", "ipip1", "--runtime-dir", dir)
			p.shows("name: ipip1")
			how.end(p, c)
			if status := wait(t, c); status != how.status {
				t.Errorf("exit status %d, want %d", status, how.status)
			}
			p.restored(before)
		})
	}
}

// --count ends the table, too.
func TestMonitorRun_count(t *testing.T) {
	dir, _ := monitored(t, "ipip1")
	p := openPTY(t, 80, 24)
	before := p.modes()
	p.drain()
	c := p.start("monitor", "--interval", "100ms", "--count", "3", "--runtime-dir", dir)
	if status := wait(t, c); status != 0 {
		t.Errorf("exit status %d", status)
	}
	p.restored(before)
}

// The monitor ends when its terminal is gone, and can be ended while the terminal takes no output.
func TestMonitorRun_lost(t *testing.T) {
	dir, _ := monitored(t, "ipip1")
	p := openPTY(t, 80, 24)
	p.drain()
	c := p.start("monitor", "--interval", "100ms", "--runtime-dir", dir)
	p.shows("1 tunnel: 1 running")
	p.slave.Close()
	p.master.Close()
	if status := wait(t, c); status != 0 {
		t.Errorf("exit status %d", status)
	}

	p = openPTY(t, 10000, 1000)
	before := p.modes()
	c = p.start("monitor", "--interval", "100ms", "--runtime-dir", dir) // nobody reads
	p.eventually("raw mode", p.raw)
	p.press(strings.Repeat("\x0c", 50)) // more output than the terminal takes
	time.Sleep(300 * time.Millisecond)
	if err := c.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	wait(t, c)
	if p.modes() != before {
		t.Error("the terminal is still raw")
	}
}

// Ctrl-Z, or a SIGTSTP from elsewhere, gives the terminal to the shell, and fg goes on.
func TestMonitorRun_suspend(t *testing.T) {
	dir, _ := monitored(t, "ipip1")
	monitor := "ipipd monitor --interval 100ms --runtime-dir " + dir
	for _, how := range []struct {
		name, job string
		stop      func(p *pty, group int)
	}{
		{"Ctrl-Z", monitor, func(p *pty, _ int) { p.press("\x1a") }},
		{"Ctrl-Z with a parent in its job", "sh -c '" + monitor + "; exit $?'", func(p *pty, _ int) { p.press("\x1a") }},
		{"SIGTSTP", monitor, func(_ *pty, group int) { _ = syscall.Kill(group, syscall.SIGTSTP) }},
	} {
		t.Run(how.name, func(t *testing.T) {
			script := filepath.Join(t.TempDir(), "script")
			text := "set -m\n" + how.job + "\n" + strings.Repeat("stty -a >$0.modes; echo STOPPED; read x; fg >/dev/null\n", 2) + "echo ENDED $?\n"
			if err := os.WriteFile(script, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			p := openPTY(t, 80, 24)
			before := p.modes()
			p.drain()
			c := p.startProgram("/bin/sh", script)
			for i := 1; i <= 2; i++ { // the second time as well
				p.eventually("the table", func() bool {
					lines, alternate, _ := p.screen()
					return alternate && p.raw() && len(lines) > 0 && strings.HasPrefix(lines[0], "1 tunnel: 1 running")
				})
				group, err := unix.IoctlGetInt(p.masterFD, unix.TIOCGPGRP)
				if err != nil {
					t.Fatal(err)
				}
				how.stop(p, group)
				p.eventually("the shell", func() bool { return strings.Count(p.output(), "STOPPED\r\n") == i })
				if modes, err := os.ReadFile(script + ".modes"); err != nil || !strings.Contains(string(modes), " icanon") {
					t.Errorf("%s, %v", modes, err)
				}
				if _, alternate, cursor := p.screen(); alternate || !cursor {
					t.Error("the shell has no screen")
				}
				p.press("\n")
			}
			p.eventually("the table again", func() bool {
				_, alternate, _ := p.screen()
				return alternate && p.raw()
			})
			p.press("q")
			p.eventually("the end", func() bool { return strings.Contains(p.output(), "ENDED 0\r\n") })
			wait(t, c)
			p.restored(before)
		})
	}
}

// A panic, in any goroutine, is shown after the terminal was restored.
func TestMonitorOptions_panic(t *testing.T) {
	p := openPTY(t, 80, 24)
	before := p.modes()
	p.drain()
	dir, _ := monitored(t, "ipip1")
	broken := &inquiry{done: make(chan struct{}), panicked: "broken"}
	close(broken.done)
	stdin := os.Stdin
	os.Stdin = p.slave
	defer func() { os.Stdin = stdin }()
	o := &monitorOptions{Interval: time.Second}
	func() {
		defer func() {
			if got := recover(); got != "broken" {
				t.Errorf("panic: %v", got)
			}
		}()
		model := monitor.NewModel(o.Interval, "", compareNames)
		_ = o.screen(t.Context(), p.slave, &poller{dir: dir, pending: map[string]*inquiry{"process:1": broken}}, model)
	}()
	p.restored(before)
}

// A monitor that leads its session, as under `script` or in a container, does not stop: nothing could continue it.
func TestMonitorRun_suspendOrphan(t *testing.T) {
	dir, _ := monitored(t, "ipip1")
	p := openPTY(t, 80, 24)
	p.drain()
	c := p.start("monitor", "--interval", "100ms", "--runtime-dir", dir)
	p.shows("1 tunnel: 1 running")
	p.press("\x1as")
	p.shows("sort by STATE")
	p.press("q")
	if status := wait(t, c); status != 0 {
		t.Errorf("exit status %d", status)
	}
}

// Without a terminal there are lines; processes come and go.
func TestMonitorRun_lines(t *testing.T) {
	dir, server := monitored(t, "ipip1", "ipip2")
	status, out, errs := command("monitor", "--interval", "100ms", "--count", "2", "--runtime-dir", dir)
	if status != 0 || errs != "" || strings.Count(out, "\n") != 4 || !strings.Contains(out, " name=ipip2 state=running rx=") || strings.Contains(out, "\x1b") {
		t.Errorf("status %d, %q, %q", status, out, errs)
	}
	status, out, errs = command("monitor", "ipip2", "--json", "--interval", "100ms", "--count", "1", "--runtime-dir", dir)
	var line struct{ Tunnels []map[string]any }
	if err := json.Unmarshal([]byte(out), &line); err != nil || status != 0 || errs != "" || strings.Count(out, "\n") != 1 ||
		len(line.Tunnels) != 1 || line.Tunnels[0]["name"] != "ipip2" || line.Tunnels[0]["rx-bits-per-second"] == nil {
		t.Errorf("status %d, %q, %q, %v", status, out, errs, err)
	}
	for _, args := range [][]string{{"--interval", "1ms"}, {"--interval", "x"}, {"--count", "0"}, {"--count", "x"}, {"a", "b"}} {
		if status, _, errs := command(append([]string{"monitor", "--runtime-dir", dir}, args...)...); status != 2 || strings.Count(errs, "\n") != 1 {
			t.Errorf("%q: status %d, %q", args, status, errs)
		}
	}
	if status, _, errs := command("monitor", "nosuch", "--runtime-dir", dir); status != 1 || !strings.HasPrefix(errs, "ipipd: no tunnel named nosuch in ") {
		t.Errorf("status %d, %q", status, errs)
	}
	server.Close()
	if status, out, errs := command("monitor", "--json", "--interval", "100ms", "--count", "1", "--runtime-dir", dir); status != 0 || errs != "" || !strings.Contains(out, `"tunnels":[]`) {
		t.Errorf("without processes: status %d, %q, %q", status, out, errs)
	}
}

// A process that hangs does not keep the others from being shown, and is asked again.
func TestPoller_round(t *testing.T) {
	dir, _ := monitored(t, "ipip1")
	hung, err := control.Listen(t.Context(), dir, "hung") // and never Serve, so far
	if err != nil {
		t.Fatal(err)
	}
	defer hung.Close()
	p := &poller{dir: dir, wait: 50 * time.Millisecond, pending: map[string]*inquiry{}}
	answered, late := 0, 0
	for end := time.Now().Add(netlab.Timeout()); answered == 0 && time.Now().Before(end); {
		readings, err := p.round()
		if err != nil || len(readings) != 2 {
			t.Fatalf("%+v, %v", readings, err)
		}
		for _, r := range readings {
			switch {
			case r.Answer != nil:
				answered++
			case r.State == "" && r.Links[0] == "hung":
				late++
			}
		}
	}
	if answered == 0 || late == 0 || len(p.pending) == 0 {
		t.Errorf("%d answers, %d late", answered, late)
	}
	go hung.Serve(control.Handler{Samples: func() (any, error) { return monitor.Answer{}, nil }})
	p.wait = netlab.Timeout()
	if readings, err := p.round(); err != nil || len(readings) != 2 || readings[0].Answer == nil || readings[1].Answer == nil {
		t.Errorf("%+v, %v", readings, err)
	}
}
