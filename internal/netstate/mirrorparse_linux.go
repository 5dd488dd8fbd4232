package netstate

import (
	"encoding/binary"
	"hash/maphash"

	"golang.org/x/sys/unix"

	"ipipd/internal/fib"
)

// followedRoute is a route as a message or a dump has it, for one RouteFollower.
type followedRoute struct {
	prefix prefixKey
	spanKey
	mirrored
	// ours: it belongs in the mirror.
	ours bool
	// Flags of the message that tell the route's place in its span. exclusive: it is the only one.
	exclusive, replace, append bool
}

// contentSeed is the seed of the hashes mirrored.content.
var contentSeed = maphash.MakeSeed()

// parseFollowed reads an RTM_NEWROUTE or RTM_DELROUTE that starts at its rtmsg. ok is false for a route that
// is in no table (an exception, such as a learnt path MTU) or not of IPv4. known is false if its
// next-hop object is not in memory.
func (h *Host) parseFollowed(b []byte, device int, flags uint16) (r followedRoute, known, ok bool) {
	const bits, tos, table, protocol, kind, rtmFlags = 1, 3, 4, 5, 7, 8
	if len(b) < unix.SizeofRtMsg || b[0] != unix.AF_INET || binary.NativeEndian.Uint32(b[rtmFlags:])&unix.RTM_F_CLONED != 0 {
		return r, false, false
	}
	r.spanKey, r.protocol = spanKey{table: uint32(b[table]), tos: b[tos]}, b[protocol]
	r.exclusive, r.replace, r.append = flags&unix.NLM_F_EXCL != 0, flags&unix.NLM_F_REPLACE != 0, flags&unix.NLM_F_APPEND != 0
	var destination [4]byte
	single, several := hopOf{weight: 1}, false
	if eachAttr(b[unix.SizeofRtMsg:], func(kind uint16, value []byte) error {
		switch kind {
		case unix.RTA_DST:
			destination = address(value)
		case unix.RTA_TABLE:
			r.table = u32(value)
		case unix.RTA_PRIORITY:
			r.metric = u32(value)
		case unix.RTA_PREFSRC:
			r.source = address(value)
		case rtaNexthopID:
			r.nexthop = u32(value)
		case unix.RTA_MULTIPATH:
			several = true
			return eachNexthop(value, func(hop hopOf, _ []byte) {
				if hop.device == device {
					r.hops = append(r.hops, hop.hop())
				} else {
					r.partly = true
				}
			})
		default:
			single.attribute(kind, value)
		}
		return nil
	}) != nil {
		return r, false, false
	}
	r.prefix = prefixKeyOf(destination, int(b[bits]))
	known = true
	switch blackhole := b[kind] == unix.RTN_BLACKHOLE || b[kind] == unix.RTN_UNREACHABLE || b[kind] == unix.RTN_PROHIBIT; {
	case !blackhole && b[kind] != unix.RTN_UNICAST:
	case r.nexthop != 0: // RTA_OIF, RTA_GATEWAY and the like are for programs that know no next-hop objects
		r.hops, r.unreachable, known = h.hops(r.nexthop, device)
		r.ours = r.unreachable || len(r.hops) > 0
	case blackhole:
		r.unreachable, r.ours = true, true
	case several:
		r.ours = len(r.hops) > 0
	case single.device == device:
		r.hops, r.ours = []fib.Hop{single.hop()}, true
	}
	if r.ours {
		r.content = contentOf(b, r.nexthop != 0)
	}
	return r, known, true
}

// contentOf returns a hash of what the kernel tells the routes of a span apart by: not of flags nor, if there
// is a next-hop object, of the next hops.
func contentOf(b []byte, nexthop bool) uint64 {
	const protocol, scope, kind = 5, 6, 7
	var content maphash.Hash
	content.SetSeed(contentSeed)
	if content.Write([]byte{b[protocol], b[scope]}); !nexthop {
		content.WriteByte(b[kind])
	}
	_ = eachAttr(b[unix.SizeofRtMsg:], func(kind uint16, value []byte) error {
		switch kind {
		case unix.RTA_DST, unix.RTA_TABLE, unix.RTA_PRIORITY:
			return nil
		case unix.RTA_OIF, unix.RTA_GATEWAY, unix.RTA_VIA, unix.RTA_ENCAP, unix.RTA_ENCAP_TYPE, unix.RTA_MULTIPATH:
			if nexthop {
				return nil
			}
			if kind == unix.RTA_MULTIPATH {
				return eachNexthop(value, func(_ hopOf, b []byte) { content.Write(b) })
			}
		}
		content.Write([]byte{byte(kind), byte(len(value))})
		content.Write(value)
		return nil
	})
	return content.Sum64()
}

// hopOf is a next hop of a route.
type hopOf struct {
	device   int
	gateway  [4]byte
	unusable bool // not IPv4, or with an encapsulation (lwtunnel)
	weight   int
}

func (h *hopOf) hop() fib.Hop {
	return fib.Hop{Gateway: h.gateway, Weight: uint16(min(h.weight, 65535)), Unusable: h.unusable}
}

// attribute reads an attribute of a route or of an rtnexthop, if it is about the next hop.
func (h *hopOf) attribute(kind uint16, value []byte) {
	switch kind {
	case unix.RTA_OIF:
		h.device = int(u32(value))
	case unix.RTA_GATEWAY:
		h.gateway = address(value)
	case unix.RTA_VIA, unix.RTA_ENCAP, unix.RTA_ENCAP_TYPE: // an address of another family
		h.unusable = true
	}
}

// eachNexthop calls f with each next hop of an RTA_MULTIPATH, and with the bytes that tell it from others:
// those behind its flags, which say whether its interface is up.
func eachNexthop(b []byte, f func(hop hopOf, content []byte)) error {
	const hops, index = 3, 4
	for len(b) >= unix.SizeofRtNexthop {
		n := int(binary.NativeEndian.Uint16(b))
		if n < unix.SizeofRtNexthop || n > len(b) {
			return unix.EINVAL
		}
		hop := hopOf{weight: int(b[hops]) + 1, device: int(binary.NativeEndian.Uint32(b[index:]))}
		if err := eachAttr(b[unix.SizeofRtNexthop:n], func(kind uint16, value []byte) error {
			hop.attribute(kind, value)
			return nil
		}); err != nil {
			return err
		}
		f(hop, b[hops:n])
		b = b[min(len(b), align(n)):]
	}
	return nil
}
