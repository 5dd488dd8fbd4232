package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"syscall"
	"time"
	"unicode"

	"github.com/spf13/cobra"

	"ipipd/internal/config"
	"ipipd/internal/control"
	"ipipd/internal/tunnel"
)

// answerTimeout bounds the answer of a tunnel's process, downTimeout the removal of the
// tunnel. down prints what it waits for after progressAfter, then every progressEvery.
const (
	answerTimeout = 2 * time.Second
	downTimeout   = 60 * time.Second
	progressAfter = 3 * time.Second
	progressEvery = 10 * time.Second
)

type downOptions struct {
	processOptions
	streams *streams
	Names   []string
}

func newCmdDown(s *streams, runF func(context.Context, *downOptions) error) *cobra.Command {
	o := &downOptions{processOptions: config.DefaultProcess(), streams: s}
	c := &cobra.Command{
		Use:   "down NAME...",
		Short: "End tunnels, and wait until they are gone",
		Long: `down ends tunnels, one after the other, and with the last one that runs their process.
It returns when their interfaces are gone. ipipd remove ends them at once, and no process.`,
		Args: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usageErrorf("%s: no NAME given: want the name of a tunnel, as ipipd print shows it", c.CommandPath())
			}
			return checkNames(c, args...)
		},
		ValidArgsFunction: completeNames(&o.processOptions),
		RunE: func(c *cobra.Command, args []string) error {
			o.Names = args
			return runF(c.Context(), o)
		},
	}
	addProcessFlag(c, &o.processOptions, config.RuntimeDir)
	return c
}

func downRun(_ context.Context, o *downOptions) error {
	before, _ := control.List(o.RuntimeDir)
	var problems []error
	ended := 0
	for i, name := range o.Names {
		link := tunnel.InterfaceName(name)
		if slices.ContainsFunc(o.Names[:i], func(other string) bool { return tunnel.InterfaceName(other) == link }) {
			continue
		}
		switch err := o.down(name, link); {
		case err == nil:
			ended++
		case errors.Is(err, control.ErrNotRunning) && ended > 0 && slices.Contains(before, link): // disabled, and gone with its process
		case errors.Is(err, control.ErrNotRunning):
			control.Sweep(o.RuntimeDir, []string{link})
			problems = append(problems, noSuchTunnel(o.RuntimeDir, name))
		default:
			problems = append(problems, controlError(err))
		}
	}
	return errors.Join(problems...)
}

// down ends one tunnel. Its error is that of control.Down.
func (o *downOptions) down(name, link string) error {
	err := control.Down(o.RuntimeDir, link, answerTimeout, downTimeout, progressReporter(o.streams.err, name))
	if errors.Is(err, control.ErrNotRunning) {
		if started := originalName(o.RuntimeDir, name); started != "" {
			err = control.Down(o.RuntimeDir, tunnel.InterfaceName(started), answerTimeout, downTimeout, progressReporter(o.streams.err, started))
		}
	}
	return err
}

// progressReporter returns a callback for control.Down that prints a line now and then.
func progressReporter(out io.Writer, name string) func(time.Duration) {
	next := progressAfter
	return func(waited time.Duration) {
		if waited < next {
			return
		}
		next = waited + progressEvery
		fmt.Fprintf(out, "ipipd: waiting for the process of %s to remove its interface: %v of %v\n", name, waited.Truncate(time.Second), downTimeout)
	}
}

func noSuchTunnel(dir, name string) error {
	if strings.Trim(name, "0123456789") == "" {
		return fmt.Errorf("no tunnel named %s in %s: want its name, and not the number that ipipd print has in front of it", name, dir)
	}
	return fmt.Errorf("no tunnel named %s in %s: ipipd print lists those there are", name, dir)
}

// silentRemedy is what to do about a process that does not answer.
const silentRemedy = "end it with kill -9, and ipipd up takes its place"

// controlError adds a remedy to an error of a control socket.
func controlError(err error) error {
	var timeout *control.TimeoutError
	if errors.As(err, &timeout) {
		return withRemedy(err, silentRemedy)
	}
	if errors.Is(err, syscall.ENOTDIR) {
		return withRemedy(err, "give the folder that ipipd up has as its --runtime-dir")
	}
	if err != nil {
		return withRemedy(err)
	}
	return nil
}

// checkNames validates NAME arguments.
func checkNames(c *cobra.Command, names ...string) error {
	for _, name := range names {
		var v *tunnel.ValueError
		if errors.As(tunnel.CheckName(name), &v) {
			return usageErrorf("%s: NAME %q is not accepted: want %s", c.CommandPath(), v.Value, v.Want)
		}
	}
	return nil
}

// oneNameAtMost validates the arguments of a command that is about all tunnels or the one of NAME.
func oneNameAtMost(c *cobra.Command, args []string) error {
	if len(args) > 1 {
		return usageErrorf("%s: unexpected argument %q: want one NAME at most", c.CommandPath(), args[1])
	}
	return checkNames(c, args...)
}

// completeName completes the name of a running tunnel.
func completeName(o *processOptions) cobra.CompletionFunc {
	complete := completeNames(o)
	return func(c *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return complete(c, args, word)
	}
}

// completeNames completes the names of running tunnels that are not among args yet. A name that a shell
// would split is completed as its interface, and describes it.
func completeNames(o *processOptions) cobra.CompletionFunc {
	return func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		links, _ := control.List(o.RuntimeDir)
		sortNames(links)
		configured := map[string]string{}
		if slices.ContainsFunc(links, tunnel.IsShortName) {
			statuses, _ := queryStatuses(o.RuntimeDir, "")
			for i := range statuses {
				name := statuses[i].startedName()
				configured[tunnel.InterfaceName(name)] = name
			}
		}
		var names []string
		for _, link := range links {
			name := cmp.Or(configured[link], link)
			switch {
			case slices.Contains(args, name) || slices.Contains(args, link):
			case strings.ContainsFunc(name, func(c rune) bool {
				return !strings.ContainsRune("-._:@+,/%", c) && !unicode.IsLetter(c) && !unicode.IsDigit(c)
			}):
				names = append(names, cobra.CompletionWithDesc(link, name))
			default:
				names = append(names, name)
			}
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}
}
