// Bench compares ipipd with other tunnels, on this machine, in one run: socat, fastd, OpenVPN,
// wireguard-go, the kernel's VXLAN, and the bare link below them.
//
// Each round starts each tunnel between two network namespaces joined by a veth pair, measures
// it and ends it; the medians of the rounds are reported. The tunnels take turns, so that
// other load on the machine affects all of them. Only ratios within a run are meaningful.
//
// There are two underlays. A bare veth carries 64 KiB superpackets, which no cable does and
// which favours tunnels in the kernel. The segmenting underlay has no segmentation offload, and
// a receiver with GRO.
//
// It needs root. It ends its processes by their IDs and removes its namespaces, also when
// interrupted.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

type options struct {
	rounds     int
	duration   time.Duration
	congestion string
	ipipd      string
	older      string
	only       []string
	segment    []bool
	out        string
	readme     string
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	err := run(ctx, os.Args[1:])
	switch {
	case errors.Is(err, context.Canceled):
		fmt.Fprintln(os.Stderr, "bench: interrupted; everything it started is gone, and nothing was written")
		os.Exit(130)
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func parse(args []string) (*options, error) {
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	rounds := fs.Int("rounds", 3, "how often each tunnel is measured")
	seconds := fs.Int("seconds", 4, "length of each bulk measurement")
	congestion := fs.String("congestion", "cubic", "TCP congestion control: cubic is Linux's own default")
	ipipd := fs.String("ipipd", "./ipipd", "the binary to measure")
	older := fs.String("older", "", "another binary, measured in the same rounds")
	only := fs.String("only", "", "measure these, by comma: "+strings.Join(tunnelNames(), ","))
	underlay := fs.String("underlay", "both", "bare, segmenting or both")
	out := fs.String("out", "test/bench/results", "folder for peers.md, peers.svg and peers.csv")
	readme := fs.String("readme", "", "also put the tables between the bench marks of this file")
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	o := &options{rounds: *rounds, duration: time.Duration(*seconds) * time.Second, congestion: *congestion, ipipd: *ipipd, older: *older, out: *out, readme: *readme}
	switch *underlay {
	case "bare":
		o.segment = []bool{false}
	case "segmenting":
		o.segment = []bool{true}
	case "both":
		o.segment = []bool{false, true}
	default:
		return nil, fmt.Errorf("-underlay: %q is not accepted: want bare, segmenting or both", *underlay)
	}
	if *rounds < 1 || *seconds < 1 {
		return nil, errors.New("-rounds and -seconds: want 1 or more")
	}
	o.only = slices.DeleteFunc(tunnelNames(), func(name string) bool {
		return o.older == "" && strings.HasPrefix(name, "older")
	})
	if *only != "" {
		o.only = strings.Split(*only, ",")
	}
	for _, name := range o.only {
		if !slices.Contains(tunnelNames(), name) {
			return nil, fmt.Errorf("-only: %q is not accepted: want %s", name, strings.Join(tunnelNames(), ", "))
		}
	}
	return o, nil
}

func run(ctx context.Context, args []string) error {
	o, err := parse(args)
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("making network namespaces needs root: run it as root")
	}
	for _, path := range []*string{&o.ipipd, &o.older} {
		if *path == "" {
			continue
		}
		if *path, err = filepath.Abs(*path); err != nil {
			return err
		}
	}
	dir, err := os.MkdirTemp("", "ipipd-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)

	b := &bench{options: o, lab: newLab(dir), results: newResults()}
	// Deferred, to end the processes after a panic too.
	defer b.lab.down()
	if err := b.findPrograms(ctx); err != nil {
		return err
	}
	for round := range o.rounds {
		for _, segment := range o.segment {
			for _, t := range b.tunnels() {
				if err := b.measure(ctx, t, segment, round); err != nil {
					return err
				}
			}
		}
	}
	return b.write(ctx)
}

// bench is one run: its lab and the results so far.
type bench struct {
	*options
	lab     *lab
	tools   map[string]string // program → path; a missing program is not in it
	results *results
}

// tunnels returns the tunnels of -only, in the order of the table.
func (b *bench) tunnels() []tunnel {
	var ts []tunnel
	for _, t := range allTunnels {
		if slices.Contains(b.only, t.name) {
			ts = append(ts, t)
		}
	}
	return ts
}

// measure measures one tunnel in one round. A failure of the tunnel is recorded in the results;
// an error ends the run.
func (b *bench) measure(ctx context.Context, t tunnel, segment bool, round int) error {
	for _, program := range t.needs {
		if b.tools[program] == "" {
			why := program + " is not installed"
			switch program {
			case "ipipd":
				why = "no binary at " + b.ipipd + ": make build makes one"
			case "older":
				why = "no binary of -older " + b.older
			}
			b.results.skip(t, segment, why)
			return nil
		}
	}
	defer b.lab.down()
	if err := b.lab.up(ctx, segment); err != nil {
		return err
	}
	err := t.start(ctx, b)
	if err == nil {
		err = b.awaitPing(ctx)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		why := err.Error() + b.lab.exitErrors()
		b.results.skip(t, segment, why)
		fmt.Printf("round %d  %-10s  %-19s not measured: %s\n", round+1, underlayName(segment), t.name, why)
		return nil
	}
	s, problems := b.sample(ctx)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	for _, p := range problems {
		b.results.skip(t, segment, p)
	}
	b.results.add(t, segment, s)
	fmt.Printf("round %d  %-10s  %-19s %s\n", round+1, underlayName(segment), t.name, s)
	return nil
}

func underlayName(segment bool) string {
	if segment {
		return "segmenting"
	}
	return "bare"
}
