package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"ipipd/internal/capture"
	"ipipd/internal/config"
	"ipipd/internal/control"
	"ipipd/internal/terminal"
	"ipipd/internal/tunnel"
)

type captureOptions struct {
	processOptions
	streams  *streams
	Name     string
	Write    string
	Duration time.Duration
	Request  control.CaptureRequest
}

// captureTimeout bounds the wait for the beginning of a capture: a change of the tunnels that is under way comes first.
const captureTimeout = 10 * time.Second

// againTimeout is how long after a signal a second one is taken for the same: timeout(1) sends two.
const againTimeout = 2 * time.Second

func newCmdCapture(s *streams, runF func(context.Context, *captureOptions) error) *cobra.Command {
	o := &captureOptions{processOptions: config.DefaultProcess(), streams: s}
	c := &cobra.Command{
		Use:   "capture NAME",
		Short: "Write the packets of a tunnel, inner and outer, with the reason of each drop",
		Long: `capture writes a pcapng file: the inner packets of the tunnel and the outer ones, of
an encrypted tunnel the clear text and ESP, as two interfaces. A packet and what it
becomes have the same packet id; the comment of one that is dropped is the reason
and the remedy, as in ipipd print. It ends by SIGINT, --count, --duration, or with
the tunnel. By default it keeps the headers of each packet, and gives way to a
tunnel that needs all of a processor: what it did not keep is counted.`,
		Example: `  ipipd capture ipip1 -w ipip1.pcapng
  ipipd capture ipip1 -w ipip1.pcapng --snaplen 65535 --complete
  ipipd capture ipip1 --drops | tshark -r - -T fields -e _ws.col.Info -e frame.comment
  ssh host ipipd capture ipip1 | wireshark -k -i -`,
		Args: func(c *cobra.Command, args []string) error {
			switch len(args) {
			case 0:
				return usageErrorf("%s: no NAME given: want the name of a tunnel, as ipipd print shows it", c.CommandPath())
			case 1:
				return checkNames(c, args[0])
			}
			return usageErrorf("%s: unexpected argument %q: want one NAME", c.CommandPath(), args[1])
		},
		ValidArgsFunction: completeName(&o.processOptions),
		RunE: func(c *cobra.Command, args []string) error {
			o.Name = args[0]
			if err := o.check(); err != nil {
				return err
			}
			return runF(c.Context(), o)
		},
	}
	f := c.Flags()
	f.SortFlags = false
	f.StringVarP(&o.Write, "write", "w", "-", "the file, which is replaced, or - for standard output")
	f.Uint64VarP(&o.Request.Count, "count", "c", 0, "end after so many packets; 0 is never")
	f.DurationVar(&o.Duration, "duration", 0, "end after that time, 30s or 5m; 0 is never")
	f.IntVar(&o.Request.Snaplen, "snaplen", capture.DefaultSnaplen, fmt.Sprintf("bytes of each packet that are kept; %d is all", capture.MaxSnaplen))
	f.BoolVar(&o.Request.Complete, "complete", false, "keep every packet, even if that slows the tunnel")
	f.BoolVar(&o.Request.Drops, "drops", false, "only packets that are dropped")
	f.BoolVar(&o.Request.Inner, "inner", false, "only inner packets")
	f.BoolVar(&o.Request.Outer, "outer", false, "only outer packets")
	addProcessFlag(c, &o.processOptions, config.RuntimeDir)
	return c
}

// check checks the flags.
func (o *captureOptions) check() error {
	r := &o.Request
	switch {
	case r.Snaplen < 1 || r.Snaplen > capture.MaxSnaplen:
		return usageErrorf("--snaplen: %d is not accepted: want 1 to %d", r.Snaplen, capture.MaxSnaplen)
	case o.Duration < 0:
		return usageErrorf("--duration: %v is not accepted: want a time such as 30s", o.Duration)
	case r.Inner && r.Outer:
		return usageErrorf("--inner and --outer: want one of them, or neither for both kinds of packets")
	case o.Write == "":
		return usageErrorf("--write: no file given: want its name, or - for standard output")
	}
	return nil
}

func captureRun(ctx context.Context, o *captureOptions) error {
	out := o.streams.out
	stdout, _ := out.(*os.File)
	if o.Write == "-" && stdout != nil && terminal.Is(stdout, stdout) {
		return usageErrorf("ipipd capture: a capture is binary, and standard output is a terminal: want -w FILE, or | tshark -r -")
	}
	signal.Ignore(syscall.SIGPIPE) // a reader that closes the pipe ends the capture
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if o.Duration > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, o.Duration)
		defer cancel()
	}
	context.AfterFunc(ctx, func() { time.AfterFunc(againTimeout, stop) }) // another signal kills then
	watch := func(f *os.File) { go watchReader(f.Fd(), stop) }
	file := &lateFile{name: o.Write, opened: watch}
	if o.Write != "-" {
		out = file
	} else if stdout != nil {
		watch(stdout)
	}
	result, err := o.capture(ctx, out)
	switch {
	case errors.Is(err, syscall.EPIPE):
		return file.close(nil)
	case errors.Is(err, control.ErrCutOff):
		err = fmt.Errorf("%w: its process has ended, or was not read from for a minute; what there is of it can be read", control.ErrCutOff)
	case err == nil:
		fmt.Fprintln(o.streams.err, o.summary(result))
	}
	return file.close(err)
}

