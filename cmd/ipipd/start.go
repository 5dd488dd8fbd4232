package main

import (
	"context"
	"io"
	"time"

	"ipipd/internal/capture"
	"ipipd/internal/tunnel"
)

// engine is the part of *tunnel.Engine that `up` uses.
type engine interface {
	Apply(context.Context, []tunnel.Config) error
	Diff([]tunnel.Config) ([]tunnel.Difference, error)
	// Tunnels returns the tunnels that run, by the names of their links: tunnel.InterfaceName of the
	// configured names.
	Tunnels() map[string]startedTunnel
	// Unresponsive returns the name of a tunnel whose control does nothing within that time, "" without one.
	Unresponsive(within time.Duration) string
	// Samples waits for nothing that tunnels begin or end by.
	Samples() tunnel.Samples
	Capture(ctx context.Context, name string, o capture.Options, program string, w io.Writer) (capture.Result, error)
	// Close removes the tunnels. It returns when the interfaces are gone.
	Close() error
	// Leave is Close, but that interfaces stay for the process that comes next.
	Leave() error
}

// startedTunnel is the part of *tunnel.Tunnel that `up` uses.
type startedTunnel interface {
	Status() tunnel.Status
	Remotes(limit int) *tunnel.Remotes
	// Done is closed when the tunnel has ended, by Close or a failure; Err returns that.
	Done() <-chan struct{}
	Err() error
	Close() error
}

// openEngine opens an engine that makes its tunnels in the kernel of this host.
func openEngine(o tunnel.EngineOptions) (engine, error) {
	e, err := tunnel.NewEngine(o)
	if err != nil {
		return nil, err
	}
	return &kernelEngine{e}, nil
}

type kernelEngine struct {
	*tunnel.Engine
}

func (e *kernelEngine) Tunnels() map[string]startedTunnel {
	started := map[string]startedTunnel{}
	for name, t := range e.Engine.Tunnels() {
		started[tunnel.InterfaceName(name)] = t
	}
	return started
}
