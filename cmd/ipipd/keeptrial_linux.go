package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/internal/config"
	"ipipd/internal/handover"
)

// mayReplace fails if the program that is found under the command's name now does not run, or refuses the configuration:
// then the present process goes on. It sets renewed. A signal that ends the keeper ends the trial, too; signals that
// come meanwhile are put back for the caller.
func (k *keeper) mayReplace() error {
	limited, cancel := context.WithTimeoutCause(context.Background(), patience, fmt.Errorf("it does not end within %v", patience))
	defer cancel()
	ctx, end := context.WithCancelCause(limited)
	defer end(nil)
	tried := make(chan error, 1)
	go func() { tried <- k.tryNext(ctx) }()
	var came []os.Signal
	for {
		select {
		case err := <-tried: // until then nobody else waits for children
			for _, s := range came {
				select {
				case k.signals <- s:
				default: // the channel is full
				}
			}
			return err
		case s := <-k.signals:
			if came = append(came, s); ends(s) {
				end(errors.New("the keeper is to end"))
			}
		case <-k.beats:
			k.beat(0)
		}
	}
}

func (k *keeper) tryNext(ctx context.Context) error {
	path, err := exec.LookPath(k.command[0])
	if err != nil {
		return err
	}
	if o := upOptionsOf(k.command); o != nil {
		if err := try(ctx, path, "version"); err != nil {
			return err
		}
		if len(o.Paths) > 0 && !slices.Contains(o.Paths, config.Stdin) {
			if err := try(ctx, path, append([]string{"check", "--"}, o.Paths...)...); err != nil {
				return err
			}
		}
	}
	k.renewed = k.isNew(ctx)
	return nil
}

// try runs a command that is to end at once. When ctx ends it kills the command and what that has started.
func try(ctx context.Context, path string, args ...string) error {
	c := exec.CommandContext(ctx, path, args...)
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	c.Cancel = func() error { return unix.Kill(-c.Process.Pid, unix.SIGKILL) }
	c.WaitDelay = time.Second // for what has left its process group
	c.Env = handover.Environment(os.Environ())
	var out firstBytes
	c.Stdout, c.Stderr = &out, &out
	err := c.Run()
	if err != nil {
		err = fmt.Errorf("%s %s: %w: %q", path, args[0], cmp.Or(context.Cause(ctx), err), out)
	}
	return err
}

// firstBytes keeps the first bytes that are written, and discards the others, of which there may be any number.
type firstBytes []byte

func (f *firstBytes) Write(b []byte) (int, error) {
	const most = 500
	*f = append(*f, b[:min(len(b), most-len(*f))]...)
	return len(b), nil
}

// isNew reports whether there is another binary than the running one at the keeper's path, and it runs.
func (k *keeper) isNew(ctx context.Context) bool {
	var running, next unix.Stat_t
	if unix.Stat("/proc/self/exe", &running) == nil && unix.Stat(k.self, &next) == nil &&
		running.Dev == next.Dev && running.Ino == next.Ino {
		return false
	}
	// A binary that execve(2) accepts may still not run: then all that is kept would be lost.
	if err := try(ctx, k.self, "version"); err != nil {
		k.log.Warn("the keeper is not replaced: its new binary does not run", "err", err)
		return false
	}
	return true
}
