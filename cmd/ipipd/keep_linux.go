package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"ipipd/internal/config"
	"ipipd/internal/handover"
)

func init() {
	platformCommands = append(platformCommands, func(s *streams) *cobra.Command { return newCmdKeep(s, keepRun) })
}

type keepOptions struct {
	processOptions
	streams *streams
	// Command is the name of the program that is kept running, and its arguments.
	Command []string
}

func newCmdKeep(s *streams, runF func(context.Context, *keepOptions) error) *cobra.Command {
	o := &keepOptions{processOptions: config.DefaultProcess(), streams: s}
	c := &cobra.Command{
		Use:   "keep [FLAGS] -- COMMAND [ARGUMENT...]",
		Short: "Start ipipd up again when it dies, and with a new binary on SIGUSR2",
		Long: `keep is the parent of an ipipd up where no service manager is, such as the first
process of a container. It starts COMMAND again when that dies, and ends with it
when it ends of itself. SIGUSR2 has COMMAND end and starts what is found under
its name then, a new binary for one, unless that does not run or refuses the
configuration; if the binary of keep is another one, too, it is executed in the
place of this one before. Other signals are passed on. Of an ipipd up it does
what takes a capability, as far as the configuration says, which it reads itself,
so that the process keeps none.`,
		Example: "  ipipd keep -- ipipd up --config /etc/ipipd/ipipd.yaml",
		Args: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usageErrorf("%s: no command given: want %s -- ipipd up --config FILE", c.CommandPath(), c.CommandPath())
			}
			return nil
		},
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return nil, cobra.ShellCompDirectiveDefault
		},
		RunE: func(c *cobra.Command, args []string) error {
			o.Command = args
			return runF(c.Context(), o)
		},
	}
	c.Flags().SetInterspersed(false) // flags after COMMAND are COMMAND's own
	for _, p := range config.ProcessProperties() {
		if p.Name == "log-level" || p.Name == "log-format" {
			addProcessFlag(c, &o.processOptions, p)
		}
	}
	return c
}

func keepRun(_ context.Context, o *keepOptions) error {
	k := &keeper{
		log:     newLogger(&upOptions{processOptions: o.processOptions, streams: o.streams}),
		command: o.Command,
		signals: make(chan os.Signal, 16), children: make(chan os.Signal, 1),
	}
	if err := disableCoreDumps(); err != nil { // by /proc/PID/fd a process of the same user could open what it keeps
		k.log.Warn("other processes of this user can open what is kept", "err", err)
	}
	signal.Notify(k.signals, unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGUSR1, unix.SIGUSR2)
	signal.Notify(k.children, unix.SIGCHLD)
	defer signal.Stop(k.signals)
	defer signal.Stop(k.children)
	k.outer = newNotifier(k.log)
	k.outer.discard()
	if k.watchdog = k.outer.watchdog(); k.watchdog > 0 {
		k.beats = time.Tick(k.watchdog / beatsPerTimeout)
	}
	limit, err := keptLimit()
	if err != nil {
		return err
	}
	k.store, k.everReady, err = handover.ResumeKeeper(limit)
	defer k.store.Close()
	if k.everReady {
		k.log.Info("the keeper is replaced", "kept", k.store.Len())
	}
	if err != nil {
		k.log.Error("not all is taken that was kept: interfaces are made anew", "err", err)
	}
	if k.self, err = executable(); err != nil {
		return err
	}
	return k.run()
}

// executable returns the path by which the keeper was started.
func executable() (string, error) {
	if path, err := exec.LookPath(os.Args[0]); err == nil {
		return filepath.Abs(path)
	}
	return os.Executable()
}

// keptLimit returns how many descriptors may be kept: RLIMIT_NOFILE less the keeper's own and those of one message.
func keptLimit() (int, error) {
	const own, most = 32, 1 << 16
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0, os.NewSyscallError("getrlimit", err)
	}
	return max(0, int(min(limit.Cur, most))-own-handover.MaxRights), nil
}

const (
	// patience is how long the process has to end when it is to be replaced, and a new binary to show that it runs.
	patience = 10 * time.Second
	// A process that dies is started again at once, then after firstPause, and twice as long each
	// time, up to lastPause; from the beginning if it was ready for steady.
	firstPause, lastPause, steady = 100 * time.Millisecond, 10 * time.Second, time.Second
)

// lastPatience is how long the process has to end when the keeper is to end, less than the minute that service
// managers give the keeper. Tests set less.
var lastPatience = 50 * time.Second

