// RFC 2003 encapsulation and decapsulation for the packets that need nothing special.
//
//   ipip_encap  a tc filter on the egress of a tunnel's TUN device: pushes the outer header
//               and redirects the packet to the next hop on the underlay.
//   ipip_decap  on the tcx ingress of an underlay device, for all tunnels over it: pulls
//               the outer header and redirects the packet to the TUN's ingress.
//
// Any packet that is not eligible passes unchanged (TCX_NEXT) to the userspace data path,
// which implements every rule, and counts each drop by its reason. Dropped here is only what
// lacks memory after the outer header has been pushed, and what of a tunnel with many remotes
// is surely from one who may not send: made-up sources would else cost userspace their packets.
//
// Packets on the TUN have no link layer header, those on the underlay an Ethernet header.

#include "helpers.h"

// Missing in the linux/bpf.h of some distributions. A tc filter has the same values, as
// TC_ACT_UNSPEC and TC_ACT_SHOT.
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

#define VERSION_IHL 0x45 // IPv4, 20 byte header
#define HEADER_LEN 20
#define MAX_LEN 65535
#define FLAG_DF 0x4000
#define FRAGMENT_MASK 0x3fff // MF and fragment offset
#define OFFSET_MASK 0x1fff

#define TCP_DATA_OFFSET 12
#define TCP_FLAGS 13
#define TCP_SYN 0x02

#define ECN_MASK 3
#define ECT1 1
#define ECT0 2
#define CE 3

// struct iphdr without bit fields.
struct ipv4 {
	__u8 version_ihl, tos;
	__be16 total_len, id, fragment;
	__u8 ttl, protocol;
	__u16 checksum;
	__be32 source, destination;
};

// link_header is the length in bytes of the link layer header of packets on egress: none
// on a TUN. Tests set 14, since BPF_PROG_TEST_RUN needs an Ethernet header.
const volatile __u32 link_header = 0;

// alive_until is when the process is taken for dead, unless it has set this anew: CLOCK_MONOTONIC in ns.
// From then on all packets go to userspace: see orphaned.
volatile __u64 alive_until = ~0ULL;

// The time costs 20 ns: ipip_encap, which has no other need of it, looks once in as many packets.
#define CHECK_ALIVE 64

#define ID_BASE 0x8000 // IDs allocated here; userspace has the lower half

#define MAX_TUNNELS 4096

// tx_tunnel is how to encapsulate for a tunnel, and where to send.
struct tx_tunnel {
	__be32 local, remote;
	__be32 next_hop;
	__u32 underlay_ifindex;
	__u32 path_mtu; // bytes: the largest outer packet
	__u32 slot; // index in counters and ip_ids
	__u8 tos_mask, tos_set;
	__u8 ttl; // 0 copies the inner TTL
	__u8 flags;
	__u32 capture; // CAPTURE_BYTES and CAPTURE_DROPS; 0 is no capture
	__u32 table; // of its routes, with TX_MANY
};

#define TX_ENABLED 1	// otherwise all packets go to userspace
#define TX_INHERIT_DF 2	// otherwise DF is 0
#define TX_MANY 4	// outer addresses, next hop, device and path MTU are those of the packet's route

// tx_tunnels is keyed by the ifindex of the TUN.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_TUNNELS);
	__type(key, __u32);
	__type(value, struct tx_tunnel);
} tx_tunnels SEC(".maps");

// rx_key is the outer addresses of a received packet.
struct rx_key {
	__be32 source, destination;
};

// rx_tunnel is how to decapsulate for a tunnel.
struct rx_tunnel {
	__u32 tun_ifindex;
	__u32 tun_mtu; // bytes
	__u32 slot; // index in counters
	__u32 underlay_ifindex;
	// Inner addresses of replies to the keepalive's echo probes; 0 is none.
	__be32 echo_source, echo_destination;
	__u32 flags;
	__u32 capture; // as of tx_tunnel
	__u32 table; // of its routes, with RX_MANY
};

#define RX_ENABLED 1	// otherwise all packets go to userspace
#define RX_CLAMP_MSS 2	// SYN and SYN-ACK go to userspace, which clamps the MSS
#define RX_MANY 4	// the remote is any: see may_send

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_TUNNELS);
	__type(key, struct rx_key);
	__type(value, struct rx_tunnel);
} rx_tunnels SEC(".maps");

