package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/internal/handover"
	"ipipd/test/netlab"
)

func init() { programs["keepchild"] = keepChild }

// keepChild stands in for ipipd up. Its first argument says what it does, the second is a word that it
// prints. It has the keeper keep a file with the PID of the first process, which found none.
func keepChild() {
	signals := make(chan os.Signal, 10)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGUSR1, unix.SIGUSR2)
	manager, kept, err := handover.Open()
	if err != nil {
		fmt.Println(err)
		os.Exit(9)
	}
	mode := os.Args[1]
	if status, err := strconv.Atoi(mode); err == nil {
		os.Exit(status)
	}
	first := strconv.Itoa(os.Getpid())
	if fds := kept.Take("first"); len(fds) > 0 {
		b := make([]byte, 20)
		n, _ := unix.Pread(fds[0], b, 0)
		first = string(b[:n])
	} else if fd, err := unix.MemfdCreate("first", 0); err == nil {
		_, _ = unix.Write(fd, []byte(first))
		_ = manager.Store("first", fd)
	}
	switch mode {
	case "kill":
		_ = unix.Kill(os.Getpid(), unix.SIGKILL)
	case "beat":
		go (&notifier{manager: manager, log: textLogger(&netlab.Buffer{})}).watch(context.Background(), func(time.Duration) error { return nil })
	case "orphan": // its child's child ends later, as an orphan that process 1 has to reap
		_ = exec.Command("sh", "-c", "(sleep 0.1) & ").Run()
	}
	_ = manager.Notify("READY=1\nSTATUS=serving")
	fmt.Printf("pid=%d first=%s %s\n", os.Getpid(), first, strings.Join(os.Args[2:], " "))
	switch mode {
	case "die":
		os.Exit(3)
	case "done":
		os.Exit(0)
	}
	for s := range signals {
		fmt.Println("got", s)
		switch {
		case s == unix.SIGTERM && mode == "status":
			os.Exit(5)
		case s == unix.SIGTERM, s == unix.SIGINT, s == unix.SIGUSR2 && mode != "deaf":
			os.Exit(0)
		}
	}
}

// kept is an ipipd keep, in a process group of its own.
type kept struct {
	t        *testing.T
	cmd      *exec.Cmd
	out, log netlab.Buffer
}

func startKept(t *testing.T, start func(*exec.Cmd) error, command ...string) *kept {
	t.Helper()
	k := &kept{t: t, cmd: exec.Command("ipipd", append([]string{"keep", "--"}, command...)...)}
	k.cmd.Stdout, k.cmd.Stderr = &k.out, &k.log
	k.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := start(k.cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if k.cmd.ProcessState == nil {
			_ = k.cmd.Process.Kill()
			_ = k.cmd.Wait()
		}
		if t.Failed() {
			t.Logf("output:\n%s\nlog:\n%s", &k.out, &k.log)
		}
	})
	return k
}

// started waits for the nth process, and returns its PID, that in the kept file, and its word.
func (k *kept) started(n int) (pid int, first, word string) {
	k.t.Helper()
	var all [][]string
	netlab.Eventually(k.t, "the next process is there", func() bool {
		all = regexp.MustCompile(`pid=(\d+) first=(\d+) (.*)\n`).FindAllStringSubmatch(k.out.String(), -1)
		return len(all) >= n
	})
	pid, _ = strconv.Atoi(all[n-1][1])
	return pid, all[n-1][2], all[n-1][3]
}

func (k *kept) prints(text string) {
	k.t.Helper()
	netlab.Eventually(k.t, text+" is printed", func() bool { return strings.Contains(k.out.String(), text) })
}

func (k *kept) logs(pattern string) {
	k.t.Helper()
	netlab.Eventually(k.t, pattern+" is logged", func() bool { return regexp.MustCompile(pattern).MatchString(k.log.String()) })
}

func (k *kept) signal(s os.Signal) { _ = k.cmd.Process.Signal(s) }

