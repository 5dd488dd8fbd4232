package main

import (
	"context"
	"errors"

	"ipipd/tunnel"
)

// startTunnel has a process carry one tunnel.
func startTunnel(ctx context.Context, o tunnel.HostOptions, config tunnel.Config) (upTunnel, error) {
	host, err := tunnel.NewHost(o)
	if err != nil {
		return nil, err
	}
	t, err := host.Start(ctx, config)
	if err != nil {
		return nil, errors.Join(err, host.Close())
	}
	return &onlyTunnel{t, host}, nil
}

// onlyTunnel ends its host with itself.
type onlyTunnel struct {
	*tunnel.Tunnel
	host *tunnel.Host
}

func (t *onlyTunnel) Close() error { return t.host.Close() }
