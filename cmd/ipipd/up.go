package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"ipipd/internal/config"
	"ipipd/internal/control"
	"ipipd/internal/tunnel"
)

type upOptions struct {
	processOptions
	streams *streams
	Config  tunnel.Config
	// SecretInArgs reports that ipsec-secret was given as a flag.
	SecretInArgs bool
	// start is startTunnel, but in tests.
	start func(context.Context, tunnel.EngineOptions, tunnel.Config) (startedTunnel, error)
}

// startedTunnel is the part of *tunnel.Tunnel that `up` uses.
type startedTunnel interface {
	Status() tunnel.Status
	// Done is closed when the tunnel has failed; Err returns the reason.
	Done() <-chan struct{}
	Err() error
	// Close removes the tunnel. It returns when the interface is gone.
	Close() error
}

func newCmdUp(s *streams, runF func(context.Context, *upOptions) error) *cobra.Command {
	o := &upOptions{processOptions: config.DefaultProcess(), streams: s, Config: tunnel.Default(), start: startTunnel}
	c := &cobra.Command{
		Use:   "up --remote-address ADDRESS",
		Short: "Bring up a tunnel, and forward its packets until a signal or ipipd down ends it",
		Long: `up makes an interface and carries its packets to the remote in IP-in-IP. It stays
in the foreground, logs one line when the tunnel is ready, and removes the
interface again on SIGINT, SIGTERM and ipipd down. It needs /dev/net/tun, and root
or CAP_NET_ADMIN and CAP_NET_RAW.`,
		Example:           "  ipipd up --local-address 192.0.2.1 --remote-address 198.51.100.1 --name ipip1 --address 10.255.0.1/30",
		Args:              noArguments,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(c *cobra.Command, _ []string) error {
			o.SecretInArgs = len(o.Config.IPsec.Secret) > 0
			if err := secretFromEnv(&o.Config, os.LookupEnv); err != nil {
				return err
			}
			if err := o.Config.Validate(); err != nil {
				var v *tunnel.ValueError
				if errors.As(err, &v) && v.Missing && v.Property == "remote-address" {
					return usageErrorf("%w; the smallest tunnel is %s", valueError(err), minimalExample)
				}
				return valueError(err)
			}
			return runF(c.Context(), o)
		},
	}
	for _, p := range tunnel.Properties() {
		addPropertyFlag(c, &o.Config, p)
	}
	for _, p := range config.ProcessProperties() {
		addProcessFlag(c, &o.processOptions, p)
	}
	return c
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
	ctx, down := context.WithCancel(ctx)
	defer down()
	sighups := make(chan os.Signal, 1) // buffered: one before the tunnel is ready is logged then
	signal.Notify(sighups, syscall.SIGHUP)
	defer signal.Stop(sighups)

	log := newLogger(o)
	if o.SecretInArgs {
		log.Warn("ipsec-secret was given as an argument, which every user of this host can read; use --ipsec-secret-file or " + secretEnv)
	}
	if o.Config.IPsec.Wanted() {
		if err := disableCoreDumps(); err != nil {
			log.Warn("cannot disable core dumps: one would contain the secret", "err", err)
		}
	}
	server, name, err := reserveName(ctx, o.RuntimeDir, o.Config.Name)
	if err != nil {
		if ctx.Err() != nil {
			return nil // canceled before the tunnel was ready
		}
		return err
	}
	o.Config.Name = name
	// Deferred first, so that the socket goes after the interface, as `down` expects.
	defer server.Close()
	var ready atomic.Pointer[startedTunnel]
	go func() {
		status := func() any {
			if t := ready.Load(); t != nil {
				return (*t).Status()
			}
			return nil
		}
		if err := server.Serve(status, down); err != nil {
			log.Error("the control socket has failed: ipipd print and ipipd down cannot reach this tunnel", "name", name, "err", err)
		}
	}()

	t, err := o.start(ctx, tunnel.EngineOptions{Log: log, Threads: o.Threads}, o.Config)
	if err != nil {
		if ctx.Err() != nil {
			return nil // canceled before the tunnel was ready
		}
		return err
	}
	ready.Store(&t)
	s := t.Status()
	log.Info("tunnel is ready", "name", s.Name(), "local-address", s.CurrentLocalAddress,
		"remote-address", s.CurrentRemoteAddress, "mtu", s.ActualMTU)

	for running := true; running; {
		select {
		case <-sighups:
			log.Info("nothing to reload: the tunnel is configured by the flags of ipipd up alone", "name", name)
		case <-ctx.Done():
			log.Debug("ending: SIGINT, SIGTERM or ipipd down", "name", name)
			running = false
		case <-t.Done():
			err, running = t.Err(), false
		}
	}
	stop() // a second signal kills the process
	return errors.Join(err, t.Close())
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

// nameRetryTimeout bounds the wait for a name whose process has been killed and has not
// exited completely.
const nameRetryTimeout = time.Second

// reserveName reserves the name, or with "" the first ipipN that is free both as an
// interface and in dir, which several network namespaces may share.
func reserveName(ctx context.Context, dir, name string) (*control.Server, string, error) {
	if name == "" {
		for i := 1; ; i++ {
			name := "ipip" + strconv.Itoa(i)
			s, err := tryReserveName(ctx, dir, name)
			var taken *nameTakenError
			if !errors.As(err, &taken) {
				return s, name, err
			}
		}
	}
	for end := time.Now().Add(nameRetryTimeout); ; {
		s, err := tryReserveName(ctx, dir, name)
		var taken *nameTakenError
		if !errors.As(err, &taken) || time.Now().After(end) {
			return s, name, err
		}
		select {
		case <-ctx.Done():
			return nil, "", err
		case <-time.After(50 * time.Millisecond):
		}
	}
}

type nameTakenError struct{ name, by string }

func (e *nameTakenError) Error() string {
	return fmt.Sprintf("name %s is taken by %s: choose another with --name", e.name, e.by)
}

// tryReserveName checks the control socket before the interface, for the better error
// message if a tunnel of ipipd has the name.
func tryReserveName(ctx context.Context, dir, name string) (*control.Server, error) {
	s, err := control.Listen(ctx, dir, name)
	var taken *control.TakenError
	var unsafe *control.DirError
	var locked *control.LockedError
	switch {
	case errors.As(err, &taken):
		return nil, &nameTakenError{name, "a running tunnel (" + taken.Path + "); end it with ipipd down " + name}
	case errors.As(err, &unsafe):
		remedy := "choose another folder with --runtime-dir"
		if unsafe.Remedy != "" {
			remedy = unsafe.Remedy + ", or " + remedy
		}
		return nil, fmt.Errorf("cannot make the control socket: %w: %s", err, remedy)
	case errors.As(err, &locked):
		return nil, fmt.Errorf("cannot make the control socket: %w", err)
	case err != nil:
		return nil, withRemedy(fmt.Errorf("cannot make the control socket: %w", err), "choose another folder with --runtime-dir")
	}
	if _, err := net.InterfaceByName(name); err == nil {
		s.Close()
		return nil, &nameTakenError{name, "an interface of this host"}
	}
	return s, nil
}