// ends waits for the end.
func (k *kept) ends(status int) {
	k.t.Helper()
	done := make(chan struct{})
	go func() { _ = k.cmd.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(netlab.Timeout()):
		_ = k.cmd.Process.Kill()
		<-done
		k.t.Fatal("the keeper does not end")
	}
	if got := k.cmd.ProcessState.ExitCode(); got != status {
		k.t.Errorf("exit status %d, want %d", got, status)
	}
}

// hastykeep is an ipipd keep that has no patience with a process that is to end.
func init() {
	programs["hastykeep"] = func() {
		lastPatience = 200 * time.Millisecond
		main()
	}
}

// A process that does not end is killed, and the keeper ends: all that it has kept is closed.
func TestKeeper_deaf(t *testing.T) {
	t.Parallel()
	k := startKept(t, func(cmd *exec.Cmd) (err error) {
		cmd.Args[0] = "hastykeep"
		cmd.Path, err = exec.LookPath("hastykeep")
		if err == nil {
			err = cmd.Start()
		}
		return err
	}, "keepchild", "serve")
	pid, _, _ := k.started(1)
	_ = unix.Kill(pid, unix.SIGSTOP)
	k.signal(unix.SIGTERM)
	k.ends(128 + 9)
	k.logs(`the process is killed: it was to end, and has not" after=200ms`)
}

// SIGUSR2 changes nothing if the binary that is there now does not run, or refuses the configuration.
func TestKeeper_notReplaced(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: network namespaces, /dev/net/tun and raw sockets")
	}
	t.Parallel()
	a, b := netlab.New(t), netlab.New(t)
	netlab.Veth(t, a, b, netlab.End{Name: "eth0", Address: "192.0.2.1/24"}, netlab.End{Name: "eth0", Address: "192.0.2.2/24"})
	dir := shortDir(t)
	program, file := filepath.Join(dir, "ipipd"), filepath.Join(dir, "ipipd.yaml")
	run := func(script string) {
		t.Helper()
		if err := os.WriteFile(program+".script", []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(program+".script", program); err != nil {
			t.Fatal(err)
		}
	}
	configure := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	const good, right = `exec ipipd "$@"`, "tunnels:\n- {name: near, remote-address: 192.0.2.2}\n"
	run(good)
	configure(right)
	k := startKept(t, func(cmd *exec.Cmd) (err error) { a.Do(func() { err = cmd.Start() }); return err },
		program, "up", "--config", file, "--runtime-dir", filepath.Join(dir, "run"))
	pid := awaitProcess(t, k, 1)
	for i, c := range []struct{ script, config, want string }{
		{"echo broken; exit 3", right, `version: exit status 3: .*broken`},
		{good, "tunnels:\n- {name: near, remote-address: nonsense!}\n", `check: exit status 2: .*remote-address`},
		{"[ $1 = version ] || exit 4", right, `check: exit status 4`},
		{"", right, "permission denied"},
	} {
		if run(c.script); c.script == "" {
			if err := os.Chmod(program, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		configure(c.config)
		k.signal(unix.SIGUSR2)
		netlab.Eventually(t, c.want+" is logged", func() bool {
			said := regexp.MustCompile(`level=ERROR msg="the process is not replaced, and goes on" err=(.*)\n`).FindAllStringSubmatch(k.log.String(), -1)
			return len(said) == i+1 && regexp.MustCompile(c.want).MatchString(said[i][1])
		})
		if err := unix.Kill(pid, 0); err != nil {
			t.Fatal(err)
		}
	}
	run(good)
	configure(right)
	k.signal(unix.SIGUSR2)
	if next := awaitProcess(t, k, 2); next == pid {
		t.Error("it is not replaced")
	}
	k.signal(unix.SIGTERM)
	k.ends(0)
}

// A new binary that does not end, and writes without end, takes no memory, and delays no signal that ends the keeper, which
// meanwhile tells its manager that it is alive; no process of it is left.
func TestKeeper_endlessTrial(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	program, file := filepath.Join(dir, "ipipd"), filepath.Join(dir, "pids")
	install := func(script string) {
		t.Helper()
		if err := os.WriteFile(program+".script", []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(program+".script", program); err != nil {
			t.Fatal(err)
		}
	}
	install("exec keepchild beat")
	m := netlab.NewServiceManager(t, 10)
	k := startKept(t, func(cmd *exec.Cmd) error {
		cmd.Env = append(os.Environ(), "WATCHDOG_USEC=3000000")
		m.Start(cmd)
		return nil
	}, program, "up", "--remote-address", "192.0.2.2")
	k.started(1)
	install("sleep 1000 >/dev/null & echo $! $$ >" + file + ".new; mv " + file + ".new " + file + "; exec yes")
	k.signal(unix.SIGUSR2)
	var sleep, yes int
	netlab.Eventually(t, "the trial has begun", func() bool {
		b, _ := os.ReadFile(file)
		n, _ := fmt.Sscan(string(b), &sleep, &yes)
		return n == 2
	})
	m.Forget()
	netlab.Eventually(t, "the keeper lives", func() bool { return m.Said("WATCHDOG=1") })
	const much = 256 << 20
	counted := regexp.MustCompile(`wchar: (\d+)`)
	netlab.Eventually(t, "the trial has written much, or is over", func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", yes))
		if err != nil {
			return true
		}
		n, _ := strconv.Atoi(counted.FindStringSubmatch(string(b))[1])
		return n >= much
	})
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", k.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	if peak, _ := strconv.Atoi(regexp.MustCompile(`VmHWM:\s*(\d+) kB`).FindStringSubmatch(string(b))[1]); peak<<10 >= much {
		t.Errorf("the keeper has had %d KiB", peak)
	}
	k.signal(unix.SIGTERM)
	k.ends(0)
	k.logs(`the process is not replaced, and goes on" err=".*/ipipd version: (the keeper is to end|it does not end within 10s): \\"y`)
	if state, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", sleep)); err == nil && !strings.Contains(string(state), ") Z ") {
		_ = unix.Kill(sleep, unix.SIGKILL)
		t.Error("what the trial has started is left")
	}
}

