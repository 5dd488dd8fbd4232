// Interfaces with many remotes. Package fib has the same rules: the kernel's routes out of the
// interface say where an inner packet goes, and who may send it.

#define ANY_REMOTE 0xffffffff // as the source of an rx_key: any that no other key has
#define ANY_LOCAL 0 // as the destination, with ANY_REMOTE: any of local_addresses

#define MAX_TABLES 4096 // of routes, one for each interface; 0 is none
#define MAX_PREFIXES 131072 // of accept-from, and of accept-to
#define MAX_LOCAL_ADDRESSES 16384

// A route is one word, so that one that changes is one write, and a packet is sent by the old route or by the new
// one: from the most significant bit on its prefix's address in host byte order (32 bits), the length of that (6),
// its table (12), and the number of its remote or one of the five below (14). 0 is a free place.
#define TO_BITS 14
#define TABLE_BITS 12
#define LENGTH_BITS 6

#define MAX_REMOTES 16376 // numbers are smaller
#define SEVERAL 16376 // gateways: userspace chooses one for a flow
#define DIRECT 16377 // the inner destination is the remote
#define NOWHERE 16378 // userspace drops the packet, and counts it
#define MIXED 16379 // SEVERAL, one of them the inner destination or without a number
#define NO_ROUTE 16380 // in no word

// tx_fib is a hash table that the process writes to in its memory. A route is in one of the two buckets that
// its hashes say, each a cache line: a look-up of what is in no cache waits for memory once. With 10,000 random
// prefixes and 1,000 remotes the kernel's LPM trie, which looks at a bit of the address for each node, took 2 us a
// packet, its hash tables, of lists of elements, 0.66, and these maps 0.26.
#define BUCKETS_LOG 15
#define BUCKET_ROUTES 8

struct route_bucket {
	__u64 routes[BUCKET_ROUTES];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1 << BUCKETS_LOG);
	__type(key, __u32);
	__type(value, struct route_bucket);
} tx_fib SEC(".maps");

// route_hash are odd and random, so that nobody can choose prefixes whose buckets are the same.
const volatile __u64 route_hash[2] = { 0x9e3779b97f4a7c15, 0xd6e8feb86659fd93 };

// tx_lengths has for each table a bit 1 << length for each length that there are prefixes of. The process writes
// to it in its memory.
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, MAX_TABLES);
	__type(key, __u32);
	__type(value, __u64);
} tx_lengths SEC(".maps");

// prefix_key is a key of an LPM trie: the ifindex of a TUN, whole, and a prefix.
struct prefix_key {
	__u32 length; // bits: 32 and those of the prefix
	__u32 ifindex;
	__be32 address;
};

struct remote_key {
	__u32 table; // of routes
	__be32 remote;
};

// numbers has the number of each gateway of any route.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_REMOTES);
	__type(key, struct remote_key);
	__type(value, __u32);
} numbers SEC(".maps");

// remote is a gateway of any route.
struct remote {
	struct bpf_spin_lock lock; // of all but last_received
	__be32 address;
	__u64 last_received; // as of counters
	__be32 source, next_hop; // source is the outer one of packets to it
	__u32 underlay_ifindex;
	__u16 path_mtu; // bytes: the largest outer packet
	__u16 flags;
};

// Without these its packets go to userspace.
#define REMOTE_TX 1
#define REMOTE_RX 2

// remotes are the gateways by their number. An array has them close to each other in memory.
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_REMOTES);
	__type(key, __u32);
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

// in_bucket returns the route in a bucket that has a key, the word without its last part, or 0. It has no
// branches: without CAP_PERFMON the verifier follows each as if it had been mispredicted, too.
static __always_inline __u64 in_bucket(__u32 bucket, __u64 key)
{
	struct route_bucket *b = bpf_map_lookup_elem(&tx_fib, &bucket);
	__u64 found = 0;

	if (!b)
		return 0;
#pragma unroll
	for (int i = 0; i < BUCKET_ROUTES; i++) {
		__u64 route = *(volatile __u64 *)&b->routes[i];
		__u64 same = (((route >> TO_BITS) ^ key) - 1) >> 63;

		asm volatile("" : "+r"(same)); // else the compiler makes branches of it
		found |= route & -same;
	}
	return found;
}

// Global functions are looked at once by the verifier, and not at each call.

