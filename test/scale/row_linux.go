package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"time"

	"ipipd/internal/tunnel"
)

// underlay makes the interface that outer packets leave by, in this network namespace.
const underlay = `link set lo up
link add u0 type veth peer name u1
address add 192.0.2.1/24 dev u0
link set u0 up
link set u1 up
neighbour add 192.0.2.254 lladdr 02:00:00:00:00:01 dev u0 nud permanent
route add default via 192.0.2.254
`

// row measures one setting in this process, and prints the result.
func row(text string) error {
	var s setting
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		return err
	}
	ip := exec.Command("ip", "-batch", "-")
	ip.Stdin = strings.NewReader(underlay)
	if out, err := ip.CombinedOutput(); err != nil {
		return fmt.Errorf("ip: %w: %s", err, out)
	}
	configs, err := s.configs()
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError}))
	var r result
	began := time.Now()
	engine, err := tunnel.NewEngine(tunnel.EngineOptions{Log: log})
	if err != nil {
		return err
	}
	if err := engine.Apply(context.Background(), configs); err != nil {
		return err
	}
	r.Start = time.Since(began)
	for name, t := range engine.Tunnels() {
		if state := t.Status().FastPath; s.FastPath && state != "active" {
			return fmt.Errorf("%s has no fast path: %s", name, state)
		}
	}
	configs[0].DSCP = 46
	began = time.Now()
	if err := engine.Apply(context.Background(), configs); err != nil {
		return err
	}
	r.Change = time.Since(began)

	time.Sleep(s.Idle / 2) // the kernel and the tunnels settle
	before, err := measure()
	if err != nil {
		return err
	}
	time.Sleep(s.Idle)
	after, err := measure()
	if err != nil {
		return err
	}
	r.Resident, r.Threads = after.resident, after.threads
	r.Processor = (after.processor - before.processor).Seconds() / s.Idle.Seconds()
	r.Wakes = float64(after.wakes-before.wakes) / s.Idle.Seconds()

	began = time.Now()
	if err := engine.Close(); err != nil {
		return err
	}
	r.Close = time.Since(began)
	return json.NewEncoder(os.Stdout).Encode(r)
}

// configs returns the configurations of the tunnels, each with a remote of its own.
func (s *setting) configs() ([]tunnel.Config, error) {
	configs := make([]tunnel.Config, s.Tunnels)
	for i := range configs {
		c := tunnel.Default()
		third, fourth := byte(i>>8), byte(i)
		values := map[string]string{
			"name":            fmt.Sprintf("t%d", i),
			"remote-address":  netip.AddrFrom4([4]byte{198, 18, third, fourth}).String(),
			"local-address":   "192.0.2.1",
			"address":         netip.PrefixFrom(netip.AddrFrom4([4]byte{10, third, fourth, 1}), 30).String(),
			"keepalive":       s.Keepalive,
			"allow-fast-path": map[bool]string{true: "yes", false: "no"}[s.FastPath],
		}
		for _, p := range tunnel.Properties() {
			if value, ok := values[p.Name]; ok {
				if err := p.Set(&c, value); err != nil {
					return nil, err
				}
			}
		}
		configs[i] = c
	}
	return configs, nil
}