// counters of a tunnel: inner packets and bytes. A GSO packet counts as its segments,
// headers included.
struct counters {
	__u64 rx_packets, rx_bytes;
	__u64 last_received; // CLOCK_MONOTONIC in ns, accurate to a tick
	__u64 tx_packets, tx_bytes;
	__u64 tx_failed; // drop.SendFailed
	// Packets of who may not send, a GSO packet as one: drop.ReversePath, NotInAcceptFrom
	// and NotInAcceptTo.
	__u64 reverse_path, not_in_accept_from, not_in_accept_to;
	__u64 orphaned; // skbs passed to userspace after alive_until
	// Packets that a capture has no room for, in either direction: that would be there as inner and outer
	// packet, and those above.
	__u64 not_captured, drops_not_captured;
	__u64 no_room; // the tick of the last of these
};

#include "capture.h"
#include "many.h"

// Array lookups are inlined, hash lookups are calls: so each tunnel has a slot.
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, MAX_TUNNELS);
	__type(key, __u32);
	__type(value, struct counters);
} counters SEC(".maps");

// ip_ids holds the ID of the next outer packet with DF=0, in its low 15 bits. All CPUs
// share it.
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_TUNNELS);
	__type(key, __u32);
	__type(value, __u32);
} ip_ids SEC(".maps");

// slot is whose a slot is, for the process that comes next. No program reads it.
struct slot {
	__u32 ifindex; // of the TUN; 0 is none
	__u32 orphaned; // as the process has last said
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_TUNNELS);
	__type(key, __u32);
	__type(value, struct slot);
} slots SEC(".maps");

// ip_header_sum is the folded one's complement sum of a header: 0xffff if its checksum is
// correct.
static __always_inline __u16 ip_header_sum(const struct ipv4 *h)
{
	const __u32 *w = (const __u32 *)h;
	__u64 sum = (__u64)w[0] + w[1] + w[2] + w[3] + w[4];

	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

// read_header copies packet bytes to `to`. from points at offset in the linear data; if
// the bytes are not there (a page fragment), a helper reads them.
#define read_header(skb, from, offset, to)                                          \
	((void *)(from) + sizeof(to) <= (void *)(long)(skb)->data_end               \
		 ? (__builtin_memcpy(&(to), from, sizeof(to)), 0)                   \
		 : bpf_skb_load_bytes(skb, offset, &(to), sizeof(to)))

// gso_segments returns the number of segments of a GSO packet, and in *header the length
// of the headers of each, IPv4 included. It returns 1 for an ordinary packet and 0 for a
// GSO packet to leave to userspace. offset is that of the inner packet.
static __always_inline __u32 gso_segments(struct __sk_buff *skb, const struct ipv4 *inner, __u32 offset, __u32 length, __u32 *header)
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
	if (!n) // SKB_GSO_DODGY: not yet computed by the kernel
		n = (length - *header + size - 1) / size;
	return n;
}

// alloc_ids allocates n successive IDs, since GSO increments the ID per segment, and
// returns the first. None is 0.
static __always_inline __u16 alloc_ids(__u32 slot, __u32 n)
{
	__u32 *next = bpf_map_lookup_elem(&ip_ids, &slot);

	if (!next)
		return ID_BASE;
#pragma unroll
	for (int i = 0; i < 3; i++) {
		__u32 first = ID_BASE | (__sync_fetch_and_add(next, n) & (ID_BASE - 1));

		if (first + n <= 0x10000)
			return first;
	}
	return ID_BASE;
}

// capture_sent captures a packet that has been encapsulated; at is the offset of the inner one.
static __always_inline void capture_sent(struct __sk_buff *skb, __u32 slot, struct counters *c, const struct ipv4 *outer, __u32 captured, __u8 why, __u32 at)
{
	struct capture_record r = { .direction = CAPTURE_OUT, .why = why, .length = bpf_ntohs(outer->total_len), .outer = *outer };

	r.kept = captured & CAPTURE_BYTES;
	c->not_captured += capture(skb, slot, c, &r, at);
}

