package demo

import (
	"context"
	"fmt"
	"net/netip"
	"strings"

	"ipipd/internal/lab"
)

// mesh shows hosts that each have one interface with all others as its remotes.
func (l *laboratory) mesh(ctx context.Context) error {
	outer, inner := make([]netip.Addr, l.Mesh), make([]netip.Addr, l.Mesh)
	for i := range l.Mesh {
		outer[i], inner[i] = netip.AddrFrom4([4]byte{192, 0, 2, byte(i + 1)}), netip.AddrFrom4([4]byte{10, 255, 0, byte(i + 1)})
		if _, err := l.add(string(rune('a' + i))); err != nil {
			return err
		}
	}
	l.say("%d hosts, each a network namespace, each two of them joined by %s:\n\n    host a  %v ... host %s  %v\n",
		l.Mesh, l.cable(), outer[0], l.hosts[l.Mesh-1].name, outer[l.Mesh-1])
	for i := range l.Mesh {
		for j := i + 1; j < l.Mesh; j++ {
			// The interface on one host has the other's name.
			a := lab.End{Namespace: l.hosts[i].namespace, Name: "to-" + l.hosts[j].name}
			b := lab.End{Namespace: l.hosts[j].namespace, Name: "to-" + l.hosts[i].name}
			if err := l.join(a, b); err != nil {
				return err
			}
			if err := a.SetUp(lab.Address{Prefix: netip.PrefixFrom(outer[i], 32), Peer: outer[j]}); err != nil {
				return err
			}
			if err := b.SetUp(lab.Address{Prefix: netip.PrefixFrom(outer[j], 32), Peer: outer[i]}); err != nil {
				return err
			}
		}
	}
	encryption, err := l.encryption()
	if err != nil {
		return err
	}
	l.say("One interface on each, with all others as its remotes:\n")
	var flows []flow
	for i, h := range l.hosts {
		var peers []string
		for j := range l.Mesh {
			if j != i {
				peers = append(peers, fmt.Sprintf("%v=%v", inner[j], outer[j]))
				flows = append(flows, flow{h, inner[i], inner[j]})
			}
		}
		args := []string{"--local-address", outer[i].String(), "--remote-address", "any", "--address", inner[i].String() + "/32"}
		for _, flag := range encryption {
			args = append(args, "--"+flag[0], flag[1])
		}
		args = append(args, "--peers", strings.Join(peers, ","))
		if i == 0 {
			l.say("%s$ ipipd up %s", h.name, strings.Join(args, " "))
		} else if i == 1 {
			l.say("…")
		}
		if err := h.start(append(args, "--name", tunnelName)...); err != nil {
			return err
		}
	}
	if err := l.awaitReady(ctx); err != nil {
		return err
	}
	if err := l.reach(ctx, flows); err != nil {
		return err
	}
	if err := l.rate(ctx, l.hosts[0], l.hosts[1], inner[0], inner[1]); err != nil {
		return err
	}
	for _, args := range [][]string{{"print"}, {"print", "--remotes", tunnelName}} {
		if err := l.show(ctx, l.hosts[0], nil, args...); err != nil {
			return err
		}
	}
	l.countLost()
	return nil
}
