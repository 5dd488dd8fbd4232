package peerconfig

import (
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"

	"ipipd/internal/tunnel"
	"ipipd/keepalive"
)

// writeMany writes the configuration of each other end of a tunnel with many remotes that its peers name. That
// end has one remote, this one.
func writeMany(w io.Writer, system string, t *Tunnel) error {
	prefixes := map[netip.Addr][]string{}
	var remotes []netip.Addr
	for _, r := range t.Config.Routes {
		if !r.Gateway.IsValid() {
			continue
		}
		if prefixes[r.Gateway] == nil {
			remotes = append(remotes, r.Gateway)
		}
		prefixes[r.Gateway] = append(prefixes[r.Gateway], r.Prefix.String())
	}
	if t.Only.IsValid() {
		remotes = slices.DeleteFunc(remotes, func(r netip.Addr) bool { return r != t.Only })
	}
	switch {
	case len(remotes) == 0 && t.Only.IsValid():
		return fmt.Errorf("remote %v has no prefix in peers: %s", t.Only, byHand)
	case len(remotes) == 0:
		return fmt.Errorf("remote-address is any, and peers names no remote: %s", byHand)
	}
	for i, remote := range remotes {
		one := *t
		one.Config.RemoteAddress, one.Config.Routes = remote.String(), nil
		one.Config.AcceptAnyPeer, one.Config.AcceptFrom, one.Config.AcceptTo = false, nil, nil
		one.Config.Keepalive, one.Config.KeepaliveProbe, one.Config.KeepaliveTarget = keepalive.Config{}, keepalive.FormReflect, netip.Addr{}
		one.Remote = remote
		if one.Local = t.Locals[remote]; !one.Local.IsValid() && !one.Config.LocalAddress.IsValid() {
			return fmt.Errorf("local-address: not known: that of the route to %v, which needs it: set local-address, or start the tunnel, which finds it", remote)
		}
		one.sources = strings.Join(prefixes[remote], ", ")
		if i > 0 {
			if _, err := io.WriteString(w, "\n"); err != nil {
				return err
			}
		}
		if err := Write(w, system, &one); err != nil {
			return err
		}
	}
	return nil
}

const byHand = "the other ends are the gateways of the routes out of the interface, each with this end's local-address as its remote: ipipd print --remotes lists them; set peers=PREFIX=REMOTE"

// mirrorMany adds notes about what one of many remotes gets, and what it may send.
func (p *peer) mirrorMany(t *Tunnel) {
	if t.sources == "" {
		return
	}
	p.notes = slices.Insert(p.notes, 0,
		fmt.Sprintf("on %s, one of many remotes of the other end: %s is sent to it", t.Config.RemoteAddress, t.sources),
		"inner sources outside that are dropped there (reverse-path), and no keepalive probe is sent")
}

// isMany reports whether t has many remotes.
func (t *Tunnel) isMany() bool { return t.Config.RemoteAddress == tunnel.AnyRemote }