// capture requests the capture of the tunnel of that name, or of the one whose interface was renamed to it.
func (o *captureOptions) capture(ctx context.Context, out io.Writer) (control.CaptureResult, error) {
	o.Request.Name = tunnel.InterfaceName(o.Name)
	result, err := control.Capture(ctx, o.RuntimeDir, o.Request.Name, captureTimeout, o.Request, out)
	if errors.Is(err, control.ErrNotRunning) {
		if started := originalName(o.RuntimeDir, o.Name); started != "" {
			o.Request.Name = tunnel.InterfaceName(started)
			result, err = control.Capture(ctx, o.RuntimeDir, o.Request.Name, captureTimeout, o.Request, out)
		}
	}
	switch {
	case errors.Is(err, control.ErrNotRunning):
		return result, noSuchTunnel(o.RuntimeDir, o.Name)
	case errors.Is(err, control.ErrStarting):
		return result, fmt.Errorf("tunnel %s %w: try again", o.Name, err)
	}
	return result, controlError(err)
}

// summary returns the line that is printed at the end.
func (o *captureOptions) summary(r control.CaptureResult) string {
	packets := "packets"
	if r.Packets == 1 {
		packets = "packet"
	}
	text := fmt.Sprintf("%d %s captured, %d not written", r.Packets, packets, r.Missed)
	if r.Missed > 0 {
		text += ": see the comments of the statistics in the file; --complete, --snaplen 128 or --drops have fewer"
	}
	if r.Ended {
		text += "; the tunnel has ended, or its process"
	}
	return text
}

// lateFile is a file that the first Write creates, or replaces.
type lateFile struct {
	name   string
	file   *os.File
	opened func(*os.File)
}

func (f *lateFile) Write(p []byte) (int, error) {
	if f.file == nil {
		var err error
		if f.file, err = os.OpenFile(f.name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600); err != nil { // clear text is in it
			return 0, withRemedy(err, "give another -w")
		}
		if info, err := f.file.Stat(); err == nil && info.Mode().IsRegular() { // it may have existed, with another mode
			_ = f.file.Chmod(0o600) // not every file system has modes
		}
		f.opened(f.file)
	}
	return f.file.Write(p)
}

// close closes the file, if it is open. It returns err, joined with the error of that.
func (f *lateFile) close(err error) error {
	if f.file == nil {
		return err
	}
	return errors.Join(err, f.file.Close())
}

// watchReader calls gone when the read end of a pipe is closed. A write would only tell with the next packet,
// which may be long in coming.
func watchReader(fd uintptr, gone func()) {
	fds := []unix.PollFd{{Fd: int32(fd)}} // POLLERR is reported without being requested
	for {
		if _, err := unix.Poll(fds, -1); err != unix.EINTR {
			gone()
			return
		}
	}
}

// capture implements control.Handler.
func (p *process) capture(ctx context.Context, r control.CaptureRequest, w io.Writer) (result control.CaptureResult, err error) {
	if !p.ready.Load() {
		return result, control.ErrStarting
	}
	configs := p.wanted.Load().configs
	i := indexOf(configs, r.Name)
	if i < 0 {
		return result, control.ErrNotRunning
	}
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return result, control.ErrNotRunning
	}
	p.captures.Add(1)
	p.mu.Unlock()
	defer p.captures.Done()
	o := capture.Options{Count: r.Count, Snaplen: r.Snaplen, Drops: r.Drops, Complete: r.Complete, InnerOnly: r.Inner, OuterOnly: r.Outer}
	got, err := p.engine.Capture(ctx, configs[i].Name, o, versionLine(), w)
	if errors.Is(err, os.ErrNotExist) {
		err = &control.Refusal{Message: fmt.Sprintf("tunnel %s does not run: ipipd enable %s", configs[i].Name, configs[i].Name)}
	}
	ended := ctx.Err() == nil && (r.Count == 0 || got.Packets < r.Count)
	return control.CaptureResult{Packets: got.Packets, Missed: got.Missed, Ended: ended}, err
}

// captureEnd bounds waitCaptures.
const captureEnd = time.Second

// waitCaptures waits until the captures of tunnels that have ended have written the end of their file.
func (p *process) waitCaptures() {
	done := make(chan struct{})
	go func() {
		p.captures.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(captureEnd):
	}
}
