package demo

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"ipipd/internal/lab"
)

// spoke is one of many remotes: its outer address, and the inner addresses of the hub and of the spoke.
type spoke struct {
	outer      netip.Addr
	hub, spoke netip.Addr
}

func spokes(count int) (all []spoke) {
	for i := 1; i <= count; i++ {
		high, low := byte(i>>8), byte(i)
		all = append(all, spoke{
			outer: netip.AddrFrom4([4]byte{198, 18, 1 + high, low}),
			hub:   netip.AddrFrom4([4]byte{10, 255 - high, low, 1}),
			spoke: netip.AddrFrom4([4]byte{10, 255 - high, low, 2}),
		})
	}
	return all
}

// hubAddress is the outer address of the hub.
var hubAddress = netip.MustParseAddr("198.18.0.1")

// many shows one interface with many remotes, and one process with many tunnels at the other end.
func (l *laboratory) many(ctx context.Context) error {
	hub, err := l.add("a")
	if err != nil {
		return err
	}
	far, err := l.add("b")
	if err != nil {
		return err
	}
	all := spokes(l.Many)
	first, last := all[0], all[len(all)-1]
	l.say("Two hosts, each a network namespace, joined by %s. Host b has the addresses of all remotes:\n\n    host a  %v ──────── %v to %v  host b\n",
		l.cable(), hubAddress, first.outer, last.outer)
	ends := [2]lab.End{{Namespace: hub.namespace, Name: wire}, {Namespace: far.namespace, Name: wire}}
	if err := l.join(ends[0], ends[1]); err != nil {
		return err
	}
	const subnet = 16
	if err := ends[0].SetUp(lab.Address{Prefix: netip.PrefixFrom(hubAddress, subnet)}); err != nil {
		return err
	}
	var addresses []lab.Address
	for _, s := range all {
		addresses = append(addresses, lab.Address{Prefix: netip.PrefixFrom(s.outer, subnet)})
	}
	if err := ends[1].SetUp(addresses...); err != nil {
		return err
	}
	encryption, err := l.encryption()
	if err != nil {
		return err
	}
	texts := [2]string{hubConfig(all, encryption), farConfig(all, encryption)}
	l.say("One interface with many remotes on a, as many tunnels in one process on b:\n")
	for i, h := range l.hosts {
		file := filepath.Join(l.dir, h.name+".yaml")
		if err := os.WriteFile(file, []byte(texts[i]), 0o600); err != nil {
			return err
		}
		l.say("%s$ ipipd up --config %s    # %s", h.name, filepath.Base(file),
			[2]string{fmt.Sprintf("remote-address: any, %d peers", l.Many), fmt.Sprintf("%d tunnels", l.Many)}[i])
		if err := h.start("--config", file); err != nil {
			return err
		}
	}
	if err := l.awaitReady(ctx, tunnelName, farName(len(all)-1)); err != nil {
		return err
	}
	var flows []flow
	for _, s := range all {
		flows = append(flows, flow{hub, s.hub, s.spoke})
	}
	if err := l.reach(ctx, flows); err != nil {
		return err
	}
	if err := l.rate(ctx, hub, far, first.hub, first.spoke); err != nil {
		return err
	}
	for _, h := range l.hosts {
		if err := l.show(ctx, h, short, "print"); err != nil {
			return err
		}
	}
	l.countLost()
	return nil
}

// reach pings along all flows, and prints the round trips.
func (l *laboratory) reach(ctx context.Context, flows []flow) error {
	began := time.Now()
	took, sent, err := reachAll(ctx, flows)
	if err != nil {
		return err
	}
	what := ""
	if l.Encrypted {
		what = ", IKE with each included"
	}
	l.say("\n%d of %d answer a ping through the tunnel, %.1f s after the start%s; %d requests were sent.", len(flows), len(flows), time.Since(began).Seconds(), what, sent)
	slices.Sort(took)
	l.say("Round trips: %.2f ms the least, %.2f ms the median, %.2f ms the most.", ms(took[0]), ms(took[len(took)/2]), ms(took[len(took)-1]))
	return nil
}

func ms(d time.Duration) float64 { return d.Seconds() * 1e3 }

// farName returns the name of tunnel i of host b.
func farName(i int) string { return fmt.Sprintf("ipip%d", i+1) }

func hubConfig(all []spoke, encryption [][2]string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "tunnels:\n  - name: %s\n    local-address: %v\n    remote-address: any\n%s    address:\n", tunnelName, hubAddress, keys(encryption))
	for _, s := range all {
		fmt.Fprintf(&b, "      - %v/32\n", s.hub)
	}
	fmt.Fprintln(&b, "    peers:")
	for _, s := range all {
		fmt.Fprintf(&b, "      %v: %v\n", s.spoke, s.outer)
	}
	return b.String()
}

func farConfig(all []spoke, encryption [][2]string) string {
	var b strings.Builder
	fmt.Fprintln(&b, "tunnels:")
	for i, s := range all {
		fmt.Fprintf(&b, "  - name: %s\n    local-address: %v\n    remote-address: %v\n%s    address: [%v/32]\n    route: [%v/32]\n",
			farName(i), s.outer, hubAddress, keys(encryption), s.spoke, s.hub)
	}
	return b.String()
}

// keys returns flags as keys of a tunnel, a line each.
func keys(flags [][2]string) string {
	var b strings.Builder
	for _, flag := range flags {
		fmt.Fprintf(&b, "    %s: %s\n", flag[0], flag[1])
	}
	return b.String()
}