// A process that is killed is started again, and gets what it has had kept.
func TestKeeper_killed(t *testing.T) {
	t.Parallel()
	k := startKept(t, (*exec.Cmd).Start, "keepchild", "serve")
	one, first, _ := k.started(1)
	if first != strconv.Itoa(one) {
		t.Fatalf("%d has something of %s", one, first)
	}
	for n := 2; n < 5; n++ {
		before, _, _ := k.started(n - 1)
		_ = unix.Kill(before, unix.SIGKILL)
		if pid, got, _ := k.started(n); pid == before || got != first {
			t.Errorf("%d has what %s has stored, want %s", pid, got, first)
		}
	}
	k.logs(`level=WARN msg="the process has died, and is started again" cause=SIGKILL\n`)
	k.logs(`msg="the process is started" pid=\d+ kept=1\n`)
	k.signal(unix.SIGTERM)
	k.ends(0)
	k.prints("got terminated")
}

// Signals are passed on, once each, also those of a terminal, and the exit status is that of the
// process.
func TestKeeper_signals(t *testing.T) {
	t.Parallel()
	k := startKept(t, (*exec.Cmd).Start, "keepchild", "status")
	k.started(1)
	for s, name := range map[unix.Signal]string{unix.SIGHUP: "hangup", unix.SIGUSR1: "user defined signal 1"} {
		k.signal(s)
		k.prints("got " + name)
	}
	k.signal(unix.SIGTERM)
	k.ends(5)
	k = startKept(t, (*exec.Cmd).Start, "keepchild", "serve")
	k.started(1)
	_ = unix.Kill(-k.cmd.Process.Pid, unix.SIGINT) // ^C
	k.ends(0)
	if got := strings.Count(k.out.String(), "got interrupt"); got != 1 {
		t.Errorf("%d interrupts, want 1", got)
	}
}

