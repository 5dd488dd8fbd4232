package main

import (
	"context"
	"io"
	"log/slog"
	"path/filepath"
	"slices"
	"time"

	"ipipd/internal/broker"
	"ipipd/internal/config"
	"ipipd/internal/privileged"
	"ipipd/internal/tunnel"
)

// useBroker makes the broker do what takes a privilege from now on, and reports whether there is one.
func (n *notifier) useBroker() bool {
	if n == nil || n.manager == nil || n.manager.Broker < 0 {
		return false
	}
	privileged.Use(n.manager.Broker)
	return true
}

// brokered is the broker of a process, and the goroutine that serves it.
type brokered struct {
	server *broker.Server
	ended  chan struct{}
}

// startBroker returns the broker of the next process that command starts, and the process's end of its socket pair; nil
// and -1 if it is no ipipd up, or its configuration cannot be read, which the process itself reports.
func startBroker(log *slog.Logger, command []string) (*brokered, int) {
	read := configurationOf(command)
	if read == nil {
		return nil, -1
	}
	server, peer, err := broker.New(read)
	if err != nil {
		log.Debug("the process keeps its capabilities: its configuration is not known", "err", err)
		return nil, -1
	}
	b := &brokered{server, make(chan struct{})}
	var said time.Time
	go func() {
		defer close(b.ended)
		server.Serve(func(err error) {
			if time.Since(said) > time.Minute { // it may ask for any number
				said = time.Now()
				log.Warn("what the process asks for is not done: its configuration does not name it", "what", err)
			}
		})
	}()
	return b, peer
}

// end ends the broker once the request under way is done.
func (b *brokered) end() {
	if b != nil {
		b.server.Interrupt()
		<-b.ended
	}
}

// upOptionsOf returns the options of an ipipd up, nil if command is none: a script may start it with other flags.
func upOptionsOf(command []string) (o *upOptions) {
	if len(command) < 2 || filepath.Base(command[0]) != "ipipd" || command[1] != "up" {
		return nil
	}
	c := newCmdUp(&streams{io.Discard, io.Discard}, func(_ context.Context, parsed *upOptions) error {
		o = parsed
		return nil
	})
	c.SetArgs(slices.Clone(command[2:]))
	c.SetOut(io.Discard)
	c.SetErr(io.Discard)
	c.SilenceErrors, c.SilenceUsage = true, true
	if c.Execute() != nil {
		return nil
	}
	return o
}

// configurationOf returns a function that reads the configuration of an ipipd up, as that does; nil if command is none,
// or reads it from standard input.
func configurationOf(command []string) func() ([]tunnel.Config, error) {
	o := upOptionsOf(command)
	if o == nil || slices.Contains(o.Paths, config.Stdin) {
		return nil
	}
	return func() ([]tunnel.Config, error) {
		if len(o.Paths) == 0 {
			return []tunnel.Config{o.Config}, nil
		}
		_, configs, err := unrefused(config.Read(o.Paths...))
		return configs, err
	}
}