SEC("tc")
int ipip_encap(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex, length = skb->len - link_header, header, n;
	struct bpf_redir_neigh hop = { .nh_family = AF_INET };
	void *at = (void *)(long)skb->data;
	__u32 slot, underlay_ifindex, path_mtu;
	struct ipv4 inner, outer;
	struct counters *c;
	struct tx_tunnel *tx;
	__be32 source, remote;
	__u32 captured;

	if (skb->protocol != bpf_htons(ETH_P_IP) || skb->vlan_present)
		return TCX_NEXT;
	tx = bpf_map_lookup_elem(&tx_tunnels, &ifindex);
	if (!tx || !(tx->flags & TX_ENABLED))
		return TCX_NEXT;
	slot = tx->slot;
	captured = tx->capture;
	c = bpf_map_lookup_elem(&counters, &slot);
	if (link_header) { // only constant pointer arithmetic without CAP_PERFMON
		at += ETH_HLEN;
		asm volatile("" : "+r"(at));
	}
	if (!c)
		return TCX_NEXT;
	if (!(c->tx_packets % CHECK_ALIVE) && bpf_ktime_get_coarse_ns() > alive_until) {
		c->orphaned++;
		return TCX_NEXT;
	}
	if (read_header(skb, at, link_header, inner))
		return TCX_NEXT;
	if (inner.version_ihl != VERSION_IHL || bpf_ntohs(inner.total_len) != length)
		return TCX_NEXT;
	if (!inner.ttl) // RFC 2003, section 3.1
		return TCX_NEXT;
	source = tx->local;
	remote = tx->remote;
	hop.ipv4_nh = tx->next_hop;
	underlay_ifindex = tx->underlay_ifindex;
	path_mtu = tx->path_mtu;
	if (tx->flags & TX_MANY) {
		struct remote to;

		if (!remote_for(tx->table, inner.destination, &to))
			return TCX_NEXT;
		source = to.source;
		remote = to.address;
		hop.ipv4_nh = to.next_hop;
		underlay_ifindex = to.underlay_ifindex;
		path_mtu = to.path_mtu;
	}
	// Loops: RFC 2003, section 3.2. A nested tunnel may hide one.
	if (inner.source == remote || inner.protocol == PROTO_IPIP ||
	    (inner.source == source && inner.destination == remote))
		return TCX_NEXT;
	n = gso_segments(skb, &inner, link_header, length, &header);
	if (!n || HEADER_LEN + length > MAX_LEN)
		return TCX_NEXT;
	if (HEADER_LEN + (skb->gso_size ? header + skb->gso_size : length) > path_mtu)
		return TCX_NEXT;

	outer.version_ihl = VERSION_IHL;
	outer.tos = (inner.tos & tx->tos_mask) | tx->tos_set;
	outer.total_len = bpf_htons(HEADER_LEN + length);
	outer.fragment = tx->flags & TX_INHERIT_DF ? inner.fragment & bpf_htons(FLAG_DF) : 0;
	outer.id = 0;
	outer.ttl = tx->ttl ? tx->ttl : inner.ttl;
	outer.protocol = PROTO_IPIP;
	outer.checksum = 0;
	outer.source = source;
	outer.destination = remote;
	if (!outer.fragment)
		outer.id = bpf_htons(alloc_ids(slot, n));
	outer.checksum = ~ip_header_sum(&outer);

	// On error the packet is unchanged: skb->encapsulation is already set, or its GSO
	// type cannot be encapsulated.
	if (bpf_skb_adjust_room(skb, HEADER_LEN, BPF_ADJ_ROOM_MAC,
				BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_FIXED_GSO))
		return TCX_NEXT;
	// bpf_redirect_neigh pulls an Ethernet header.
	if (bpf_skb_store_bytes(skb, link_header, &outer, sizeof(outer), 0) ||
	    (!link_header && bpf_skb_change_head(skb, ETH_HLEN, 0))) {
		c->tx_failed += n;
		if (captured)
			capture_sent(skb, slot, c, &outer, captured, CAPTURE_SEND_FAILED, link_header + HEADER_LEN);
		return TCX_DROP;
	}
	if (captured && !(captured & CAPTURE_DROPS))
		capture_sent(skb, slot, c, &outer, captured, 0, ETH_HLEN + HEADER_LEN);
	skb->mark = 0; // the mark belongs to the inner packet
	c->tx_packets += n;
	c->tx_bytes += length + (n - 1) * header;
	return bpf_redirect_neigh(underlay_ifindex, &hop, sizeof(hop), 0);
}

