package netstate

import (
	"encoding/binary"
	"errors"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"ipipd/internal/fib"
)

// nexthop is a next-hop object (RTM_NEWNEXTHOP), which routes refer to by its ID.
type nexthop struct {
	hopOf
	blackhole bool
	group     []nexthopMember // of a group, which has no next hop of its own; else nil
}

type nexthopMember struct {
	id     uint32
	weight int
}

// From linux/nexthop.h.
const (
	sizeofNhmsg  = 8
	nhaID        = 1
	nhaGroup     = 2
	nhaBlackhole = 4
	nhaOIF       = 5
	nhaGateway   = 6
	nhaEncapType = 7
	nhaFDB       = 11
)

// parseNexthop reads an RTM_NEWNEXTHOP or RTM_DELNEXTHOP that starts at its nhmsg.
func parseNexthop(b []byte) (id uint32, n nexthop, ok bool) {
	if len(b) < sizeofNhmsg {
		return 0, n, false
	}
	family := b[0]
	n.weight = 1
	err := eachAttr(b[sizeofNhmsg:], func(kind uint16, value []byte) error {
		switch kind {
		case nhaID:
			id = u32(value)
		case nhaOIF:
			n.device = int(u32(value))
		case nhaGateway:
			n.gateway = address(value)
			n.unusable = n.unusable || family != unix.AF_INET
		case nhaEncapType, nhaFDB:
			n.unusable = true
		case nhaBlackhole:
			n.blackhole = true
		case nhaGroup:
			n.group = []nexthopMember{}
			for ; len(value) >= 8; value = value[8:] { // struct nexthop_grp: id, weight - 1 in 8 and, from Linux 6.12, 8 more bits
				n.group = append(n.group, nexthopMember{binary.NativeEndian.Uint32(value), int(value[4]) + int(value[5])<<8 + 1})
			}
		}
		return nil
	})
	return id, n, err == nil && id != 0
}

// hops returns the next hops of a next-hop object out of an interface. known is false if the object, or a
// member of its group, is not in memory.
func (h *Host) hops(id uint32, device int) (hops []fib.Hop, blackhole, known bool) {
	n, known := h.mirrors.nexthops[id]
	switch {
	case !known:
	case n.group == nil:
		if n.device == device {
			hops = []fib.Hop{n.hop()}
		}
		blackhole = n.blackhole
	default:
		for _, member := range n.group {
			one, ok := h.mirrors.nexthops[member.id]
			known = known && ok
			switch {
			case !ok || one.group != nil:
			case one.blackhole: // alone in its group
				blackhole = true
			case one.device == device:
				one.weight = member.weight
				hops = append(hops, one.hop())
			}
		}
	}
	return hops, blackhole, known
}

// nexthopMessage handles a message about a next-hop object, for the RouteFollowers.
func (h *Host) nexthopMessage(m message) {
	if h.mirrors.nexthops == nil {
		return
	}
	id, next, ok := parseNexthop(m.body)
	if !ok {
		return
	}
	changed := []uint32{id}
	for group, n := range h.mirrors.nexthops {
		for _, member := range n.group {
			if member.id == id {
				changed = append(changed, group)
			}
		}
	}
	led := map[*RouteFollower][]bool{}
	for f := range h.mirrors.followers {
		for _, id := range changed {
			_, existed := h.mirrors.nexthops[id]
			led[f] = append(led[f], !existed || f.mirrorsNexthop(id))
		}
	}
	if m.kind == unix.RTM_NEWNEXTHOP {
		h.mirrors.nexthops[id] = next
	} else {
		delete(h.mirrors.nexthops, id)
	}
	for f := range h.mirrors.followers {
		for i, id := range changed {
			if !led[f][i] && f.mirrorsNexthop(id) {
				h.mirrors.stale = true // the routes by it led out of other interfaces and are not in the mirror
			}
			f.nexthopChanged(id)
		}
	}
}

// mirrorsNexthop reports whether routes by a next-hop object belong in the mirror.
func (m *RouteFollower) mirrorsNexthop(id uint32) bool {
	hops, blackhole, _ := m.host.hops(id, m.device)
	return blackhole || len(hops) > 0
}

// nexthopChanged updates the hops of the routes by a next-hop object, or removes the routes if it has none out
// of the interface any more.
func (m *RouteFollower) nexthopChanged(id uint32) {
	hops, blackhole, _ := m.host.hops(id, m.device)
	users := m.byNexthop[id]
	prefixes := make([]prefixKey, 0, len(users))
	for p := range users {
		prefixes = append(prefixes, p)
	}
	for _, p := range prefixes {
		for i := range m.prefixes[p] {
			s := &m.prefixes[p][i]
			for at := len(s.routes) - 1; at >= 0; at-- {
				r := followedRoute{prefix: p, mirrored: s.routes[at]}
				if r.nexthop != id {
					continue
				}
				if r.hops, r.unreachable = hops, blackhole; blackhole || len(hops) > 0 {
					m.update(s, at, &r)
					continue
				}
				m.delete(p, s, at)
				s.mixed, s.first = true, s.first && at > 0 // the route leads out of another interface now, or is gone
			}
		}
		m.prune(p)
	}
}

// readNexthops reads all next-hop objects. A kernel before 5.3 has none.
func (h *Host) readNexthops() error {
	all := map[uint32]nexthop{}
	req := nl.NewNetlinkRequest(unix.RTM_GETNEXTHOP, unix.NLM_F_DUMP)
	req.AddData(nhmsg{})
	err := h.readAll(req, unix.RTM_NEWNEXTHOP, func(b []byte) {
		if id, n, ok := parseNexthop(b); ok {
			all[id] = n
		}
	})
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		return err
	}
	h.mirrors.nexthops = all
	return nil
}

// nhmsg is an empty struct nhmsg.
type nhmsg struct{}

func (nhmsg) Len() int          { return sizeofNhmsg }
func (nhmsg) Serialize() []byte { return make([]byte, sizeofNhmsg) }
