package main

import (
	"context"
	"fmt"
	"os/signal"
	"strconv"
	"syscall"

	"github.com/spf13/cobra"

	"ipipd/internal/demo"
	"ipipd/internal/tunnel"
)

func init() { platformCommands = append(platformCommands, newCmdDemo) }

func newCmdDemo(s *streams) *cobra.Command {
	o := &demo.Options{Out: s.out}
	c := &cobra.Command{
		Use:   "demo",
		Short: "Show a tunnel at work between two hosts made for it, and clean up",
		Long: `demo makes two hosts out of network namespaces, brings up one end of a tunnel in
each, pings through it, shows a packet as it is on the wire, how fast it goes, and what
print says. Nothing of this host's network is touched, and nothing is left behind. It
needs root.

--many and --mesh are other laboratories: one interface with many remotes, and hosts that each
have all others as remotes. --encrypted and --lossy go with each of the three. Packets are
lost in this process, which is the cable then: it takes no netem.`,
		Example: `  ipipd demo
  ipipd demo --many 100 --encrypted
  ipipd demo --mesh 5 --lossy`,
		Args:              noArguments,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(c *cobra.Command, _ []string) error {
			if o.Many > 0 && o.Mesh > 0 {
				return usageErrorf("%s: --many and --mesh are two laboratories: want one of them", c.CommandPath())
			}
			return demoRun(c.Context(), o)
		},
	}
	addCountFlag(c, &o.Many, "many", "one interface with so many remotes", 1, demo.MaxMany)
	addCountFlag(c, &o.Mesh, "mesh", "so many hosts, each with a tunnel to each other", 2, demo.MaxMesh)
	c.Flags().BoolVar(&o.Encrypted, "encrypted", false, "with ipsec-secret: IKE and ESP")
	c.Flags().BoolVar(&o.Lossy, "lossy", false, "the cables lose 5 of 100 packets in each direction")
	return c
}

// addCountFlag adds a flag that takes a number within limits.
func addCountFlag(c *cobra.Command, n *int, name, help string, least, most int) {
	want := fmt.Sprintf("a number of %d to %d", least, most)
	addFlag(c, name, want, "none", help, nil, &flagValue{
		set: func(v string) error {
			i, err := strconv.Atoi(v)
			if err != nil || i < least || i > most {
				return &tunnel.ValueError{Property: name, Value: v, Want: want}
			}
			*n = i
			return nil
		},
		get: func() string { return strconv.Itoa(*n) },
	})
}

func demoRun(ctx context.Context, o *demo.Options) error {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	return demo.Run(ctx, *o)
}