SEC("tcx/ingress")
int ipip_decap(struct __sk_buff *skb)
{
	__u32 length = skb->len - ETH_HLEN - HEADER_LEN, tun_ifindex, device, slot, header, n;
	const __u32 at = ETH_HLEN + HEADER_LEN; // offset of the inner packet
	void *data = (void *)(long)skb->data;
	struct { struct ipv4 outer, inner; } h;
	struct rx_key key;
	struct counters *c;
	__u8 inner_ecn, outer_ecn, tcp_flags;
	struct remote *remote = 0, from;
	__u32 table, number = MAX_REMOTES;
	struct rx_tunnel *rx;
	__u32 captured, changed = 0; // 1, TOS and checksum of a capture_record
	__u64 now;
	int whole, listed = 0;

	if (skb->protocol != bpf_htons(ETH_P_IP) || skb->pkt_type != PACKET_HOST || skb->vlan_present)
		return TCX_NEXT;
	if (read_header(skb, data + ETH_HLEN, ETH_HLEN, h.outer))
		return TCX_NEXT;
	if (h.outer.version_ihl != VERSION_IHL || h.outer.protocol != PROTO_IPIP || h.outer.destination == ANY_LOCAL)
		return TCX_NEXT;
	key.source = h.outer.source;
	key.destination = h.outer.destination;
	rx = bpf_map_lookup_elem(&rx_tunnels, &key);
	if (!rx) {
		key.source = ANY_REMOTE;
		rx = bpf_map_lookup_elem(&rx_tunnels, &key);
		if (!rx) {
			key.destination = ANY_LOCAL;
			rx = bpf_map_lookup_elem(&rx_tunnels, &key);
			key.destination = h.outer.destination;
			if (rx && !bpf_map_lookup_elem(&local_addresses, &key.destination))
				return TCX_NEXT;
		}
		key.source = h.outer.source;
	}
	if (!rx || !(rx->flags & RX_ENABLED))
		return TCX_NEXT;
	tun_ifindex = rx->tun_ifindex;
	table = rx->table;
	device = rx->underlay_ifindex;
	asm volatile("" : "+r"(device)); // no choice between pointers, which the verifier refuses
	if (rx->flags & RX_MANY) {
		remote = remote_of(table, key.source, &from, &number);
		if (rx->flags & RX_ACCEPT_FROM) {
			__u32 *by = listed_by(&accept_from, tun_ifindex, key.source);

			if (by) {
				listed = 1;
				device = *by;
			}
		}
		if (remote)
			device = from.underlay_ifindex;
	}
	// A packet from another device goes to userspace, after the stack's rp_filter.
	if (skb->ifindex != device)
		return TCX_NEXT;
	slot = rx->slot;
	c = bpf_map_lookup_elem(&counters, &slot);
	if (!c)
		return TCX_NEXT;
	now = bpf_ktime_get_coarse_ns();
	if (now > alive_until) {
		c->orphaned++;
		return TCX_NEXT;
	}
	whole = !read_header(skb, data + ETH_HLEN + HEADER_LEN, at, h.inner);
	if (rx->flags & RX_MANY) {
		// Whatever is inside, and in each fragment: fib.Acceptance.CheckSender. The IP stack drops what has
		// another checksum, and nobody knows who sent it.
		if (!remote && !listed && !is_direct(table, key.source))
			return ip_header_sum(&h.outer) != 0xffff ? TCX_NEXT : refuse(skb, rx, c, refusal(rx->flags), &h.outer);
	}
	if (!whole || h.outer.fragment & bpf_htons(FRAGMENT_MASK)) // an empty keepalive probe, for one
		return TCX_NEXT;

	// Padding behind either total length is trimmed by userspace.
	if (bpf_ntohs(h.outer.total_len) != length + HEADER_LEN || ip_header_sum(&h.outer) != 0xffff)
		return TCX_NEXT;
	if (h.inner.version_ihl != VERSION_IHL || bpf_ntohs(h.inner.total_len) != length ||
	    ip_header_sum(&h.inner) != 0xffff || !h.inner.ttl)
		return TCX_NEXT;
	// Keepalive probes, or packets that look like one: behind a NAT its source is another.
	// And a packet of this tunnel nested in itself, which would come back here at each level.
	if (h.inner.source == key.destination ||
	    (h.inner.protocol == PROTO_IPIP &&
	     (h.inner.destination == key.source || (h.inner.source == key.source && h.inner.destination == key.destination))))
		return TCX_NEXT;
	if (length > rx->tun_mtu && !skb->gso_size) // bpf_redirect would drop it: larger than the TUN's MTU
		return TCX_NEXT;
	if (!(h.inner.fragment & bpf_htons(OFFSET_MASK))) {
		if (h.inner.protocol == PROTO_TCP && rx->flags & RX_CLAMP_MSS) {
			if (bpf_skb_load_bytes(skb, at + HEADER_LEN + TCP_FLAGS, &tcp_flags, 1) || tcp_flags & TCP_SYN)
				return TCX_NEXT;
		}
		if (h.inner.protocol == PROTO_ICMP && h.inner.source == rx->echo_source &&
		    h.inner.destination == rx->echo_destination)
			return TCX_NEXT;
	}
	if (remote && !(from.flags & REMOTE_RX))
		return TCX_NEXT;
	n = gso_segments(skb, &h.inner, at, length, &header);
	if (!n)
		return TCX_NEXT;

	// RFC 6040, section 4.2: the inner codepoint changes to CE, or from ECT(0) to
	// ECT(1).
	inner_ecn = h.inner.tos & ECN_MASK;
	outer_ecn = h.outer.tos & ECN_MASK;
	if (outer_ecn == CE && !inner_ecn) // userspace drops and counts it
		return TCX_NEXT;
	if (rx->flags & RX_MANY) {
		__u32 why = may_send(rx->flags, tun_ifindex, table, number, listed, key.source, h.inner.source, h.inner.destination);

		if (why != MAY_SEND)
			return refuse(skb, rx, c, why, &h.outer);
	}
	captured = rx->capture;
	if ((outer_ecn == CE && inner_ecn != CE) || (outer_ecn == ECT1 && inner_ecn == ECT0)) {
		// RFC 1624, equation 3, on the first word: version, IHL, TOS.
		__u32 sum = (__u16)~bpf_ntohs(h.inner.checksum);

		changed = 1 << 24 | h.inner.tos << 16 | h.inner.checksum;
		sum += (__u16)~(VERSION_IHL << 8 | h.inner.tos);
		h.inner.tos = (h.inner.tos & ~ECN_MASK) | outer_ecn;
		sum += VERSION_IHL << 8 | h.inner.tos;
		sum = (sum & 0xffff) + (sum >> 16);
		sum = (sum & 0xffff) + (sum >> 16);
		h.inner.checksum = bpf_htons((__u16)~sum);
		if (bpf_skb_store_bytes(skb, at, &h.inner, sizeof(h.inner), 0))
			return TCX_NEXT;
	}
	// IPIP has no checksum, so what the NIC verified is the inner one, and stays valid
	// (NO_CSUM_RESET). On error userspace merges the ECN again, which is idempotent.
	if (bpf_skb_adjust_room(skb, -HEADER_LEN, BPF_ADJ_ROOM_MAC,
				DECAP_L3_IPV4 | BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_NO_CSUM_RESET))
		return TCX_NEXT;
	c->rx_packets += n;
	c->rx_bytes += length + (n - 1) * header;
	if (captured && !(captured & CAPTURE_DROPS)) {
		struct capture_record r = { .direction = CAPTURE_IN, .length = HEADER_LEN + length, .outer = h.outer };

		r.kept = captured & CAPTURE_BYTES;
		r.changed = changed >> 24;
		r.tos = changed >> 16;
		r.checksum = changed;
		c->not_captured += capture(skb, slot, c, &r, ETH_HLEN);
	}
	if (c->last_received != now)
		c->last_received = now;
	if (remote && remote->last_received != now)
		remote->last_received = now;
	return bpf_redirect(tun_ifindex, BPF_F_INGRESS);
}

char _license[] SEC("license") = "Dual MIT/GPL";
