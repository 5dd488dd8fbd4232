package main

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"ipipd/internal/capture"
	"ipipd/internal/config"
	"ipipd/internal/tunnel"
)

// Wireshark calls each program in its folder of extcaps for a list of interfaces, and to capture on one
// (extcap(4)): a link to ipipd there makes each tunnel one of them.

// extcapPrefix begins the names of interfaces, which must differ from those of other programs.
const extcapPrefix = "ipipd-"

type extcapOptions struct {
	captureOptions
	Interfaces, DLTs, Config, Capture bool
	Interface, FIFO                   string
}

// extcapArgs puts the command extcap before the arguments of Wireshark's calls, which name no command.
func extcapArgs(args []string) []string {
	if len(args) > 0 && strings.HasPrefix(args[0], "-") && slices.ContainsFunc(args, func(a string) bool { return strings.HasPrefix(a, "--extcap-") }) {
		return append([]string{"extcap"}, args...)
	}
	return args
}

func newCmdExtcap(s *streams, runF func(context.Context, *extcapOptions) error) *cobra.Command {
	o := &extcapOptions{captureOptions: captureOptions{processOptions: config.DefaultProcess(), streams: s}}
	c := &cobra.Command{
		Use:    "extcap",
		Short:  "Answer Wireshark, which calls ipipd by a link in its folder of extcaps",
		Hidden: true,
		Args:   cobra.ArbitraryArgs,
		// Newer versions of Wireshark may have others.
		FParseErrWhitelist: cobra.FParseErrWhitelist{UnknownFlags: true},
		RunE:               func(c *cobra.Command, _ []string) error { return runF(c.Context(), o) },
	}
	f := c.Flags()
	f.BoolVar(&o.Interfaces, "extcap-interfaces", false, "")
	f.BoolVar(&o.DLTs, "extcap-dlts", false, "")
	f.BoolVar(&o.Config, "extcap-config", false, "")
	f.BoolVar(&o.Capture, "capture", false, "")
	f.StringVar(&o.Interface, "extcap-interface", "", "")
	f.StringVar(&o.FIFO, "fifo", "", "")
	f.String("extcap-version", "", "")
	f.String("extcap-capture-filter", "", "")
	f.IntVar(&o.Request.Snaplen, "snaplen", capture.DefaultSnaplen, "")
	f.BoolVar(&o.Request.Complete, "complete", false, "")
	f.BoolVar(&o.Request.Drops, "drops", false, "")
	f.BoolVar(&o.Request.Inner, "inner", false, "")
	f.BoolVar(&o.Request.Outer, "outer", false, "")
	addProcessFlag(c, &o.processOptions, config.RuntimeDir)
	return c
}

func extcapRun(ctx context.Context, o *extcapOptions) error {
	out := o.streams.out
	switch {
	case o.Interfaces:
		fmt.Fprintf(out, "extcap {version=%s}{display=ipipd}\n", plainValue(versionString()))
		statuses, _ := queryStatuses(o.RuntimeDir, "") // none for a user who may not ask
		for i := range statuses {
			name := statuses[i].startedName()
			fmt.Fprintf(out, "interface {value=%s%s}{display=IP-in-IP tunnel %s}\n", extcapPrefix, tunnel.InterfaceName(name), plainValue(name))
		}
		return nil
	case o.DLTs:
		_, err := fmt.Fprintln(out, "dlt {number=228}{name=IPV4}{display=Raw IPv4}")
		return err
	case o.Config:
		_, err := fmt.Fprintf(out, `arg {number=0}{call=--drops}{display=Only packets that are dropped}{type=boolflag}
arg {number=1}{call=--inner}{display=Only inner packets}{type=boolflag}
arg {number=2}{call=--outer}{display=Only outer packets}{type=boolflag}
arg {number=3}{call=--snaplen}{display=Bytes of each packet}{type=integer}{range=1,%d}{default=%d}
arg {number=4}{call=--complete}{display=Every packet, even if that slows the tunnel}{type=boolflag}
`, capture.MaxSnaplen, capture.DefaultSnaplen)
		return err
	case !o.Capture: // --extcap-version alone, or a filter to be checked: there are none
		return nil
	}
	name, ok := strings.CutPrefix(o.Interface, extcapPrefix)
	if !ok || o.FIFO == "" {
		return usageErrorf("ipipd extcap: --capture wants --extcap-interface %sNAME and --fifo FILE", extcapPrefix)
	}
	o.Name, o.Write = name, o.FIFO
	if err := o.check(); err != nil {
		return err
	}
	return captureRun(ctx, &o.captureOptions)
}

// plainValue replaces the characters of a text that would end a value in extcap's output.
func plainValue(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == '{' || r == '}' {
			return '_'
		}
		return r
	}, s)
}
