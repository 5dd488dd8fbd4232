// IP in IP (RFC 2003) in the kernel: what the userspace path of the tunnel does to
// a plain packet, done where the packet is.
//
//   send     on the egress of a tunnel's TUN device: puts the outer header in front
//            and hands the packet to the underlay's neighbour.
//   receive  on the ingress of an underlay device, for all tunnels over it: takes
//            the outer header off and hands the packet to the TUN as received.
//
// Both keep the packet as it is and let it go on (TCX_NEXT) if anything about it
// is not plain: it then takes the userspace path, which has every rule, drops what
// is to be dropped, and counts that by its reason. So there is no verdict here that
// loses a packet of a tunnel, but one: where the kernel has no memory for the last
// header.
//
// Offsets: in front of a TUN's packet there is no link layer header, in front of
// the underlay's an Ethernet header.

#include "helpers.h"

// Newer than the headers of some distributions.
#define TCX_NEXT -1
#define TCX_DROP 2
#define DECAP_L3_IPV4 (1ULL << 7) // BPF_F_ADJ_ROOM_DECAP_L3_IPV4, Linux 6.3

#define AF_INET 2
#define ETH_HLEN 14
#define ETH_P_IP 0x0800
#define PACKET_HOST 0

#define PROTO_ICMP 1
#define PROTO_IPIP 4
#define PROTO_TCP 6
#define PROTO_UDP 17

#define VERSION_IHL 0x45 // version 4, a header of 20 bytes
#define HEADER_LEN 20
#define MAX_LEN 65535
#define FLAG_DF 0x4000
#define FRAGMENT_MASK 0x3fff // MF and the offset
#define OFFSET_MASK 0x1fff

#define TCP_DATA_OFFSET 12
#define TCP_FLAGS 13
#define TCP_SYN 0x02

#define ECN_MASK 3
#define ECT1 1
#define ECT0 2
#define CE 3

// struct iphdr without its bit fields.
struct ipv4 {
	__u8 version_ihl, tos;
	__be16 total_len, id, fragment;
	__u8 ttl, protocol;
	__u16 checksum;
	__be32 source, destination;
};

// link_header is how many bytes stand in front of the packets that send sees: none
// on a TUN. The kernel's way of running a program on a packet of a test has an
// Ethernet header.
const volatile __u32 link_header = 0;

#define FIRST_ID 0x8000 // of those that are given out here

#define MAX_TUNNELS 4096

// path is how a tunnel makes its outer headers, and where they go.
struct path {
	__be32 local, remote;
	__be32 next_hop;
	__u32 device; // the underlay's
	__u32 mtu;    // of the path, in bytes: the largest outer packet
	__u32 slot;   // in counts and identifiers
	__u8 tos_keep, tos_set;
	__u8 ttl; // 0 keeps the inner one
	__u8 flags;
};

#define PATH_SEND 1		// or all goes to userspace
#define PATH_INHERIT_DF 2	// else DF is 0

// paths is keyed by the index of the TUN.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_TUNNELS);
	__type(key, __u32);
	__type(value, struct path);
} paths SEC(".maps");

// addresses are those of an outer packet as it is received.
struct addresses {
	__be32 source, destination;
};

// end is this end of a tunnel, for what is received.
struct end {
	__u32 device; // the TUN's
	__u32 mtu;    // the TUN's, in bytes
	__u32 slot;   // in counts
	__u32 underlay; // the device that its packets enter by
	// The keepalive's own echo replies have these addresses; 0 is none.
	__be32 echo_source, echo_destination;
	__u32 flags;
};

#define END_RECEIVE 1	// or all goes to userspace
#define END_CLAMP 2	// MSS options are lowered: by userspace

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_TUNNELS);
	__type(key, struct addresses);
	__type(value, struct end);
} ends SEC(".maps");

