package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"ipipd/internal/config"
	"ipipd/internal/tunnel"
)

type upOptions struct {
	processOptions
	streams *streams
	// Config is the tunnel that flags describe, if Paths is empty.
	Config tunnel.Config
	// Paths are the files and folders of the configuration; readConfiguration reads them.
	Paths []string
	// SecretInArgs reports that ipsec-secret was given as a flag.
	SecretInArgs bool
	// given are the names of the flags that were given.
	given map[string]bool
	// open is openEngine except in tests.
	open func(tunnel.EngineOptions) (engine, error)
}

func newCmdUp(s *streams, runF func(context.Context, *upOptions) error) *cobra.Command {
	o := &upOptions{processOptions: config.DefaultProcess(), streams: s, Config: tunnel.Default(), open: openEngine}
	var wrong *usageErrors
	c := &cobra.Command{
		Use:   "up {--remote-address ADDRESS | --config FILE}",
		Short: "Bring up tunnels, and forward their packets until a signal or ipipd down ends them",
		Long: `up makes an interface and carries its packets to the remote in IP-in-IP; with
--config it does so for each tunnel of a configuration, in one process. It stays in
the foreground, logs one line when a tunnel is ready, and removes the interfaces
again on SIGINT, SIGTERM and ipipd down. It needs /dev/net/tun, and root or
CAP_NET_ADMIN and CAP_NET_RAW.`,
		Example: `  ipipd up --local-address 192.0.2.1 --remote-address 198.51.100.1 --name ipip1 --address 10.255.0.1/30
  ipipd up --config /etc/ipipd/ipipd.yaml`,
		Args:              noArguments,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(c *cobra.Command, _ []string) error {
			o.given = map[string]bool{}
			c.Flags().Visit(func(f *pflag.Flag) { o.given[f.Name] = true })
			if o.given[configFlag] {
				if err := onlyConfig(o.given, *wrong, os.LookupEnv); err != nil {
					return err
				}
				return runF(c.Context(), o)
			}
			o.SecretInArgs = len(o.Config.IPsec.Secret) > 0
			if err := checkFlags(&o.Config, *wrong, o.given, os.LookupEnv); err != nil {
				return err
			}
			return runF(c.Context(), o)
		},
	}
	c.Flags().SortFlags = false
	c.Flags().StringArrayVar(&o.Paths, configFlag, nil, configHelp)
	for _, p := range tunnel.Properties() {
		addPropertyFlag(c, &o.Config, p)
	}
	for _, p := range config.ProcessProperties() {
		addProcessFlag(c, &o.processOptions, p)
	}
	wrong = collectErrors(c)
	return c
}

const (
	configFlag = "config"
	configHelp = "configuration of the tunnels and the process: YAML, JSON or a RouterOS export (*.rsc); several, or a folder, are one; a flag of the process takes precedence"
)

// onlyConfig adds an error to wrong for each property of a tunnel that is set beside --config, and returns all of them.
func onlyConfig(given map[string]bool, wrong usageErrors, lookup func(string) (string, bool)) error {
	for _, p := range tunnel.Properties() {
		if given[p.Name] {
			wrong = append(wrong, usageErrorf("--%s: given beside --config: want it in the file, of a tunnel or in defaults", p.Name))
		}
	}
	if _, ok := lookup(secretEnv); ok {
		wrong = append(wrong, usageErrorf("%s: set beside --config: want ipsec-secret-file in the file, and no such variable", secretEnv))
	}
	if len(wrong) > 0 {
		return wrong
	}
	return nil
}

// minimalExample is part of the error for a missing remote-address.
const minimalExample = "ipipd up --remote-address 198.51.100.1 --address 10.255.0.1/30"

// secretEnv is the environment variable for ipsec-secret.
const secretEnv = "IPIPD_IPSEC_SECRET"

// secretFromEnv sets the secret from the environment, unless a flag has set it. An empty
// variable is an error, so that it does not start an unencrypted tunnel.
func secretFromEnv(config *tunnel.Config, lookup func(string) (string, bool)) error {
	value, ok := lookup(secretEnv)
	if !ok || config.IPsec.Wanted() {
		return nil
	}
	for _, p := range tunnel.Properties() {
		if p.Name != "ipsec-secret" {
			continue
		}
		var wrong *tunnel.ValueError
		if err := p.Set(config, value); errors.As(err, &wrong) {
			return usageErrorf("%s: what it holds is not accepted: want %s, or no such variable", secretEnv, wrong.Want)
		}
	}
	return nil
}

func upRun(ctx context.Context, o *upOptions) error {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithCancelCause(ctx)
	// SIGUSR2 ends the process before a restart, by ipipd keep, or by systemd with RestartKillSignal=.
	restart := make(chan os.Signal, 1)
	signal.Notify(restart, syscall.SIGUSR2)
	defer signal.Stop(restart)
	var leave atomic.Bool
	go func() {
		select {
		case <-restart:
			leave.Store(true)
			cancel(errors.New("SIGUSR2: the next process takes over"))
		case <-ctx.Done():
		}
	}()
	down := func() { cancel(errors.New("ipipd down")) }
	defer down()
	sighups := make(chan os.Signal, 1) // buffered: one that comes before the tunnels are ready is handled then
	signal.Notify(sighups, syscall.SIGHUP)
	defer signal.Stop(sighups)

	configs, file := []tunnel.Config{o.Config}, &config.File{}
	if len(o.Paths) > 0 {
		var err error
		if file, configs, err = o.readConfiguration(); err != nil {
			return err
		}
	}
	log := newLogger(o)
	logNotes(log, file)
	if o.SecretInArgs {
		log.Warn("ipsec-secret was given as an argument, which every user of this host can read; use --ipsec-secret-file or " + secretEnv)
	}
	p := newProcess(o, log, down)
	p.notify = newNotifier(log)
	err := p.start(ctx, configs)
	defer p.stopMetrics()
	if p.server != nil {
		// Deferred first, so that the socket goes after the interfaces, as `down` expects.
		defer p.server.Close()
	}
	if err != nil {
		if ctx.Err() != nil {
			return nil // canceled before the tunnels were ready
		}
		return err
	}
	go func() {
		for {
			select {
			case <-sighups: // those that come meanwhile are one
				p.hangUp(ctx)
			case <-ctx.Done():
				return
			}
		}
	}()
	select {
	case <-ctx.Done():
		log.Info("the process ends", "cause", context.Cause(ctx))
	case err = <-p.failed:
	}
	time.AfterFunc(againTimeout, stop) // another signal kills the process then
	down()
	p.stopMetrics()
	return errors.Join(err, p.close(leave.Load()))
}

func newLogger(o *upOptions) *slog.Logger {
	var level slog.Level
	if err := level.UnmarshalText([]byte(o.LogLevel)); err != nil {
		panic(err) // the flag takes no others
	}
	options := &slog.HandlerOptions{Level: level}
	if o.LogFormat == "json" {
		return slog.New(slog.NewJSONHandler(o.streams.err, options))
	}
	return slog.New(slog.NewTextHandler(o.streams.err, options))
}
