// Interfaces with many remotes. Package fib has the same rules: the kernel's routes out of the
// interface say where an inner packet goes, and who may send it.

#define ANY_REMOTE 0xffffffff // as the source of an rx_key: any that no other key has
#define ANY_LOCAL 0 // as the destination, with ANY_REMOTE: any of local_addresses

#define MAX_ROUTES 131072
#define MAX_REMOTES 16384
#define MAX_PREFIXES 131072 // of accept-from, and of accept-to
#define MAX_LOCAL_ADDRESSES 16384

struct route_key {
	__u32 ifindex; // of the TUN
	__be32 address;
	__u32 length;
};

// tx_route is where the best route of a prefix leads.
struct tx_route {
	__u32 kind;
	__be32 remote; // of VIA
};

#define SEVERAL 0 // gateways: userspace chooses one for a flow
#define VIA 1 // remote
#define DIRECT 2 // the inner destination is the remote
#define NOWHERE 3 // userspace drops the packet, and counts it
#define MIXED 4 // SEVERAL, one of them the inner destination

// A route that changes is one write, which replaces the element: a packet is sent by the old
// route or by the new one. The kernel's LPM trie looks at a bit of the address for each node: with
// 10,000 prefixes that was 2 us a packet, most of it waiting for memory. Here it is a look-up for each
// length that there are prefixes of, until one has the address.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_ROUTES);
	__type(key, struct route_key);
	__type(value, struct tx_route);
} tx_fib SEC(".maps");

// prefix_lengths are those of the prefixes of an interface, the longest first, and NO_LENGTH behind
// the last one.
struct prefix_lengths {
	__u8 at[34];
};

#define NO_LENGTH 0xff

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_TUNNELS);
	__type(key, __u32); // ifindex of the TUN
	__type(value, struct prefix_lengths);
} tx_lengths SEC(".maps");

// prefix_key is a key of an LPM trie: the ifindex of a TUN, whole, and a prefix.
struct prefix_key {
	__u32 length; // bits: 32 and those of the prefix
	__u32 ifindex;
	__be32 address;
};

struct remote_key {
	__u32 ifindex; // of the TUN
	__be32 remote;
};

// remote is a gateway of any route.
struct remote {
	__u64 last_received; // as of counters
	__be32 source, next_hop; // source is the outer one of packets to it
	__u32 underlay_ifindex;
	__u16 path_mtu; // bytes: the largest outer packet
	__u16 flags;
};

// Without these its packets go to userspace.
#define REMOTE_TX 1
#define REMOTE_RX 2

// No array, whose elements are not replaced but written over: a packet would see a remote in part.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_REMOTES);
	__type(key, struct remote_key);
	__type(value, struct remote);
} remotes SEC(".maps");

// local_addresses are those of this host, of the interfaces in no VRF. Values mean nothing.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_LOCAL_ADDRESSES);
	__type(key, __be32);
	__type(value, __u32);
} local_addresses SEC(".maps");

// Prefixes of the lists accept-from and accept-to. The value of accept_from is the device by which
// these are received from, 0 for none; that of accept_to means nothing.
#define PREFIXES(name)                                                                  \
	struct {                                                                        \
		__uint(type, BPF_MAP_TYPE_LPM_TRIE);                                    \
		__uint(map_flags, BPF_F_NO_PREALLOC);                                   \
		__uint(max_entries, MAX_PREFIXES);                                      \
		__type(key, struct prefix_key);                                         \
		__type(value, __u32);                                                   \
	} name SEC(".maps")
PREFIXES(accept_from);
PREFIXES(accept_to);

// More flags of an rx_tunnel.
#define RX_ANY_PEER 8
#define RX_ACCEPT_FROM 16
#define RX_ACCEPT_TO 32
#define RX_REFUSE 64 // drop what may not be sent; otherwise userspace decides

// The verdicts of may_send.
#define MAY_SEND 0
#define UNSURE 1
#define REVERSE_PATH 2
#define NOT_IN_ACCEPT_FROM 3
#define NOT_IN_ACCEPT_TO 4

