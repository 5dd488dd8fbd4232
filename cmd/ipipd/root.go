package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"ipipd/internal/config"
	"ipipd/internal/control"
)

// streams are standard output and standard error of a command.
type streams struct{ out, err io.Writer }

// run runs the program and returns its exit status.
func run(ctx context.Context, args []string, s *streams) int {
	return execute(ctx, newCmdRoot(s), extcapArgs(args), s)
}

func execute(ctx context.Context, root *cobra.Command, args []string, s *streams) int {
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	var wrong config.Errors
	var refused *control.Refusal
	var said statusError
	var several usageErrors
	switch {
	case errors.As(err, &said):
	case errors.As(err, &wrong), errors.As(err, &refused) && refused.Input: // a line each, as editors read them
		for line := range strings.Lines(err.Error()) {
			fmt.Fprintln(s.err, oneLine(errors.New(line)))
		}
	case errors.As(err, &several):
		for _, one := range several {
			report(root, s, one)
		}
	case err != nil:
		report(root, s, err)
	}
	return exitStatus(err)
}

// report prints an error on one line.
func report(root *cobra.Command, s *streams, err error) {
	line := oneLine(err)
	if !strings.HasPrefix(line, root.Name()) { // some errors start with the command's path
		line = root.Name() + ": " + line
	}
	fmt.Fprintln(s.err, line)
}

func newCmdRoot(s *streams) *cobra.Command {
	root := &cobra.Command{
		Use:   "ipipd",
		Short: "IP-in-IP (RFC 2003) tunnels without a kernel module",
		Long: `ipipd brings up IP-in-IP tunnels (RFC 2003, protocol 4) in user space, with the
properties of RouterOS's /interface ipip and under their names.

  ipipd up --local-address 192.0.2.1 --remote-address 198.51.100.1 --name ipip1 --address 10.255.0.1/30

Exit status: 0 done, 1 it failed, 2 the command line or a
configuration was wrong.`,
		Version:       versionLine(),
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.ArbitraryArgs,
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) > 0 {
				return unknownCommand(c, args[0])
			}
			return c.Help()
		},
	}
	root.SetOut(s.out)
	root.SetErr(s.err)
	root.SetFlagErrorFunc(flagError)
	root.SetVersionTemplate("{{.Version}}\n")
	root.Flags().Bool("version", false, "say which ipipd this is") // cobra's own would take -v
	root.SetUsageTemplate(strings.ReplaceAll(root.UsageTemplate(), ".FlagUsages ", ".FlagUsagesWrapped 100 "))
	root.AddCommand(newCmdUp(s, upRun), newCmdPrint(s, printRun), newCmdMonitor(s, monitorRun), newCmdDown(s, downRun),
		newCmdSet(s, changeRun), newCmdAdd(s, changeRun), newCmdRemove(s, changeRun), newCmdEnable(s, changeRun), newCmdDisable(s, changeRun),
		newCmdReload(s, reloadRun), newCmdConfirm(s, confirmRun), newCmdDiff(s, diffRun), newCmdCheck(s, checkRun),
		newCmdExport(s, exportRun), newCmdPeerConfig(s, peerConfigRun), newCmdCapture(s, captureRun), newCmdExtcap(s, extcapRun),
		newCmdSchema(s), newCmdVersion(s), newTopicProperties())
	for _, more := range platformCommands {
		root.AddCommand(more(s))
	}
	root.SetHelpCommand(newCmdHelp())
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd("completion") // now, and not in Execute, so that unifyArgErrors covers it
	unifyArgErrors(root)
	return root
}

// platformCommands are the commands that only some systems have.
var platformCommands []func(*streams) *cobra.Command

// newCmdHelp replaces cobra's help command, which accepts unknown commands.
func newCmdHelp() *cobra.Command {
	return &cobra.Command{
		Use:               "help [COMMAND | properties | PROPERTY]",
		Short:             "Say how a command is used, or what properties there are, or one of them",
		ValidArgsFunction: cobra.NoFileCompletions,
		Args:              cobra.ArbitraryArgs,
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) == 1 {
				if text := propertyHelp(args[0]); text != "" {
					_, err := io.WriteString(c.OutOrStdout(), text)
					return err
				}
			}
			about, rest, err := c.Root().Find(args)
			if err != nil || len(rest) > 0 {
				return unknownCommand(c.Root(), strings.Join(args, " "))
			}
			about.InitDefaultHelpFlag()
			return about.Help()
		},
	}
}

// unifyArgErrors makes wrong arguments of c and its subcommands, those of cobra included,
// usage errors.
func unifyArgErrors(c *cobra.Command) {
	if args := c.Args; args != nil {
		c.Args = func(c *cobra.Command, given []string) error {
			if err := args(c, given); err != nil {
				return asUsage(err)
			}
			return nil
		}
	}
	if !c.Runnable() && c.HasSubCommands() { // `completion`, whose shells are subcommands
		c.Args = cobra.ArbitraryArgs
		c.RunE = func(c *cobra.Command, args []string) error {
			if len(args) > 0 {
				return unknownCommand(c, args[0])
			}
			return c.Help()
		}
	}
	for _, sub := range c.Commands() {
		unifyArgErrors(sub)
	}
}

// unknownCommand returns a usage error that lists the commands.
func unknownCommand(c *cobra.Command, given string) error {
	var names []string
	for _, sub := range c.Commands() {
		if sub.IsAvailableCommand() {
			names = append(names, sub.Name())
		}
	}
	return usageErrorf("%s: %q is not a command: want %s", c.CommandPath(), given, strings.Join(names, ", "))
}

// noArguments is the Args of commands that take only flags.
func noArguments(c *cobra.Command, args []string) error {
	if len(args) > 0 && c.Flags().Lookup("config") != nil {
		return usageErrorf("%s: unexpected argument %q: want only flags, each --name value or --name=value; a configuration is --config FILE", c.CommandPath(), args[0])
	}
	if len(args) > 0 {
		return usageErrorf("%s: unexpected argument %q: want only flags, each --name value or --name=value", c.CommandPath(), args[0])
	}
	return nil
}