// keeper is the parent of an ipipd up. One goroutine does all but receive what the process sends; it is
// locked to its thread: PR_SET_PDEATHSIG fires when the thread that forked ends.
type keeper struct {
	log      *slog.Logger
	command  []string
	store    *handover.Keeper
	broker   *brokered      // of the process; nil without one
	outer    *notifier      // tells the keeper's own service manager
	signals  chan os.Signal // to be passed on to the process
	children chan os.Signal // SIGCHLD
	self     string         // the path of the keeper's own binary
	renewed  bool           // there is another binary at self, to be executed

	watchdog time.Duration    // timeout of the manager's watchdog of the keeper, and the keeper's of the process; 0: none
	beats    <-chan time.Time // when to tell the manager that the keeper is alive
	silent   int              // beats since the process last said that it is alive; -1: it need not

	stopping, replacing bool
	ready               time.Time // when this process became ready; zero: not yet
	everReady           bool      // a process was ready once
	deaths              int       // in a row
}

// run returns when the process ends of itself, or is to end.
func (k *keeper) run() error {
	runtime.LockOSThread()
	for {
		if k.renewed {
			k.renew()
		}
		status, err := k.serve()
		cause := describe(status, err)
		switch {
		case err != nil && !k.everReady:
			return err
		case err != nil: // there is no such binary for the moment
		case k.stopping:
			return exited(status)
		case k.replacing:
			k.log.Info("the process is replaced", "cause", cause)
		case status.Exited() && status.ExitStatus() == 0:
			return nil
		case !k.everReady: // it would fail again: something is wrong with the command or its configuration
			if status.Signaled() { // else it has said why
				k.log.Error("the process has ended before it was ready", "cause", cause)
			}
			return exited(status)
		}
		pause := k.pause()
		if pause > 0 || err != nil {
			k.log.Warn("the process has died, and is started again", "cause", cause, "after", pause)
		} else if !k.replacing {
			k.log.Warn("the process has died, and is started again", "cause", cause)
		}
		k.replacing = false
		if k.wait(pause); k.stopping {
			return nil
		}
	}
}

// pause returns how long to wait before the next start.
func (k *keeper) pause() time.Duration {
	if k.replacing || !k.ready.IsZero() && time.Since(k.ready) >= steady {
		k.deaths = 0
	}
	if k.replacing {
		return 0
	}
	k.deaths++
	if k.deaths == 1 {
		return 0
	}
	return min(firstPause<<min(k.deaths-2, 10), lastPause)
}

// wait waits for a pause, or for a signal that ends it.
func (k *keeper) wait(pause time.Duration) {
	for over := time.After(pause); ; {
		select {
		case s := <-k.signals:
			k.stopping = k.stopping || ends(s)
			if s == unix.SIGUSR2 {
				if err := k.mayReplace(); err != nil {
					k.log.Warn("what is to be started does not run", "err", err)
				}
			}
			if ends(s) || s == unix.SIGUSR2 {
				return
			}
		case <-k.children:
			k.reap(0)
		case <-k.beats:
			k.beat(0)
		case <-over:
			return
		}
	}
}

// serve starts the process, waits for its end, and returns its wait status.
func (k *keeper) serve() (status unix.WaitStatus, err error) {
	k.ready, k.silent = time.Time{}, -1
	pid, err := k.start()
	if err != nil {
		return status, err
	}
	events := make(chan handover.Event)
	go k.receive(events)
	status = k.attend(pid, events)
	k.broker.end()
	k.store.Interrupt()
	for e := range events {
		k.note(e)
	}
	k.store.End()
	return status, nil
}

// start starts the program that is found under the command's name now, which may have been replaced.
func (k *keeper) start() (pid int, err error) {
	path, err := exec.LookPath(k.command[0])
	if err != nil {
		return 0, err
	}
	broker, peer := startBroker(k.log, k.command)
	fds, environment, err := k.store.Begin(peer)
	if err != nil {
		broker.end()
		return 0, err
	}
	files := []uintptr{0, 1, 2}
	for _, fd := range fds {
		files = append(files, uintptr(fd))
	}
	pid, err = syscall.ForkExec(path, k.command, &syscall.ProcAttr{
		Env:   slices.Concat(handover.Environment(os.Environ()), environment, handover.WatchdogEnvironment(k.watchdog)),
		Files: files,
		// A process group of its own, so that ^C reaches it once, by the keeper. When the keeper dies it gets SIGTERM.
		Sys: &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM},
	})
	_ = unix.Close(fds[0])
	if peer >= 0 {
		_ = unix.Close(peer)
	}
	if err != nil {
		broker.end()
		k.store.End()
		return 0, fmt.Errorf("start %s: %w", path, err)
	}
	k.broker = broker
	k.log.Info("the process is started", "pid", pid, "kept", k.store.Len())
	return pid, nil
}

