package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"ipipd/internal/config"
	"ipipd/internal/control"
	"ipipd/internal/peerconfig"
	"ipipd/internal/tunnel"
)

type peerConfigOptions struct {
	processOptions
	streams *streams
	Name    string
	System  string
	Paths   []string
	Remote  netip.Addr // of many remotes only this one; zero is all
	Show    bool
}

func newCmdPeerConfig(s *streams, runF func(context.Context, *peerConfigOptions) error) *cobra.Command {
	o := &peerConfigOptions{processOptions: config.DefaultProcess(), streams: s}
	c := &cobra.Command{
		Use:   "peer-config NAME --for SYSTEM",
		Short: "Print the configuration of a tunnel's other end",
		Long: `peer-config prints what the other end of a tunnel needs, for a tunnel that runs, or
one of --config: the outer addresses swapped, the inner address that belongs to this
end's, and what has to be the same at both ends. What is not known here, or cannot be
said there, is a comment in it. Of a tunnel whose remote-address is any it prints that
of each remote that peers names, or of --remote.`,
		Example: "  ipipd peer-config ipip1 --for mikrotik",
		Args: func(c *cobra.Command, args []string) error {
			switch {
			case len(args) == 0:
				return usageErrorf("%s: no NAME given: want the name of a tunnel, as ipipd print shows it", c.CommandPath())
			case len(args) > 1:
				return usageErrorf("%s: unexpected argument %q: want one NAME", c.CommandPath(), args[1])
			case o.System == "":
				return usageErrorf("--for: missing: want the other end's system: %s", systems)
			}
			return checkNames(c, args[0])
		},
		ValidArgsFunction: completeName(&o.processOptions),
		RunE: func(c *cobra.Command, args []string) error {
			o.Name = args[0]
			return runF(c.Context(), o)
		},
	}
	addFlag(c, "for", systems, "required", "the system of the other end", peerconfig.Systems, &flagValue{
		set: func(v string) error {
			if !slices.Contains(peerconfig.Systems, v) {
				return &tunnel.ValueError{Property: "for", Value: v, Want: systems}
			}
			o.System = v
			return nil
		},
		get: func() string { return o.System },
	})
	addFlag(c, "remote", "IPv4", "all", "of this one of many remotes only", nil, &flagValue{
		set: func(v string) (err error) {
			if o.Remote, err = netip.ParseAddr(v); err != nil || !o.Remote.Is4() {
				return &tunnel.ValueError{Property: "remote", Value: v, Want: "an IPv4 address"}
			}
			return nil
		},
		get: func() string { return "" },
	})
	c.Flags().StringArrayVar(&o.Paths, configFlag, nil, "of a tunnel in these files, as it does not run")
	c.Flags().BoolVar(&o.Show, "show-sensitive", false, "with the secret, which is a placeholder without")
	addProcessFlag(c, &o.processOptions, config.RuntimeDir)
	return c
}

const systems = "mikrotik, linux, networkd, cisco or ipipd"

func peerConfigRun(_ context.Context, o *peerConfigOptions) error {
	read := o.running
	if len(o.Paths) > 0 {
		read = o.configured
	}
	t, err := read()
	if err != nil {
		return err
	}
	t.ShowSecret, t.Only = o.Show, o.Remote
	var b bytes.Buffer
	if err := peerconfig.Write(&b, o.System, t); err != nil {
		return fmt.Errorf("%s: %w", o.Name, err)
	}
	if o.Show && len(t.Config.IPsec.Secret) > 0 {
		fmt.Fprintln(o.streams.err, "ipipd: "+outputHasSecrets)
	}
	_, err = o.streams.out.Write(b.Bytes())
	return err
}

// running returns the tunnel of that name that a process has, disabled ones included.
func (o *peerConfigOptions) running() (*peerconfig.Tunnel, error) {
	s, _, err := snapshot(o.RuntimeDir, []string{o.Name})
	if err != nil {
		return nil, err
	}
	t := &peerconfig.Tunnel{Config: s.Tunnels[0].Config}
	statuses, err := queryStatuses(o.RuntimeDir, t.Config.Name)
	if err != nil {
		return nil, err
	}
	if len(statuses) == 0 { // disabled, or ended meanwhile
		return t, nil
	}
	var status tunnel.Status
	if err := json.Unmarshal(statuses[0].text, &status); err != nil {
		return nil, err
	}
	t.Local, _ = netip.ParseAddr(status.CurrentLocalAddress)
	t.Remote, _ = netip.ParseAddr(status.CurrentRemoteAddress)
	t.MTU = status.ActualMTU
	if status.Remotes != nil {
		return t, remoteSources(t, o.RuntimeDir)
	}
	if known := t.Config.LocalAddress.IsValid() || t.Local.IsValid() && !t.Local.IsUnspecified(); !known && status.WaitingFor != "" {
		return nil, fmt.Errorf("%s: local-address: not known while the tunnel waits (%s), and the other end needs it: set it, or ask again when the tunnel has a path", o.Name, status.WaitingFor)
	}
	return t, nil
}

// remoteSources sets t.Locals, this end's outer address for each of many remotes, if it has not one for all.
func remoteSources(t *peerconfig.Tunnel, runtimeDir string) error {
	if t.Config.LocalAddress.IsValid() {
		return nil
	}
	var remotes *tunnel.Remotes
	err := control.Remotes(runtimeDir, tunnel.InterfaceName(t.Config.Name), answerTimeout, &remotes)
	if err != nil || remotes == nil {
		return err
	}
	t.Locals = map[netip.Addr]netip.Addr{}
	for _, r := range remotes.List {
		if a, err := netip.ParseAddr(r.Address); err == nil {
			t.Locals[a], _ = netip.ParseAddr(r.LocalAddress)
		}
	}
	return nil
}

// configured returns the tunnel of that name in the files of Paths.
func (o *peerConfigOptions) configured() (*peerconfig.Tunnel, error) {
	file, _, err := config.ReadOnce(o.Paths...)
	if err != nil {
		return nil, err
	}
	entries, err := file.Entries()
	if err != nil {
		return nil, err
	}
	for i := range entries {
		c := &entries[i].Config
		if c.Name == o.Name || tunnel.InterfaceName(c.Name) == o.Name {
			return &peerconfig.Tunnel{Config: *c}, nil
		}
	}
	return nil, usageErrorf("no tunnel named %s in %s: ipipd check --json lists those there are", o.Name, strings.Join(o.Paths, ", "))
}
