package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// The hosts' outer addresses, on the veth pair, and inner ones, in the tunnel.
var (
	outerAddress = map[string]string{"a": "192.0.2.1", "b": "192.0.2.2"}
	innerAddress = map[string]string{"a": "10.255.0.1", "b": "10.255.0.2"}
	otherSide    = map[string]string{"a": "b", "b": "a"}
	sides        = []string{"a", "b"}
)

// lab is two hosts joined by a veth pair:
//
//	a: veth0 192.0.2.1/24 ─── veth pair, MTU 1500 ─── b: veth0 192.0.2.2/24
//
// The namespaces' names have this process's ID, so that two runs do not collide. Every
// process of a tunnel is a child of this one; down ends only those.
type lab struct {
	prefix string
	dir    string // logs, keys and sockets of the current tunnel
	procs  []*process
	isUp   bool
}

type process struct {
	cmd  *exec.Cmd
	log  string
	done chan struct{} // closed on exit
}

func newLab(dir string) *lab {
	return &lab{prefix: fmt.Sprintf("ipipd-bench-%d-", os.Getpid()), dir: dir}
}

func (l *lab) ns(side string) string { return l.prefix + side }

// up creates the two hosts. With segment, their link has no segmentation offload, and GRO.
func (l *lab) up(ctx context.Context, segment bool) error {
	l.isUp = true
	for _, side := range sides {
		if err := command(ctx, "ip", "netns", "add", l.ns(side)); err != nil {
			return err
		}
	}
	if err := command(ctx, "ip", "link", "add", "veth0", "netns", l.ns("a"), "type", "veth", "peer", "name", "veth0", "netns", l.ns("b")); err != nil {
		return err
	}
	for _, side := range sides {
		for _, args := range [][]string{
			{"addr", "add", outerAddress[side] + "/24", "dev", "veth0"},
			{"link", "set", "lo", "up"},
			{"link", "set", "veth0", "up"},
		} {
			if err := l.ip(ctx, side, args...); err != nil {
				return err
			}
		}
		if !segment {
			continue
		}
		if err := l.run(ctx, side, "ethtool", "-K", "veth0", "tso", "off", "gso", "off", "gro", "on"); err != nil {
			return err
		}
		// Older kernels do not have this offload.
		_ = l.run(ctx, side, "ethtool", "-K", "veth0", "tx-udp-segmentation", "off")
	}
	return nil
}

// down ends the processes, by their IDs, and removes the hosts. It is idempotent.
func (l *lab) down() {
	for _, p := range l.procs {
		p.end()
	}
	l.procs = nil
	if !l.isUp {
		return
	}
	l.isUp = false
	for _, side := range sides {
		// Not with the run's context: this has to work after an interrupt too.
		_ = exec.Command("ip", "netns", "del", l.ns(side)).Run()
	}
}

// end sends SIGTERM, so that a tunnel can remove its interface, and SIGKILL after 2 s.
func (p *process) end() {
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(2 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// spawn starts a program on a host and leaves it running until down.
func (l *lab) spawn(side string, env []string, name string, args ...string) error {
	log := filepath.Join(l.dir, fmt.Sprintf("%s.%s.log", filepath.Base(name), side))
	file, err := os.Create(log)
	if err != nil {
		return err
	}
	defer file.Close()
	// ip netns exec becomes the program, so the process ID is the program's.
	cmd := exec.Command("ip", append([]string{"netns", "exec", l.ns(side), name}, args...)...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdout, cmd.Stderr = file, file
	// A process group of its own: Ctrl-C at the terminal must reach this process only, which
	// ends the others in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	p := &process{cmd: cmd, log: log, done: make(chan struct{})}
	go func() {
		_ = cmd.Wait() // its log has the reason
		close(p.done)
	}()
	l.procs = append(l.procs, p)
	return nil
}

// run runs a program on a host and waits for it.
func (l *lab) run(ctx context.Context, side, name string, args ...string) error {
	_, err := l.output(ctx, side, name, args...)
	return err
}

// output is run, and returns the standard output. An error has the last line of both outputs.
func (l *lab) output(ctx context.Context, side, name string, args ...string) ([]byte, error) {
	return output(ctx, "ip", append([]string{"netns", "exec", l.ns(side), name}, args...)...)
}

// ip runs the ip command on a host.
func (l *lab) ip(ctx context.Context, side string, args ...string) error {
	return command(ctx, "ip", append([]string{"-n", l.ns(side)}, args...)...)
}

// exitErrors returns the last log line of each process that has exited unexpectedly.
func (l *lab) exitErrors() string {
	var text string
	for _, p := range l.procs {
		if !p.ended() {
			continue
		}
		log, err := os.ReadFile(p.log)
		if err != nil {
			continue
		}
		text += "; " + filepath.Base(p.log) + ": " + lastLine(log)
	}
	return text
}

func command(ctx context.Context, name string, args ...string) error {
	_, err := output(ctx, name, args...)
	return err
}

func output(ctx context.Context, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	err := cmd.Run()
	if ctx.Err() != nil {
		return stdout.Bytes(), ctx.Err()
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = fmt.Errorf("%s %s: %s", name, strings.Join(args, " "), lastLine(append(stdout.Bytes(), stderr.Bytes()...)))
	}
	return stdout.Bytes(), err
}

func lastLine(text []byte) string {
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return lines[len(lines)-1]
}

// wait is time.Sleep with a context.
func wait(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