// SIGUSR2 starts the binary that is there now, also if the process does not end when told to.
func TestKeeper_replaced(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"serve", "deaf"} {
		program := filepath.Join(t.TempDir(), "program")
		install := func(word string) {
			next := program + ".new"
			if err := os.WriteFile(next, []byte("#!/bin/sh\nexec keepchild "+mode+" "+word+"\n"), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(next, program); err != nil {
				t.Fatal(err)
			}
		}
		install("one")
		k := startKept(t, (*exec.Cmd).Start, program)
		_, first, word := k.started(1)
		if word != "one" {
			t.Fatal(word)
		}
		install("two")
		k.signal(unix.SIGUSR2)
		k.prints("got user defined signal 2")
		second, got, word := k.started(2)
		if word != "two" || got != first {
			t.Errorf("%s: %s with what %s has stored", mode, word, got)
		}
		if want := map[string]string{"serve": "exit status 0", "deaf": "SIGKILL"}[mode]; !strings.Contains(k.log.String(), want) {
			t.Errorf("%s: not ended by %s", mode, want)
		}
		// While the binary is missing the start is tried again, with few lines in the log.
		if err := os.Rename(program, program+".old"); err != nil {
			t.Fatal(err)
		}
		_ = unix.Kill(second, unix.SIGKILL)
		k.logs(`level=WARN msg="the process has died, and is started again" cause="exec: .*: no such file or directory" after=400ms`)
		install("three")
		if _, got, word := k.started(3); word != "three" || got != first {
			t.Errorf("%s: %s with what %s has stored", mode, word, got)
		}
		k.signal(unix.SIGTERM)
		k.ends(0)
	}
}

