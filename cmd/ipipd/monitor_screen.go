package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/internal/monitor"
	"ipipd/internal/terminal"
)

const (
	// escapeTimeout is how long after ESC the rest of a key's sequence may come.
	escapeTimeout = 50 * time.Millisecond
	// exitTimeout is how long the process waits at its end for a terminal that takes no output.
	exitTimeout = time.Second
)

// screenLoop shows a monitor.View on a terminal.
type screenLoop struct {
	o      *monitorOptions
	poller *poller
	model  *monitor.Model
	view   *monitor.View
	screen *terminal.Screen

	input   chan []byte // closed when the terminal is gone
	rounds  chan round
	polling bool
	shown   int // rounds that count for monitorOptions.Count
}

// round is the result of asking all processes.
type round struct {
	readings []monitor.Reading
	counts   bool   // it is a regular one, which counts for monitorOptions.Count
	page     string // link of the tunnel that detail is about
	detail   []string
	err      error
	panicked any
}

// screen shows the table until a key or a signal ends it. However it ends, the terminal is as it was.
func (o *monitorOptions) screen(ctx context.Context, out *os.File, p *poller, model *monitor.Model) (err error) {
	l := &screenLoop{
		o: o, poller: p, model: model,
		view: monitor.NewView(model, monitor.Options{
			Styles: true, Colours: os.Getenv("NO_COLOR") == "", Unicode: utf8Locale(os.Getenv),
		}),
		input: make(chan []byte), rounds: make(chan round, 1),
	}
	ending := make(chan os.Signal, 1)
	signal.Notify(ending, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	defer signal.Stop(ending)
	if l.screen, err = terminal.Open(os.Stdin, out); l.screen != nil {
		defer l.screen.Close()
	}
	if err != nil {
		return fmt.Errorf("cannot use the terminal: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-ending:
			cancel()
		case <-ctx.Done():
			return
		}
		time.Sleep(exitTimeout)
		go l.screen.Close() // its output may wait, too
		time.Sleep(exitTimeout)
		os.Exit(1)
	}()
	go l.read()
	if err := l.run(ctx); err != nil && !isGone(err) {
		return err
	}
	return nil
}

// read reads from the terminal, and sends what it reads to input.
func (l *screenLoop) read() {
	defer close(l.input)
	for {
		buffer := make([]byte, 256)
		n, err := os.Stdin.Read(buffer)
		if n > 0 {
			l.input <- buffer[:n]
		}
		if err != nil {
			return
		}
	}
}

// run shows the view until a key or ctx ends it. Its error is why the terminal cannot be used any more.
func (l *screenLoop) run(ctx context.Context) error {
	changed := make(chan os.Signal, 1)
	signal.Notify(changed, syscall.SIGWINCH)
	defer signal.Stop(changed)
	stopped, continued := make(chan os.Signal, 1), make(chan os.Signal, 1)
	signal.Notify(stopped, syscall.SIGTSTP)
	defer signal.Stop(stopped)
	signal.Notify(continued, syscall.SIGCONT)
	defer signal.Stop(continued)

	l.poller.wait = min(l.o.Interval/2, answerTimeout) // so that a process that hangs delays no round
	ticker := time.NewTicker(l.o.Interval)
	defer ticker.Stop()
	var typed []byte // the beginning of a key's sequence
	var flush <-chan time.Time
	l.poll(false) // for the detail of a page
	for {
		if err := l.draw(); err != nil {
			return err
		}
		var keys []monitor.Key
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-ticker.C:
			l.poll(true)
			continue
		case r := <-l.rounds:
			if done, err := l.take(r); done || err != nil {
				return err
			}
			continue
		case <-stopped:
			if err := l.suspend(false, stopped, continued); err != nil {
				return err
			}
		case <-continued: // it was stopped by SIGSTOP, which no process can handle
			if err := l.screen.Resume(); err != nil {
				return err
			}
		case text, ok := <-l.input:
			if !ok {
				return nil
			}
			var rest int
			typed = append(typed, text...)
			keys, rest = monitor.ParseKeys(typed, false)
			if typed, flush = typed[len(typed)-rest:], nil; rest > 0 {
				flush = time.After(escapeTimeout)
			}
		case <-flush:
			keys, _ = monitor.ParseKeys(typed, true)
			typed, flush = nil, nil
		}
		for _, key := range keys {
			page, _ := l.view.Page()
			switch l.view.Handle(key) {
			case monitor.Quit:
				return nil
			case monitor.Suspend:
				if err := l.suspend(true, stopped, continued); err != nil {
					return err
				}
			case monitor.Redraw:
				l.screen.Forget()
			}
			if next, _ := l.view.Page(); next != "" && next != page {
				l.poll(false) // so that the page's detail is there at once
			}
		}
	}
}

func (l *screenLoop) draw() error {
	width, height := l.screen.Size()
	return l.screen.Draw(l.view.Frame(time.Now(), width, height))
}

// poll begins a round, unless one is under way.
func (l *screenLoop) poll(counts bool) {
	if l.polling {
		return
	}
	l.polling = true
	page, answers := l.view.Page()
	go func() {
		r := round{counts: counts, page: page}
		defer func() {
			r.panicked = recover()
			l.rounds <- r
		}()
		if r.readings, r.err = l.poller.round(); r.err == nil && answers {
			r.detail = l.poller.detail(page, time.Now())
		}
	}()
}

// take takes a round into the model. It reports whether it was the last one.
func (l *screenLoop) take(r round) (done bool, err error) {
	l.polling = false
	if r.panicked != nil {
		panic(r.panicked)
	}
	if r.err != nil {
		return false, r.err
	}
	l.model.Update(time.Now(), r.readings)
	if page, _ := l.view.Page(); page == r.page && r.detail != nil {
		l.view.Detail = r.detail
	}
	if r.counts {
		l.shown++
	}
	return r.counts && l.shown == l.o.Count, nil
}

// suspend stops the process until it is continued, and with wholeJob its process group, which may have sudo in
// it, as the terminal's own Ctrl-Z would. It stops by SIGSTOP, since Go's handler of SIGTSTP stays for good once
// there was one. A session leader does not stop: no shell would continue it.
func (l *screenLoop) suspend(wholeJob bool, stopped, continued chan os.Signal) error {
	if session, err := unix.Getsid(0); err != nil || session == unix.Getpgrp() {
		l.screen.Forget()
		return nil
	}
	select {
	case <-continued:
	default:
	}
	if err := l.screen.Suspend(); err != nil {
		return err
	}
	if !wholeJob { // it may have been stopped by SIGTTOU already, and continued by its shell
		select {
		case <-continued:
			return l.screen.Resume()
		case <-time.After(20 * time.Millisecond):
		}
	}
	signal.Ignore(syscall.SIGTSTP)
	if wholeJob {
		_ = syscall.Kill(0, syscall.SIGTSTP)
	}
	if err := syscall.Kill(os.Getpid(), syscall.SIGSTOP); err != nil {
		return err
	}
	select {
	case <-continued:
	case <-time.After(time.Second): // SIGCONT has come before it was caught
	}
	signal.Notify(stopped, syscall.SIGTSTP)
	return l.screen.Resume()
}
