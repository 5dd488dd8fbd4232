package main

import (
	"context"
	"errors"

	"ipipd/internal/confine"
	"ipipd/internal/tunnel"
)

// startTunnel has a process carry one tunnel, and have no more privileges than that
// takes.
func startTunnel(ctx context.Context, o tunnel.EngineOptions, config tunnel.Config) (upTunnel, error) {
	host, err := tunnel.NewEngine(o)
	if err != nil {
		return nil, err
	}
	t, err := host.Start(ctx, config)
	if err != nil {
		return nil, errors.Join(err, host.Close())
	}
	// Not before: the fast path's programs are loaded with all there is.
	if err := confine.Process(); err != nil && !errors.Is(err, errors.ErrUnsupported) {
		o.Log.Warn("this process keeps privileges that it has no use for", "err", err)
	}
	return &onlyTunnel{t, host}, nil
}

// onlyTunnel ends its host with itself.
type onlyTunnel struct {
	*tunnel.Tunnel
	host *tunnel.Engine
}

func (t *onlyTunnel) Close() error { return t.host.Close() }