// SIGUSR2 executes the keeper's new binary, which goes on with what the one before has kept; a binary that does not run
// is not executed. The new keeper notifies its manager as the one before did.
func TestKeeper_renewed(t *testing.T) {
	t.Parallel()
	own, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(t.TempDir(), "ipipd")
	install(t, own, program)
	m := netlab.NewServiceManager(t, 10)
	k := startKept(t, func(cmd *exec.Cmd) error {
		cmd.Path, cmd.Env = program, append(os.Environ(), "PATH="+filepath.Dir(program)+":"+os.Getenv("PATH"), "WATCHDOG_USEC=600000")
		m.Start(cmd)
		return nil
	}, "keepchild", "beat")
	running := func() (s unix.Stat_t) {
		if err := unix.Stat(fmt.Sprintf("/proc/%d/exe", k.cmd.Process.Pid), &s); err != nil {
			t.Fatal(err)
		}
		return s
	}
	_, first, _ := k.started(1)
	before := running()
	k.signal(unix.SIGUSR2)
	if _, got, _ := k.started(2); got != first || running().Ino != before.Ino {
		t.Errorf("%s, want %s, by the same binary", got, first)
	}
	next := filepath.Join(t.TempDir(), "next")
	text, err := os.ReadFile(own)
	if err == nil {
		err = os.WriteFile(next, text, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	install(t, next, program)
	m.Forget()
	k.signal(unix.SIGUSR2)
	if _, got, _ := k.started(3); got != first || running().Ino == before.Ino {
		t.Errorf("%s, want %s, by another binary", got, first)
	}
	k.logs(`level=INFO msg="the keeper is replaced" kept=1\n`)
	for _, line := range []string{"READY=1", "WATCHDOG=1"} {
		netlab.Eventually(t, line+" is heard", func() bool { return m.Said(line) })
	}
	pid, _, _ := k.started(3)
	_ = unix.Kill(pid, unix.SIGKILL)
	if _, got, _ := k.started(4); got != first {
		t.Errorf("%s, want %s", got, first)
	}
	before = running()
	for _, broken := range []string{"#!/bin/sh\necho broken; exit 3\n", "\x7fELF"} {
		if err := os.WriteFile(program+".new", []byte(broken), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(program+".new", program); err != nil {
			t.Fatal(err)
		}
		n := strings.Count(k.log.String(), "the process is started")
		k.signal(unix.SIGUSR2)
		if _, got, _ := k.started(n + 1); got != first || running().Ino != before.Ino {
			t.Errorf("%s, want %s, by the same binary", got, first)
		}
	}
	k.logs(`the keeper is not replaced: its new binary does not run" err=".*/ipipd version: exit status 3: .*broken`)
	k.logs(`the keeper is not replaced: its new binary does not run" .* exec format error`)
	k.signal(unix.SIGTERM)
	k.ends(0)
}

// A process that has never been ready is not started again: a script sees its exit status.
func TestKeeper_neverReady(t *testing.T) {
	t.Parallel()
	for mode, status := range map[string]int{"7": 7, "0": 0, "kill": 128 + 9} {
		k := startKept(t, (*exec.Cmd).Start, "keepchild", mode)
		k.ends(status)
		if got := strings.Count(k.log.String(), "the process is started"); got != 1 {
			t.Errorf("%s: started %d times", mode, got)
		}
	}
	// Nor is one that was ready and ends of itself, as by ipipd down.
	k := startKept(t, (*exec.Cmd).Start, "keepchild", "done")
	k.ends(0)
	k.started(1)
}

// A process that dies again and again is started after longer and longer pauses; a signal ends a pause.
func TestKeeper_pause(t *testing.T) {
	t.Parallel()
	k := startKept(t, (*exec.Cmd).Start, "keepchild", "die")
	k.logs(`cause="exit status 3"\n(.*\n)*.*after=100ms\n(.*\n)*.*after=200ms\n(.*\n)*.*after=400ms\n(.*\n)*.*after=800ms\n`)
	k.signal(unix.SIGTERM)
	k.ends(0)
}

func TestKeeper_pauseLength(t *testing.T) {
	k := &keeper{}
	var total time.Duration
	for range 100 {
		p := k.pause()
		if p > lastPause || p < 0 {
			t.Fatal(p)
		}
		total += p
	}
	if total < 90*lastPause {
		t.Errorf("%v in 100 deaths", total)
	}
	k.ready = time.Now().Add(-steady)
	if p := k.pause(); p != 0 {
		t.Errorf("%v after it was ready for long", p)
	}
}

// A binary that is missing is looked for with pauses, also if the process before was ready for long.
func TestKeeper_noBinary(t *testing.T) {
	k := &keeper{command: []string{filepath.Join(t.TempDir(), "ipipd")}, ready: time.Now().Add(-lastPause)}
	for n := range 2 {
		if _, err := k.serve(); err == nil {
			t.Fatal("it is started")
		}
		if p := k.pause(); n > 0 && p == 0 {
			t.Error("there is no pause before the second start that fails, and so on")
		}
	}
}

// When its keeper dies the process ends as by SIGTERM: another keeper may start the next one.
func TestKeeper_dies(t *testing.T) {
	t.Parallel()
	k := startKept(t, (*exec.Cmd).Start, "keepchild", "serve")
	k.started(1)
	k.signal(unix.SIGKILL)
	k.prints("got terminated")
}

// The keeper's manager is told the process's state, but not that a process dies and is started again.
func TestKeeper_outer(t *testing.T) {
	t.Parallel()
	m := netlab.NewServiceManager(t, 10)
	k := startKept(t, func(cmd *exec.Cmd) error { m.Start(cmd); return nil }, "keepchild", "serve")
	first, _, _ := k.started(1)
	said := func(line string) { netlab.Eventually(t, line, func() bool { return m.Said(line) }) }
	said("READY=1")
	said("STATUS=serving")
	_ = unix.Kill(first, unix.SIGKILL)
	k.started(2)
	if m.Said("STOPPING=1") || len(m.Stored()) > 0 {
		t.Errorf("it stops, or stores %q", m.Stored())
	}
	k.signal(unix.SIGTERM)
	said("STOPPING=1")
	k.ends(0)
}

// A process that is stopped does not reset its watchdog: it is killed, and the next one gets what is kept. The keeper
// resets its own manager's watchdog meanwhile.
func TestKeeper_watchdog(t *testing.T) {
	t.Parallel()
	m := netlab.NewServiceManager(t, 10)
	k := startKept(t, func(cmd *exec.Cmd) error {
		cmd.Env = append(os.Environ(), "WATCHDOG_USEC=600000")
		m.Start(cmd)
		return nil
	}, "keepchild", "beat")
	one, first, _ := k.started(1)
	beats := func() {
		m.Forget()
		netlab.Eventually(t, "the keeper lives", func() bool { return m.Said("WATCHDOG=1") })
	}
	beats()
	_ = unix.Kill(one, unix.SIGSTOP)
	if two, got, _ := k.started(2); two == one || got != first {
		t.Errorf("%d has what %s has stored, want %s", two, got, first)
	}
	k.logs(`level=ERROR msg="the process is killed: it has not told its watchdog that it lives" within=600ms\n`)
	beats()
	k.signal(unix.SIGTERM)
	k.ends(0)
}

// A process that resets its watchdog is not killed, nor one that is not ready yet, is ending, or is to be replaced.
func TestKeeper_beat(t *testing.T) {
	process := exec.Command("sleep", "1000")
	if err := process.Start(); err != nil {
		t.Fatal(err)
	}
	pid := process.Process.Pid
	k := &keeper{log: textLogger(&netlab.Buffer{}), watchdog: time.Second, silent: -1}
	beat := func(times int) {
		t.Helper()
		for range times {
			k.beat(pid)
			if k.beat(0); k.silent > beatsPerTimeout {
				t.Fatal("it is killed")
			}
		}
	}
	beat(100) // it is not ready yet
	k.note(handover.Event{Ready: true})
	beat(beatsPerTimeout)
	k.note(handover.Event{Alive: true})
	beat(beatsPerTimeout)
	if k.silent != beatsPerTimeout {
		t.Fatalf("it is silent for %d beats", k.silent)
	}
	k.replacing = true
	beat(100)
	k.replacing, k.stopping = false, true
	beat(100)
	k.stopping = false
	silent := k.silent
	k.note(handover.Event{Stopping: true})
	beat(100)
	if k.note(handover.Event{Alive: true}); k.silent != -1 {
		t.Error("who ends has to live")
	}
	k.silent = silent
	if err := unix.Kill(pid, 0); err != nil {
		t.Fatal(err)
	}
	k.beat(pid)
	if err := process.Wait(); err == nil || process.ProcessState.Sys().(syscall.WaitStatus).Signal() != unix.SIGKILL {
		t.Errorf("it is not killed: %v", err)
	}
}

// As process 1 the keeper reaps orphans.
func TestKeeper_process1(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: a PID namespace")
	}
	if _, err := exec.LookPath("unshare"); err != nil {
		t.Skip("needs unshare (util-linux)")
	}
	t.Parallel()
	k := startKept(t, func(cmd *exec.Cmd) error {
		path, err := exec.LookPath("unshare")
		cmd.Args = append([]string{"unshare", "--pid", "--fork", "--kill-child", "--mount-proc"}, cmd.Args...)
		cmd.Path, cmd.Err = path, err
		return cmd.Start()
	}, "keepchild", "orphan")
	k.started(1)
	keeper := awaitChild(t, k.cmd.Process.Pid)
	child := awaitChild(t, keeper)
	_ = unix.Kill(child, unix.SIGKILL)
	if pid, first, _ := k.started(2); first == strconv.Itoa(pid) {
		t.Error("nothing was kept")
	}
	awaitChild(t, keeper)
	_ = unix.Kill(keeper, unix.SIGTERM)
	k.ends(0)
}

// awaitChild waits until a process has one child, zombies included.
func awaitChild(t *testing.T, pid int) (child int) {
	t.Helper()
	netlab.Eventually(t, "there is one child", func() bool {
		// Each thread has the children that it has forked, and the first thread the orphans.
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
		var all []string
		for _, task := range tasks {
			children, _ := os.ReadFile(task)
			all = append(all, strings.Fields(string(children))...)
		}
		if len(all) == 1 {
			child, _ = strconv.Atoi(all[0])
		}
		return len(all) == 1
	})
	return child
}
