package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"syscall"
	"time"

	"ipipd/internal/control"
	"ipipd/internal/tunnel"
)

// nameRetryTimeout bounds the wait for a name whose process has been killed and has not
// exited completely.
const nameRetryTimeout = time.Second

// reserve reserves the names of configs, all or none, besides those that the process has, and returns
// configs with a name for each: a tunnel without one gets the first ipipN that is free both as an
// interface and in the folder, which several network namespaces may share.
func (p *process) reserve(ctx context.Context, configs []tunnel.Config) (_ []tunnel.Config, err error) {
	before := p.wanted.Load().configs
	defer func() {
		if err != nil {
			p.release(configs, before)
		}
	}()
	configs = slices.Clone(configs)
	if i := slices.IndexFunc(configs, func(c tunnel.Config) bool { return c.Name == "" }); i >= 0 {
		if err := p.reserveFirst(ctx, configs, i); err != nil {
			return nil, err
		}
	}
	for end := time.Now().Add(nameRetryTimeout); ; {
		err := p.tryReserve(ctx, configs)
		var taken *nameTakenError
		if err == nil {
			return configs, nil
		}
		if !errors.As(err, &taken) || time.Now().After(end) {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// reserveFirst gives configs[i] the first free name, and reserves it.
func (p *process) reserveFirst(ctx context.Context, configs []tunnel.Config, i int) error {
	have := linksOf(slices.Concat(configs, p.wanted.Load().configs))
	for n := 1; ; n++ {
		name := "ipip" + strconv.Itoa(n)
		if have[name] {
			continue
		}
		configs[i].Name = name
		err := p.tryReserve(ctx, configs[i:i+1])
		var taken *nameTakenError
		if !errors.As(err, &taken) {
			return err
		}
	}
}

// release releases the names of configs, but not those of kept.
func (p *process) release(configs, kept []tunnel.Config) {
	keep := linksOf(kept)
	for link := range linksOf(configs) {
		if !keep[link] {
			p.server.Release(link)
		}
	}
}

// linksOf returns the names of the tunnels' links in the runtime folder: those of their interfaces.
func linksOf(configs []tunnel.Config) map[string]bool {
	links := make(map[string]bool, len(configs))
	for i := range configs {
		links[tunnel.InterfaceName(configs[i].Name)] = true
	}
	return links
}

type nameTakenError struct{ name, by string }

func (e *nameTakenError) Error() string {
	return fmt.Sprintf("name %s is taken by %s: choose another", e.name, e.by)
}

// tryReserve reserves the names of configs once. It checks the control sockets before the interfaces,
// for the better error message if a tunnel of ipipd has a name.
func (p *process) tryReserve(ctx context.Context, configs []tunnel.Config) error {
	var links []string
	of := make(map[string]*tunnel.Config, len(configs))
	for i := range configs {
		link := tunnel.InterfaceName(configs[i].Name)
		links, of[link] = append(links, link), &configs[i]
	}
	err := p.server.Reserve(ctx, links...)
	var taken *control.TakenError
	if errors.As(err, &taken) {
		name := of[taken.Name].Name
		return &nameTakenError{name, "a running tunnel (" + taken.Path + "); end it with ipipd down " + name}
	}
	if err != nil {
		return socketError(err)
	}
	if err = p.checkInterfaces(of); err != nil {
		p.release(configs, p.wanted.Load().configs)
	}
	return err
}

// checkInterfaces fails if a tunnel that is to be started has the name of an interface. It deletes all others from
// configs, which are by link; if none is left it sends no netlink message.
func (p *process) checkInterfaces(configs map[string]*tunnel.Config) error {
	var running map[string]startedTunnel
	if p.engine != nil {
		running = p.engine.Tunnels()
	}
	maps.DeleteFunc(configs, func(link string, c *tunnel.Config) bool { return c.Disabled || running[link] != nil })
	if len(configs) == 0 {
		return nil
	}
	interfaces, err := p.interfaces() // once: for each name the kernel would list them all
	for _, i := range interfaces {
		if c := configs[i.Name]; c != nil && !p.notify.keeps(tunnel.KeptName(c.Name)) {
			return &nameTakenError{c.Name, "an interface of this host"}
		}
	}
	return err
}

// socketError adds a remedy to an error of control.Listen or Reserve.
func socketError(err error) error {
	var unsafe *control.DirError
	var locked *control.LockedError
	switch {
	case errors.As(err, &unsafe):
		remedy := "choose another folder with --runtime-dir"
		if unsafe.Remedy != "" {
			remedy = unsafe.Remedy + ", or " + remedy
		}
		return fmt.Errorf("cannot make the control socket: %w: %s", err, remedy)
	case errors.As(err, &locked), errors.Is(err, syscall.EMFILE):
		return fmt.Errorf("cannot make the control socket: %w", err)
	}
	return withRemedy(fmt.Errorf("cannot make the control socket: %w", err), "choose another folder with --runtime-dir")
}
