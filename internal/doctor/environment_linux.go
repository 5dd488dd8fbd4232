package doctor

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/internal/netstate"
	"ipipd/internal/resolve"
	"ipipd/internal/tunnel"
	"ipipd/tun"
)

// Host returns the Environment of this host, in the network namespace of the calling thread. The caller
// closes it.
func Host() (env *Environment, closeAll func()) {
	network, openErr := netstate.Open(netstate.Options{})
	resolver := resolve.New()
	closeAll = func() {
		if openErr == nil {
			network.Close()
		}
	}
	return &Environment{
		Files: os.DirFS("/"),
		Now:   time.Now,
		Network: func(q netstate.Query) (*netstate.Answer, error) {
			if openErr != nil {
				return nil, openErr
			}
			f := network.Follow(q, func() {})
			defer f.Close()
			return f.Answer(), nil
		},
		KernelTunnels: netstate.KernelTunnels,
		Routes:        netstate.RoutesByInterface,
		Interfaces:    net.Interfaces,
		Addresses:     netstate.InterfaceAddresses,
		ReplyRoute:    netstate.FindReplyRoute,
		OpenTUN:       tun.Probe,
		Resolve: func(ctx context.Context, name string) (netip.Addr, error) {
			answer, err := resolver.Lookup(ctx, name)
			if err != nil {
				return netip.Addr{}, err
			}
			return answer.Addresses[0], nil
		},
		Command: command,
		Probe:   probe,
		ClockSynchronized: func() (bool, error) {
			var now unix.Timex // Modes 0 reads only
			_, err := unix.Adjtimex(&now)
			return now.Status&unix.STA_UNSYNC == 0, os.NewSyscallError("adjtimex", err)
		},
		MaxFiles: tunnel.MaxFiles,
		Threads:  tunnel.DefaultThreads(),
	}, closeAll
}

// command runs a program that changes nothing. It searches /usr/sbin and /sbin, too, which a user's PATH often lacks.
func command(ctx context.Context, name string, args ...string) ([]byte, error) {
	path, err := exec.LookPath(name)
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if err != nil {
			path, err = exec.LookPath(filepath.Join(dir, name))
		}
	}
	if err != nil {
		return nil, exec.ErrNotFound
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var complaint bytes.Buffer
	cmd.Stderr = &complaint
	out, err := cmd.Output()
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	if err != nil {
		line, _, _ := strings.Cut(strings.TrimSpace(complaint.String()), "\n")
		return nil, fmt.Errorf("%s: %w: %s", name, err, line)
	}
	return out, nil
}
