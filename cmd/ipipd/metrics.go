package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"ipipd/internal/control"
	"ipipd/internal/metrics"
	"ipipd/internal/page"
	"ipipd/internal/tunnel"
)

// reloads is what metrics say of the reloads of a process.
type reloads struct {
	failed atomic.Bool
	done   atomic.Int64 // time of the last that was done, or of the start, in nanoseconds since 1970
}

// note records how a reload, or the start, has ended.
func (r *reloads) note(err error) {
	r.failed.Store(err != nil)
	if err == nil {
		r.done.Store(time.Now().UnixNano())
	}
}

// undone records that the last reload was undone; done is the time of the last one before it.
func (r *reloads) undone(done int64) {
	r.failed.Store(true)
	r.done.Store(done)
}

// serveMetrics serves metrics, if that is wanted, until stopMetrics is called.
func (p *process) serveMetrics() error {
	address := p.options.MetricsAddress
	if address == "" {
		return nil
	}
	const another = "choose another --metrics-address"
	if file, ok := strings.CutPrefix(address, "unix:"); ok && control.Owns(p.options.RuntimeDir, file) {
		return fmt.Errorf("cannot serve metrics: %s would be taken for a tunnel's control socket: %s, without .sock or in another folder", file, another)
	}
	l, err := metrics.Listen(address)
	switch {
	case errors.Is(err, fs.ErrExist):
		return withRemedy(fmt.Errorf("cannot serve metrics: %w", err), "remove it", another)
	case errors.Is(err, syscall.ENOENT):
		return withRemedy(fmt.Errorf("cannot serve metrics: %w", err), "make the folder", another)
	case err != nil:
		return withRemedy(fmt.Errorf("cannot serve metrics: %w", err), another)
	}
	host, _ := os.Hostname() // only shown, and compared with
	shown := page.New(page.Options{Version: versionString(), Host: host, Compare: compareNames, Samples: func() *tunnel.Samples {
		if !p.ready.Load() {
			return nil
		}
		s := p.samples()
		return &s
	}})
	server := metrics.NewServer(metrics.Options{Version: versionString(), Snapshot: p.snapshot, Ready: p.startDone, Page: shown, Host: host})
	server.ErrorLog = slog.NewLogLogger(p.log.Handler(), slog.LevelDebug)
	p.log.Info("metrics are served", "metrics-address", metrics.ShownAddress(l))
	go func() {
		if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			p.log.Error("metrics are not served any more: start ipipd again", "err", err)
		}
	}()
	ctx, stop := context.WithCancel(context.Background())
	go shown.Run(ctx)
	p.stopMetrics = func() {
		stop()
		_ = server.Close()
		_ = l.Close() // Serve may not have begun
	}
	return nil
}

// startDone returns nil once the tunnels are started, and an error before.
func (p *process) startDone() error {
	if !p.ready.Load() {
		return errors.New("the tunnels are being started")
	}
	return nil
}

// snapshot returns what the metrics of a scrape are made of; nil before the tunnels are started. It does not
// wait for a reload.
func (p *process) snapshot() *metrics.Snapshot {
	if !p.ready.Load() {
		return nil
	}
	s := &metrics.Snapshot{
		Samples:      p.samples(),
		ReloadFailed: p.reloads.failed.Load(),
		ReloadedAt:   time.Unix(0, p.reloads.done.Load()),
	}
	if limit := p.options.MetricsRemotes; limit > 0 {
		running := p.engine.Tunnels()
		for i := range s.Tunnels {
			if one := &s.Tunnels[i]; one.Remotes != nil && running[one.Name] != nil {
				one.Remotes = running[one.Name].Remotes(limit)
			}
		}
	}
	if b := p.sandbox.Load(); b != nil {
		s.Sandbox = *b
	}
	return s
}

// samples returns the samples of all tunnels, of disabled ones, too. The caller has seen ready set. It does not wait
// for a reload.
func (p *process) samples() tunnel.Samples {
	samples := p.engine.Samples()
	runs := map[string]bool{}
	for i := range samples.Tunnels {
		runs[samples.Tunnels[i].Name] = true
	}
	configs := p.wanted.Load().configs
	for i := range configs {
		if !runs[configs[i].Name] {
			samples.Tunnels = append(samples.Tunnels, tunnel.NewSample(&configs[i]))
		}
	}
	return samples
}
