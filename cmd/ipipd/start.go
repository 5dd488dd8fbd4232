package main

import (
	"context"
	"errors"

	"ipipd/internal/confine"
	"ipipd/internal/tunnel"
)

// startTunnel starts an engine with one tunnel, then drops the privileges that the process
// no longer needs.
func startTunnel(ctx context.Context, o tunnel.EngineOptions, config tunnel.Config) (startedTunnel, error) {
	engine, err := tunnel.NewEngine(o)
	if err != nil {
		return nil, err
	}
	if err := engine.Apply(ctx, []tunnel.Config{config}); err != nil {
		var of *tunnel.TunnelError
		if errors.As(err, &of) { // there is only one
			err = of.Err
		}
		return nil, errors.Join(err, engine.Close())
	}
	t := engine.Tunnel(config.Name)
	if t == nil {
		return nil, errors.Join(errors.New("the tunnel has ended while it was started"), engine.Close())
	}
	// After Apply, which may need all capabilities to load the fast path's programs.
	if err := confine.Process(); err != nil && !errors.Is(err, errors.ErrUnsupported) {
		o.Log.Warn("cannot drop the privileges that this process does not need", "err", err)
	}
	return &singleTunnel{t, engine}, nil
}

// singleTunnel closes its engine with the tunnel.
type singleTunnel struct {
	*tunnel.Tunnel
	engine *tunnel.Engine
}

func (t *singleTunnel) Close() error { return t.engine.Close() }
