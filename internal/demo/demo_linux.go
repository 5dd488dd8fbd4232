package demo

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"ipipd/internal/lab"
	"ipipd/tun"
)

const (
	// MaxMany is the greatest number of remotes: the kernel's neighbour table holds about 1,000 for all namespaces.
	MaxMany = 400
	// MaxMesh is the greatest number of hosts of a mesh: each has a process.
	MaxMesh = 10
	// loss is the probability with which a lossy cable loses a packet.
	loss = 0.05
	// timeout bounds a whole Run.
	timeout = 2 * time.Minute

	tunnelName = "ipip1"
	wire       = "wire0"
)

// Options are what to show.
type Options struct {
	Many      int  // how many remotes of one interface to show; 0: not shown
	Mesh      int  // how many hosts to show that all have tunnels to each other; 0: not shown
	Encrypted bool // by ipsec-secret
	Lossy     bool // by cables that lose packets
	Out       io.Writer
}

// laboratory is what a Run has made so far.
type laboratory struct {
	Options
	dir    string // temporary files
	hosts  []*host
	cables []*lab.Lossy
}

// Run shows what o says, and removes all that it made. It fails if something does not work, or once ctx is done.
func Run(ctx context.Context, o Options) (err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("it was not done within %v", timeout))
	defer cancel()
	if err := checkHost(); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "ipipd-demo-")
	if err != nil {
		return err
	}
	l := &laboratory{Options: o, dir: dir}
	defer func() {
		if ended := l.end(); err == nil {
			err = ended
		}
		switch {
		case ctx.Err() == nil || err == nil:
		case errors.Is(context.Cause(ctx), context.Canceled):
			err = errors.New("interrupted: the hosts and their tunnels are gone")
		default:
			err = fmt.Errorf("%w: %w", context.Cause(ctx), err)
		}
		if err == nil {
			fmt.Fprintln(o.Out, "\nAll ends stopped; hosts, cables and interfaces are gone.")
		}
	}()
	switch {
	case o.Many > 0:
		return l.many(ctx)
	case o.Mesh > 0:
		return l.mesh(ctx)
	}
	return l.pair(ctx)
}

// ipipd returns the command that runs this program with args.
func ipipd(ctx context.Context, args ...string) *exec.Cmd {
	c := exec.CommandContext(ctx, "/proc/self/exe", args...) // also if its file is replaced meanwhile
	c.Args[0] = "ipipd"
	return c
}

// checkHost fails if network namespaces or TUN interfaces, which every laboratory needs, cannot be made.
func checkHost() error {
	namespace, err := lab.NewNamespace()
	if err != nil {
		return err
	}
	namespace.Close()
	err = tun.Probe()
	if f := tun.Missing(os.DirFS("/"), err); f != nil {
		return f
	}
	return err
}

// say prints text and a line end.
func (l *laboratory) say(format string, args ...any) { fmt.Fprintf(l.Out, format+"\n", args...) }

// add makes a host.
func (l *laboratory) add(name string) (*host, error) {
	namespace, err := lab.NewNamespace()
	if err != nil {
		return nil, err
	}
	h := &host{name: name, namespace: namespace, runtimeDir: filepath.Join(l.dir, name)}
	l.hosts = append(l.hosts, h)
	return h, nil
}

// join joins two ends with a cable, a lossy one if Lossy is set.
func (l *laboratory) join(a, b lab.End) error {
	if !l.Lossy {
		return lab.Veth(a, b)
	}
	cable, err := lab.JoinLossy(a, b, loss)
	if err == nil {
		l.cables = append(l.cables, cable)
	}
	return err
}

// cable says what joins the hosts.
func (l *laboratory) cable() string {
	if l.Lossy {
		return fmt.Sprintf("a cable that loses %.0f of 100 packets (this process carries them between TAP interfaces; no netem)", loss*100)
	}
	return "a cable"
}

// awaitReady waits until the tunnel of each host is ready. names are the tunnels' names, by host; without, tunnelName.
func (l *laboratory) awaitReady(ctx context.Context, names ...string) error {
	for _, h := range l.hosts {
		name := tunnelName
		if len(names) > 0 {
			name, names = names[0], names[1:]
		}
		if err := h.awaitReady(ctx, name); err != nil {
			return err
		}
	}
	return nil
}

// show runs a command of ipipd on a host, and prints its output, or of it the lines that keep returns.
func (l *laboratory) show(ctx context.Context, h *host, keep func([]string) []string, args ...string) error {
	l.say("\n%s$ ipipd %s", h.name, strings.Join(args, " "))
	var out, failed bytes.Buffer
	c := ipipd(ctx, append(args, "--runtime-dir", h.runtimeDir)...)
	c.Stdout, c.Stderr = &out, &failed
	if err := h.namespace.Start(c); err != nil {
		return err
	}
	if err := c.Wait(); err != nil {
		return fmt.Errorf("ipipd %s: %w: %s", args[0], err, strings.TrimSpace(failed.String()))
	}
	lines := strings.Split(strings.TrimRight(out.String(), "\n"), "\n")
	if keep != nil {
		lines = keep(lines)
	}
	l.say("%s", strings.Join(lines, "\n"))
	return nil
}

// state returns, of the lines of ipipd print about a tunnel, those after its settings.
func state(lines []string) []string {
	i := slices.IndexFunc(lines, func(line string) bool { return strings.HasPrefix(strings.TrimSpace(line), "actual-mtu:") })
	return append([]string{"…"}, lines[max(i, 0):]...)
}

// short returns the first and the last lines of a list.
func short(lines []string) []string {
	const first, last = 4, 2
	if len(lines) <= first+last+1 {
		return lines
	}
	return slices.Concat(lines[:first], []string{"…"}, lines[len(lines)-last:])
}

// encryption writes a secret's file, and returns the flags, or keys of a configuration, that encrypt a tunnel by it.
func (l *laboratory) encryption() (flags [][2]string, err error) {
	if !l.Encrypted {
		return nil, nil
	}
	file := filepath.Join(l.dir, "secret")
	return [][2]string{{"ipsec-secret-file", file}, {"ipsec-exchange", "ike2"}, {"ipsec-pfs-group", "ecp256"}}, os.WriteFile(file, []byte(rand.Text()+"\n"), 0o600)
}

// countLost prints how many packets the cables lost.
func (l *laboratory) countLost() {
	if !l.Lossy {
		return
	}
	var carried, lost int64
	for _, c := range l.cables {
		more, less := c.Counts()
		carried, lost = carried+more, lost+less
	}
	l.say("\nOf %d packets the cables lost %d.", carried+lost, lost)
}

// end stops the processes and removes all that was made. The error is that of the first process that did not end as
// it should.
func (l *laboratory) end() (err error) {
	for _, h := range l.hosts {
		h.signal()
	}
	for _, h := range l.hosts {
		err = cmp.Or(err, h.stop())
		h.namespace.Close()
	}
	for _, c := range l.cables {
		c.Close()
	}
	return cmp.Or(err, os.RemoveAll(l.dir))
}
