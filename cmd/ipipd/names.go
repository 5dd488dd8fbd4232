package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"time"

	"ipipd/internal/control"
	"ipipd/internal/tunnel"
)

// nameRetryTimeout bounds the wait for a name whose process has been killed and has not
// exited completely.
const nameRetryTimeout = time.Second

// listen makes the control socket and reserves the names of configs. One without a name
// gets the first ipipN that is free both as an interface and in dir, which several network
// namespaces may share.
func listen(ctx context.Context, dir string, configs []tunnel.Config) (*control.Server, error) {
	s, err := control.Listen(ctx, dir)
	if err != nil {
		return nil, socketError(err)
	}
	if len(configs) == 1 && configs[0].Name == "" {
		err = reserveFirst(ctx, s, &configs[0].Name)
	} else {
		err = reserve(ctx, s, namesOf(configs))
	}
	if err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// linksOf returns the names of the tunnels' links in the runtime folder: those of their interfaces.
func linksOf(names []string) (links []string) {
	for _, name := range names {
		links = append(links, tunnel.InterfaceName(name))
	}
	return links
}

func namesOf(configs []tunnel.Config) (names []string) {
	for i := range configs {
		names = append(names, configs[i].Name)
	}
	return names
}

// reserveFirst reserves the first ipipN that is free.
func reserveFirst(ctx context.Context, s *control.Server, name *string) error {
	for i := 1; ; i++ {
		*name = "ipip" + strconv.Itoa(i)
		err := tryReserve(ctx, s, []string{*name})
		var taken *nameTakenError
		if !errors.As(err, &taken) {
			return err
		}
	}
}

// reserve reserves names, all or none.
func reserve(ctx context.Context, s *control.Server, names []string) error {
	for end := time.Now().Add(nameRetryTimeout); ; {
		err := tryReserve(ctx, s, names)
		var taken *nameTakenError
		if !errors.As(err, &taken) || time.Now().After(end) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(50 * time.Millisecond):
		}
	}
}

type nameTakenError struct{ name, by string }

func (e *nameTakenError) Error() string {
	return fmt.Sprintf("name %s is taken by %s: choose another with --name", e.name, e.by)
}

// tryReserve checks the control sockets before the interfaces, for the better error message
// if a tunnel of ipipd has a name.
func tryReserve(ctx context.Context, s *control.Server, names []string) error {
	links := linksOf(names)
	err := s.Reserve(ctx, links...)
	var taken *control.TakenError
	if errors.As(err, &taken) {
		name := names[slices.Index(links, taken.Name)]
		return &nameTakenError{name, "a running tunnel (" + taken.Path + "); end it with ipipd down " + name}
	}
	if err != nil {
		return socketError(err)
	}
	interfaces, err := net.Interfaces() // once: for each name the kernel would list them all
	for _, i := range interfaces {
		if at := slices.Index(links, i.Name); at >= 0 {
			err = &nameTakenError{names[at], "an interface of this host"}
			break
		}
	}
	if err != nil {
		s.Release(links...)
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
	case errors.As(err, &locked):
		return fmt.Errorf("cannot make the control socket: %w", err)
	}
	return withRemedy(fmt.Errorf("cannot make the control socket: %w", err), "choose another folder with --runtime-dir")
}