// find_route returns the route of a key, or 0.
__attribute__((noinline)) __u64 find_route(__u64 key)
{
	__u64 hash = key * route_hash[0], route;

	hash = (hash ^ hash >> 32) * route_hash[1]; // one product would have prefixes that follow each other crowd
	route = in_bucket(hash >> (64 - BUCKETS_LOG), key);
	return route ? route : in_bucket(hash >> (64 - 2 * BUCKETS_LOG) & ((1 << BUCKETS_LOG) - 1), key);
}

// route_to returns where the route of the longest prefix that has an address leads, NO_ROUTE if none has.
__attribute__((noinline)) __u32 route_to(__u32 table, __be32 address)
{
	__u64 *at = bpf_map_lookup_elem(&tx_lengths, &table);
	__u64 lengths, key, route;

	if (!at)
		return NO_ROUTE;
	lengths = *(volatile __u64 *)at;
#pragma unroll // the end of a loop is a branch, too
	for (int length = 32; length >= 0; length--) {
		if (!(lengths & 1ULL << length))
			continue;
		key = bpf_htonl(address) & (__u32)(0xffffffff00000000ULL >> length);
		key = (key << LENGTH_BITS | length) << TABLE_BITS | table;
		route = find_route(key);
		if (route)
			return route & ((1 << TO_BITS) - 1);
	}
	return NO_ROUTE;
}

// number_of returns the number of a remote by its address, MAX_REMOTES if it has none.
static __always_inline __u32 number_of(__u32 table, __be32 address)
{
	struct remote_key key = { table, address };
	__u32 *number = bpf_map_lookup_elem(&numbers, &key);

	return number ? *number : MAX_REMOTES;
}

// read_remote returns the remote of a number, or 0, and copies what the lock guards: the process may be writing it.
static __always_inline struct remote *read_remote(__u32 number, struct remote *to)
{
	struct remote *r = bpf_map_lookup_elem(&remotes, &number);

	if (!r)
		return 0;
	bpf_spin_lock(&r->lock);
	to->address = r->address;
	to->source = r->source;
	to->next_hop = r->next_hop;
	to->underlay_ifindex = r->underlay_ifindex;
	to->path_mtu = r->path_mtu;
	to->flags = r->flags;
	bpf_spin_unlock(&r->lock);
	return r;
}

// remote_of returns a remote by its address, or 0.
static __always_inline struct remote *remote_of(__u32 table, __be32 address, struct remote *to, __u32 *number)
{
	struct remote *r;

	*number = number_of(table, address);
	r = read_remote(*number, to);
	if (r && to->address == address)
		return r;
	*number = MAX_REMOTES;
	return 0;
}

// remote_for copies the remote that an inner destination is reached by, and reports whether there is one that
// may be sent to.
static __always_inline int remote_for(__u32 table, __be32 destination, struct remote *to)
{
	__u32 number = route_to(table, destination);

	if (number == DIRECT)
		return remote_of(table, destination, to, &number) && to->flags & REMOTE_TX;
	return read_remote(number, to) && to->flags & REMOTE_TX;
}

// is_direct reports whether an address is reached by a route without a gateway.
static __always_inline int is_direct(__u32 table, __be32 address)
{
	__u32 to = route_to(table, address);

	return to == DIRECT || to == MIXED;
}

// refusal is the verdict on what may not be sent.
#define refusal(flags) ((flags) & (RX_ANY_PEER | RX_ACCEPT_FROM) ? NOT_IN_ACCEPT_FROM : REVERSE_PATH)

// may_send is fib.Acceptance.Check. remote is the number of the outer source, or MAX_REMOTES; listed whether
// accept_from has it.
static __always_inline __u32 may_send(__u32 flags, __u32 ifindex, __u32 table, __u32 remote, int listed, __be32 source, __be32 inner_source, __be32 inner_destination)
{
	int known = remote < MAX_REMOTES;
	__u32 to = route_to(table, inner_source);

	if (to == DIRECT && inner_source == source && !known)
		return UNSURE; // rules of the host may apply to it
	if (!(known && to == remote) && !(to == DIRECT && inner_source == source) && !listed && !(flags & RX_ANY_PEER && known)) {
		if ((to == SEVERAL && known) || to == MIXED || (flags & RX_ANY_PEER && is_direct(table, source)))
			return UNSURE;
		return refusal(flags);
	}
	if (flags & RX_ACCEPT_TO && !listed_by(&accept_to, ifindex, inner_destination))
		return NOT_IN_ACCEPT_TO;
	return MAY_SEND;
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
