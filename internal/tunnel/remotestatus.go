package tunnel

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"ipipd/internal/drop"
	"ipipd/internal/netstate"
)

// What is shown of many remotes. Nothing that carries packets waits for it, nor does control.

// Remotes are the remotes of a tunnel with many.
type Remotes struct {
	// Count is the number of gateways of the interface's routes, NotOK of those whose State is not ok.
	Count int `json:"count"`
	NotOK int `json:"not-ok"`
	// Prefixes is the number of prefixes to which the interface's routes send packets.
	Prefixes int `json:"prefixes"`
	// List are the remotes, those that are not ok first, as many as were asked for; nil if that is none.
	List []Remote `json:"list,omitzero"`
}

// Remote is the gateway of a route out of the interface of a tunnel with many remotes.
type Remote struct {
	Address string `json:"address"`
	// LocalAddress is the outer source of packets to it, if the tunnel has no local-address.
	LocalAddress string `json:"local-address,omitzero"`
	Prefixes     int    `json:"prefixes"`
	State        string `json:"state"`
	// PathMTU is the largest outer packet in bytes; 0 if it is not known.
	PathMTU   int       `json:"path-mtu,omitzero"`
	LastHeard time.Time `json:"last-heard,omitzero"`
}

// The states of a Remote.
const (
	RemoteOK          = "ok"
	RemoteUnreachable = "unreachable" // an ICMP error has said so
	RemoteNoPath      = "no-path"     // there is no route to it
	RemoteLoop        = "loop"        // the route to it leads into the interface itself
	RemoteLocal       = "local"       // it is an address of this host
)

// ListRemotes is how many remotes a Status has, unless more are asked for.
const ListRemotes = 100

// Remotes returns the remotes of a tunnel with many, and lists at most limit of them; nil of another tunnel.
func (t *Tunnel) Remotes(limit int) *Remotes {
	if t.many == nil {
		return nil
	}
	routes, table, device := t.many.routes.Load().all, t.many.table.Load(), t.iface.Load().Index
	all := &Remotes{Prefixes: table.Routed()}
	type found struct {
		address [4]byte
		state   string
	}
	var list []found
	for g, r := range routes {
		if r.remote.follower == nil {
			continue // learnt: no gateway
		}
		all.Count++
		f := found{g, r.remoteState(device)}
		if f.state != RemoteOK {
			all.NotOK++
		}
		if limit > 0 {
			list = append(list, f)
		}
	}
	slices.SortFunc(list, func(a, b found) int {
		ok := func(f *found) int {
			if f.state == RemoteOK {
				return 1
			}
			return 0
		}
		return cmp.Or(ok(&a)-ok(&b), bytes.Compare(a.address[:], b.address[:]))
	})
	if limit > 0 {
		all.List = make([]Remote, 0, min(limit, len(list)))
	}
	for _, f := range list[:min(limit, len(list))] {
		r := routes[f.address]
		one := Remote{Address: address(f.address).String(), Prefixes: table.Prefixes(f.address), State: f.state}
		if f.state == RemoteOK || f.state == RemoteUnreachable {
			one.PathMTU = r.path.MTU
		}
		if r.anyLocal() {
			one.LocalAddress = addressText(r.outer.Local)
		}
		if heard := r.remote.heard.Load(); heard != 0 {
			one.LastHeard = t.epoch.Add(time.Duration(heard))
		}
		if fast := t.many.fastHeard(f.address); fast.After(one.LastHeard) {
			one.LastHeard = fast
		}
		all.List = append(all.List, one)
	}
	return all
}

// loopDetail names the lowest of the remotes that are routed into the interface; "" if no loop was seen.
func (c *control) loopDetail() string {
	var first [4]byte
	n := 0
	if c.many != nil && c.looped.n.Load() != 0 {
		for g, r := range c.remotes {
			if a := r.follower.Answer(); a.Err == nil && c.intoItself(&a.Route) {
				if n++; n == 1 || bytes.Compare(g[:], first[:]) < 0 {
					first = g
				}
			}
		}
	}
	switch n {
	case 0:
		return ""
	case 1:
		return "those to " + addressText(first)
	}
	return fmt.Sprintf("those to %v and %d more", address(first), n-1)
}

// remoteState returns Remote.State of the remote that r leads to. device is the ifindex of the tunnel.
func (r *route) remoteState(device int) string {
	a := r.remote.follower.Answer()
	switch {
	case a.Err == nil && a.Route.Local:
		return RemoteLocal
	case a.Err == nil && device != 0 && a.Route.Device == device:
		return RemoteLoop
	case r.txDrop == drop.NoPath, errors.As(a.Err, new(*netstate.NoRouteError)), errors.As(a.Err, new(*netstate.NoDeviceError)):
		return RemoteNoPath
	case r.unreachable:
		return RemoteUnreachable
	}
	return RemoteOK
}