// counters of a tunnel. Packets and bytes are those of inner packets, a superpacket
// counting as the packets that it stands for.
struct counters {
	__u64 rx_packets, rx_bytes;
	__u64 heard; // when the last packet came: CLOCK_MONOTONIC in ns, to a tick
	__u64 tx_packets, tx_bytes;
	__u64 tx_failed; // DropSendFailed
};

// Arrays are looked up without a call; each tunnel has a slot in them.
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, MAX_TUNNELS);
	__type(key, __u32);
	__type(value, struct counters);
} counts SEC(".maps");

// identifiers has the ID of the next outer packet with DF=0, in its low 15 bits: the
// lower half of the IDs is for userspace. All processors share it.
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_TUNNELS);
	__type(key, __u32);
	__type(value, __u32);
} identifiers SEC(".maps");

// sum of the words of a header, folded: 0xffff for one whose checksum is right.
static __always_inline __u16 header_sum(const struct ipv4 *h)
{
	const __u32 *w = (const __u32 *)h;
	__u64 sum = (__u64)w[0] + w[1] + w[2] + w[3] + w[4];

	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

// copy reads bytes of a packet that begin at from, which is at that offset: from
// where they stand, or, where that is a page of its own, by a call.
#define copy(skb, from, offset, to)                                                        \
	((void *)(from) + sizeof(to) <= (void *)(long)(skb)->data_end                     \
		 ? (__builtin_memcpy(&(to), from, sizeof(to)), 0)                         \
		 : bpf_skb_load_bytes(skb, offset, &(to), sizeof(to)))

// segments is how many packets a superpacket stands for, and in *header the length
// of the headers, IPv4 included, that each of them has. An ordinary packet is 1; 0
// is a superpacket that is not for us. The inner packet begins at that offset.
static __always_inline __u32 segments(struct __sk_buff *skb, const struct ipv4 *inner, __u32 offset, __u32 length, __u32 *header)
{
	__u32 size = skb->gso_size, n = skb->gso_segs;
	__u8 tcp;

	*header = HEADER_LEN;
	if (!size)
		return 1;
	if (inner->fragment & bpf_htons(FRAGMENT_MASK))
		return 0;
	if (inner->protocol == PROTO_TCP) {
		if (bpf_skb_load_bytes(skb, offset + HEADER_LEN + TCP_DATA_OFFSET, &tcp, 1))
			return 0;
		*header += (tcp >> 4) * 4;
	} else if (inner->protocol == PROTO_UDP) {
		*header += 8;
	} else {
		return 0;
	}
	if (*header >= length)
		return 0;
	if (!n) // not known to a kernel that was told to trust nobody (SKB_GSO_DODGY)
		n = (length - *header + size - 1) / size;
	return n;
}

// next_id takes n successive identifiers, the kernel giving them to the segments
// of a superpacket one by one, and returns the first; none of them is 0.
static __always_inline __u16 next_id(__u32 slot, __u32 n)
{
	__u32 *next = bpf_map_lookup_elem(&identifiers, &slot);

	if (!next)
		return FIRST_ID;
#pragma unroll
	for (int i = 0; i < 3; i++) {
		__u32 first = FIRST_ID | (__sync_fetch_and_add(next, n) & (FIRST_ID - 1));

		if (first + n <= 0x10000)
			return first;
	}
	return FIRST_ID;
}

SEC("tcx/egress")
int send(struct __sk_buff *skb)
{
	__u32 device = skb->ifindex, length = skb->len - link_header, header, n;
	struct bpf_redir_neigh hop = { .nh_family = AF_INET };
	void *at = (void *)(long)skb->data;
	struct ipv4 inner, outer;
	struct counters *c;
	struct path *p;
	__u32 slot;

	if (skb->protocol != bpf_htons(ETH_P_IP) || skb->vlan_present)
		return TCX_NEXT;
	p = bpf_map_lookup_elem(&paths, &device);
	if (!p || !(p->flags & PATH_SEND))
		return TCX_NEXT;
	slot = p->slot;
	c = bpf_map_lookup_elem(&counts, &slot);
	if (link_header) { // a constant: without CAP_PERFMON the verifier wants no other
		at += ETH_HLEN;
		asm volatile("" : "+r"(at));
	}
	if (!c || copy(skb, at, link_header, inner))
		return TCX_NEXT;
	if (inner.version_ihl != VERSION_IHL || bpf_ntohs(inner.total_len) != length)
		return TCX_NEXT;
	if (!inner.ttl) // RFC 2003, section 3.1
		return TCX_NEXT;
	// Loops, RFC 2003, section 3.2. A tunnel in the tunnel may hide one.
	if (inner.source == p->remote || inner.protocol == PROTO_IPIP ||
	    (inner.source == p->local && inner.destination == p->remote))
		return TCX_NEXT;
	n = segments(skb, &inner, link_header, length, &header);
	if (!n || HEADER_LEN + length > MAX_LEN)
		return TCX_NEXT;
	if (HEADER_LEN + (skb->gso_size ? header + skb->gso_size : length) > p->mtu)
		return TCX_NEXT;

	outer.version_ihl = VERSION_IHL;
	outer.tos = (inner.tos & p->tos_keep) | p->tos_set;
	outer.total_len = bpf_htons(HEADER_LEN + length);
	outer.fragment = p->flags & PATH_INHERIT_DF ? inner.fragment & bpf_htons(FLAG_DF) : 0;
	outer.id = 0;
	outer.ttl = p->ttl ? p->ttl : inner.ttl;
	outer.protocol = PROTO_IPIP;
	outer.checksum = 0;
	outer.source = p->local;
	outer.destination = p->remote;
	hop.ipv4_nh = p->next_hop;
	if (!outer.fragment)
		outer.id = bpf_htons(next_id(slot, n));
	outer.checksum = ~header_sum(&outer);

	// The packet is as it was if this fails: the stack has encapsulated it once
	// already, or it is of a kind that cannot be.
	if (bpf_skb_adjust_room(skb, HEADER_LEN, BPF_ADJ_ROOM_MAC,
				BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_FIXED_GSO))
		return TCX_NEXT;
	// bpf_redirect_neigh wants an Ethernet header to take away.
	if (bpf_skb_store_bytes(skb, link_header, &outer, sizeof(outer), 0) ||
	    (!link_header && bpf_skb_change_head(skb, ETH_HLEN, 0))) {
		c->tx_failed += n;
		return TCX_DROP;
	}
	skb->mark = 0; // the inner packet's; the outer one has none
	c->tx_packets += n;
	c->tx_bytes += length + (n - 1) * header;
	return bpf_redirect_neigh(p->device, &hop, sizeof(hop), 0);
}

SEC("tcx/ingress")
int receive(struct __sk_buff *skb)
{
	__u32 length = skb->len - ETH_HLEN - HEADER_LEN, device, slot, header, n;
	const __u32 at = ETH_HLEN + HEADER_LEN; // of the inner packet
	void *data = (void *)(long)skb->data;
	struct { struct ipv4 outer, inner; } h;
	struct addresses key;
	struct counters *c;
	__u8 inner_ecn, outer_ecn, tcp_flags;
	struct end *e;
	__u64 now;

	if (skb->protocol != bpf_htons(ETH_P_IP) || skb->pkt_type != PACKET_HOST || skb->vlan_present)
		return TCX_NEXT;
	if (copy(skb, data + ETH_HLEN, ETH_HLEN, h)) // an empty probe, or not ours
		return TCX_NEXT;
	if (h.outer.version_ihl != VERSION_IHL || h.outer.protocol != PROTO_IPIP ||
	    h.outer.fragment & bpf_htons(FRAGMENT_MASK))
		return TCX_NEXT;
	key.source = h.outer.source;
	key.destination = h.outer.destination;
	e = bpf_map_lookup_elem(&ends, &key);
	// A packet that enters by another tunnel's underlay is for userspace, behind
	// rp_filter.
	if (!e || !(e->flags & END_RECEIVE) || skb->ifindex != e->underlay)
		return TCX_NEXT;
	device = e->device;
	slot = e->slot;
	c = bpf_map_lookup_elem(&counts, &slot);
	if (!c)
		return TCX_NEXT;

	// Whatever is behind one of the total lengths has to be cut off first.
	if (bpf_ntohs(h.outer.total_len) != length + HEADER_LEN || header_sum(&h.outer) != 0xffff)
		return TCX_NEXT;
	if (h.inner.version_ihl != VERSION_IHL || bpf_ntohs(h.inner.total_len) != length ||
	    header_sum(&h.inner) != 0xffff || !h.inner.ttl)
		return TCX_NEXT;
	// Probes, whatever their destination, and what only looks like one. And a
	// packet of this tunnel inside one: each level would come back here.
	if (h.inner.source == key.destination ||
	    (h.inner.protocol == PROTO_IPIP && h.inner.source == key.source && h.inner.destination == key.destination))
		return TCX_NEXT;
	if (length > e->mtu && !skb->gso_size) // the kernel would drop it on its way into the TUN
		return TCX_NEXT;
	if (!(h.inner.fragment & bpf_htons(OFFSET_MASK))) {
		if (h.inner.protocol == PROTO_TCP && e->flags & END_CLAMP) {
			if (bpf_skb_load_bytes(skb, at + HEADER_LEN + TCP_FLAGS, &tcp_flags, 1) || tcp_flags & TCP_SYN)
				return TCX_NEXT;
		}
		if (h.inner.protocol == PROTO_ICMP && h.inner.source == e->echo_source &&
		    h.inner.destination == e->echo_destination)
			return TCX_NEXT;
	}
	n = segments(skb, &h.inner, at, length, &header);
	if (!n)
		return TCX_NEXT;

	// RFC 6040, section 4.2. The inner codepoint changes where the outer one is
	// CE, and from ECT(0) to ECT(1).
	inner_ecn = h.inner.tos & ECN_MASK;
	outer_ecn = h.outer.tos & ECN_MASK;
	if (outer_ecn == CE && !inner_ecn) // dropped, and counted, by userspace
		return TCX_NEXT;
	if ((outer_ecn == CE && inner_ecn != CE) || (outer_ecn == ECT1 && inner_ecn == ECT0)) {
		// RFC 1624, equation 3. The first word is version and TOS.
		__u32 sum = (__u16)~bpf_ntohs(h.inner.checksum);

		sum += (__u16)~(VERSION_IHL << 8 | h.inner.tos);
		h.inner.tos = (h.inner.tos & ~ECN_MASK) | outer_ecn;
		sum += VERSION_IHL << 8 | h.inner.tos;
		sum = (sum & 0xffff) + (sum >> 16);
		sum = (sum & 0xffff) + (sum >> 16);
		h.inner.checksum = bpf_htons((__u16)~sum);
		if (bpf_skb_store_bytes(skb, at, &h.inner, sizeof(h.inner), 0))
			return TCX_NEXT;
	}
	// IP in IP has no checksum of its own: what the NIC has verified is the inner
	// one, and stays so. If this fails the packet goes on with its ECN merged,
	// which may be done twice.
	if (bpf_skb_adjust_room(skb, -HEADER_LEN, BPF_ADJ_ROOM_MAC,
				DECAP_L3_IPV4 | BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_NO_CSUM_RESET))
		return TCX_NEXT;
	c->rx_packets += n;
	c->rx_bytes += length + (n - 1) * header;
	now = bpf_ktime_get_coarse_ns();
	if (c->heard != now)
		c->heard = now;
	return bpf_redirect(device, BPF_F_INGRESS);
}

char _license[] SEC("license") = "Dual MIT/GPL";