// listed_by returns the value of a list for an address, or 0.
#define listed_by(map, tun, of) \
	({ struct prefix_key key_ = { 64, tun, of }; (__u32 *)bpf_map_lookup_elem(map, &key_); })

// route_to returns the route of the longest prefix that has an address, or 0.
static __attribute__((noinline)) struct tx_route *route_to(__u32 ifindex, __be32 address)
{
	struct prefix_lengths *lengths = bpf_map_lookup_elem(&tx_lengths, &ifindex);
	struct route_key key = { ifindex, 0, 0 };
	struct tx_route *r;

	if (!lengths)
		return 0;
#pragma unroll // a variable offset in a value takes CAP_PERFMON
	for (int i = 0; i < 33; i++) {
		key.length = lengths->at[i];
		if (key.length == NO_LENGTH)
			return 0;
		key.address = address & bpf_htonl((__u32)(0xffffffff00000000ULL >> (key.length & 63)));
		r = bpf_map_lookup_elem(&tx_fib, &key);
		if (r)
			return r;
	}
	return 0;
}

// remote_of returns a remote by its address, or 0.
static __always_inline struct remote *remote_of(__u32 ifindex, __be32 address)
{
	struct remote_key key = { ifindex, address };

	return bpf_map_lookup_elem(&remotes, &key);
}

// remote_for returns the remote, and its address, that an inner destination is reached by, or 0.
static __always_inline struct remote *remote_for(__u32 ifindex, __be32 destination, __be32 *address)
{
	struct tx_route *r = route_to(ifindex, destination);

	if (!r || (r->kind != VIA && r->kind != DIRECT))
		return 0;
	*address = r->kind == VIA ? r->remote : destination;
	return remote_of(ifindex, *address);
}

// is_direct reports whether an address is reached by a route without a gateway.
static __always_inline int is_direct(__u32 ifindex, __be32 address)
{
	struct tx_route *r = route_to(ifindex, address);

	return r && (r->kind == DIRECT || r->kind == MIXED);
}

// may_send is fib.Acceptance.Check. remote is that of the outer source, or 0; listed whether accept_from
// has it.
static __always_inline __u32 may_send(__u32 flags, __u32 ifindex, struct remote *remote, int listed, __be32 source, __be32 inner_source, __be32 inner_destination)
{
	struct tx_route *r;

	if (flags & RX_ACCEPT_TO && !listed_by(&accept_to, ifindex, inner_destination))
		return NOT_IN_ACCEPT_TO;
	r = route_to(ifindex, inner_source);
	if (r && r->kind == VIA && r->remote == source)
		return MAY_SEND;
	if (r && r->kind == DIRECT && inner_source == source)
		return remote ? MAY_SEND : UNSURE; // rules of the host may apply to it
	if (listed)
		return MAY_SEND;
	if (flags & RX_ANY_PEER && remote)
		return MAY_SEND;
	if ((r && ((r->kind == SEVERAL && remote) || r->kind == MIXED)) || (flags & RX_ANY_PEER && is_direct(ifindex, source)))
		return UNSURE;
	return flags & (RX_ANY_PEER | RX_ACCEPT_FROM) ? NOT_IN_ACCEPT_FROM : REVERSE_PATH;
}

// refuse is what becomes of a packet that may_send does not let in.
static __always_inline int refuse(struct __sk_buff *skb, struct rx_tunnel *rx, struct counters *c, __u32 why, const struct ipv4 *outer)
{
	if (!(rx->flags & RX_REFUSE) || why == UNSURE)
		return TCX_NEXT;
	// No branches, of which the compiler makes a variable offset: that takes CAP_PERFMON.
	c->reverse_path += why == REVERSE_PATH;
	c->not_in_accept_from += why == NOT_IN_ACCEPT_FROM;
	c->not_in_accept_to += why == NOT_IN_ACCEPT_TO;
	if (rx->capture) {
		struct capture_record r = { .direction = CAPTURE_IN, .why = why, .length = skb->len - ETH_HLEN, .outer = *outer };

		r.kept = rx->capture & CAPTURE_BYTES;
		c->drops_not_captured += capture(skb, rx->slot, c, &r, ETH_HLEN + HEADER_LEN);
	}
	return TCX_DROP;
}
