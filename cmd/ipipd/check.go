package main

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/spf13/cobra"

	"ipipd/internal/config"
)

type checkOptions struct {
	streams *streams
	Paths   []string
	JSON    bool
}

func newCmdCheck(s *streams, runF func(context.Context, *checkOptions) error) *cobra.Command {
	o := &checkOptions{streams: s}
	c := &cobra.Command{
		Use:   "check FILE...",
		Short: "Say what is wrong with a configuration, with line and column, and start nothing",
		Long: `check reads the files, in YAML, JSON or RouterOS's export (*.rsc), as one
configuration, a folder as its *.yaml, *.yml, *.json and *.rsc in order of name, and
- as standard input. It prints how many tunnels each file has, or all errors on
standard error. With exit status 0 ipipd up takes the files; with --json they can be
read, which is less of an export without its secrets.`,
		Example: "  ipipd check /etc/ipipd/ipipd.yaml\n  ssh router /export show-sensitive | ipipd check -",
		Args: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usageErrorf("%s: no FILE given: want a configuration, such as /etc/ipipd/ipipd.yaml", c.CommandPath())
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			o.Paths = args
			return runF(c.Context(), o)
		},
	}
	c.Flags().BoolVar(&o.JSON, "json", false, "an array of the tunnels, each with the properties that the files set")
	return c
}

func checkRun(_ context.Context, o *checkOptions) error {
	file, _, err := config.ReadOnce(o.Paths...)
	if err != nil {
		return err
	}
	for _, note := range notes(file) {
		fmt.Fprintln(o.streams.err, note)
	}
	if o.JSON {
		for _, refused := range file.Refused {
			fmt.Fprintf(o.streams.err, "%v: ipipd up refuses this tunnel\n", refused)
		}
		text, err := json.MarshalIndent(file, "", "  ")
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(o.streams.out, "%s\n", text)
		return err
	}
	if len(file.Refused) > 0 {
		return file.Refused
	}
	for _, name := range file.Files {
		tunnels, disabled := 0, 0
		for i := range file.Tunnels {
			if t := &file.Tunnels[i]; t.Pos.File == name {
				tunnels++
				if file.Disabled(t) {
					disabled++
				}
			}
		}
		line := fmt.Sprintf("%s: %d tunnels", name, tunnels)
		if tunnels == 1 {
			line = name + ": 1 tunnel"
		}
		if disabled > 0 {
			line += fmt.Sprintf(", %d disabled", disabled)
		}
		if _, err := fmt.Fprintln(o.streams.out, line); err != nil {
			return err
		}
	}
	return nil
}