// renew executes the keeper's new binary in place of this one. It returns only if that fails.
func (k *keeper) renew() {
	k.renewed = false
	variable, undo, err := k.store.Pass()
	if err == nil {
		// A signal before the new program has its handlers must not end it.
		passedOn := []os.Signal{unix.SIGHUP, unix.SIGUSR1, unix.SIGUSR2}
		signal.Ignore(passedOn...)
		err = syscall.Exec(k.self, os.Args, slices.Concat(os.Environ(), []string{variable}, k.outer.manager.Environment()))
		undo()
		signal.Notify(k.signals, passedOn...)
	}
	k.log.Warn("the keeper is not replaced", "path", k.self, "err", err)
}

// receive passes what the process sends to events, until the process has ended.
func (k *keeper) receive(events chan<- handover.Event) {
	defer close(events)
	for warned := false; ; {
		e, err := k.store.Receive()
		var refused *handover.RefusedError
		switch {
		case err == io.EOF:
			return
		case err != nil && !errors.As(err, &refused):
			k.log.Error("the process can have nothing kept any more", "err", err)
			return
		case err != nil && !warned: // once only: the process may send any number
			warned = true
			k.log.Warn("not all is kept that the process has sent", "err", err)
		}
		if e != (handover.Event{}) {
			events <- e
		}
	}
}

// attend serves the process until it ends, and returns its wait status.
func (k *keeper) attend(pid int, events <-chan handover.Event) unix.WaitStatus {
	var late <-chan time.Time
	var within time.Duration
	for {
		select {
		case s := <-k.signals:
			if ends(s) && !k.stopping {
				k.stopping, late, within = true, time.After(lastPatience), lastPatience
				k.outer.stopping()
			}
			if s == unix.SIGUSR2 && !k.replacing && !k.stopping {
				if err := k.mayReplace(); err != nil { // while the process is served
					k.log.Error("the process is not replaced, and goes on", "err", err)
					continue
				}
				k.replacing, late, within = true, time.After(patience), patience
			}
			_ = unix.Kill(pid, s.(unix.Signal))
		case <-late:
			k.log.Warn("the process is killed: it was to end, and has not", "after", within)
			_ = unix.Kill(pid, unix.SIGKILL)
		case <-k.beats:
			k.beat(pid)
		case <-k.children:
			if status, ended := k.reap(pid); ended {
				return status
			}
		case e, ok := <-events:
			if !ok {
				events = nil
				break
			}
			k.note(e)
		}
	}
}

// beat tells the keeper's manager that the keeper is alive. It kills a process that has not said so for the watchdog's
// timeout; the manager would kill the keeper, too, and lose all that is kept.
func (k *keeper) beat(pid int) {
	k.outer.send("WATCHDOG=1")
	if pid == 0 || k.silent < 0 || k.stopping || k.replacing {
		return
	}
	if k.silent++; k.silent > beatsPerTimeout {
		k.log.Error("the process is killed: it has not told its watchdog that it lives", "within", k.watchdog)
		_ = unix.Kill(pid, unix.SIGKILL)
		k.silent = -1
	}
}

// note records that the process is ready, alive or stopping, and passes its state on to the keeper's manager.
func (k *keeper) note(e handover.Event) {
	if e.Ready && k.ready.IsZero() {
		k.ready, k.everReady, k.silent = time.Now(), true, 0
	}
	switch {
	case e.Stopping:
		k.silent = -1
	case e.Alive && k.silent > 0:
		k.silent = 0
	}
	if e.State != "" {
		k.outer.send(e.State)
	}
}

// reap reaps all children that have ended; if the keeper is process 1, orphans of others, too. ended: pid was among
// them, with that status.
func (k *keeper) reap(pid int) (status unix.WaitStatus, ended bool) {
	for {
		var s unix.WaitStatus
		switch got, err := unix.Wait4(-1, &s, unix.WNOHANG, nil); {
		case err == unix.EINTR:
		case err != nil || got == 0:
			return status, ended
		case got == pid:
			status, ended = s, true
		}
	}
}

// ends reports whether a signal is to end the keeper, too.
func ends(s os.Signal) bool { return s == unix.SIGTERM || s == unix.SIGINT }

// exited returns the keeper's exit status for its process's: 128 + the signal's number if a signal killed it.
func exited(status unix.WaitStatus) error {
	switch {
	case status.Signaled():
		return statusError(128 + int(status.Signal()))
	case status.ExitStatus() == 0:
		return nil
	}
	return statusError(status.ExitStatus())
}

func describe(status unix.WaitStatus, err error) string {
	switch {
	case err != nil:
		return err.Error()
	case status.Signaled():
		return unix.SignalName(status.Signal())
	}
	return fmt.Sprintf("exit status %d", status.ExitStatus())
}
