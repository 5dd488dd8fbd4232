// Captures. A tunnel that is captured has a ring buffer of its own, and the length of what is copied of each
// packet in its entries of tx_tunnels and rx_tunnels; otherwise that is 0, and nothing else is looked at.

// capture_record is a packet in a ring, or what begins one: `kept` bytes of the inner packet follow.
struct capture_record {
	__u64 at; // CLOCK_MONOTONIC in ns
	__u32 length; // of the outer packet, in bytes
	__u32 kept;
	__u8 direction;
	__u8 why; // 0, or why it is dropped: a verdict of may_send, or CAPTURE_SEND_FAILED
	// The inner TOS, and checksum, as they were received: 1 if they have been changed since.
	__u8 changed, tos;
	__be16 checksum;
	__u16 unused[3]; // the inner packet is to follow the header
	struct ipv4 outer;
};

#define CAPTURE_OUT 0
#define CAPTURE_IN 1
#define CAPTURE_SEND_FAILED 0xff

// Of tx_tunnel.capture and rx_tunnel.capture: the bytes of an inner packet, and only of those that are dropped.
#define CAPTURE_BYTES 0xffff
#define CAPTURE_DROPS 0x10000

// capture_rings is keyed by the slot of the tunnel, and has none while there is no capture. The declared size is not
// that of the rings which are entered.
struct capture_ring {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 65536); // a page of any platform
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, MAX_TUNNELS);
	__type(key, __u32);
	__array(values, struct capture_ring);
} capture_rings SEC(".maps");

// copy_to puts a packet in the ring, in a record that has room for `size` bytes of it: the verifier takes no record
// of a variable length. Nobody is woken, for the reader looks again soon.
#define copy_to(size) ({                                                                             \
	struct { struct capture_record record; __u8 inner[size]; } *to_;                             \
                                                                                                     \
	to_ = bpf_ringbuf_reserve(ring, sizeof(struct capture_record) + size, 0);                    \
	if (to_) {                                                                                   \
		to_->record = *r;                                                                    \
		to_->record.at = bpf_ktime_get_ns();                                                 \
		if (n && bpf_skb_load_bytes(skb, offset, (void *)to_ + sizeof(struct capture_record), n)) \
			to_->record.kept = 0;                                                        \
		bpf_ringbuf_submit(to_, BPF_RB_NO_WAKEUP);                                           \
	}                                                                                            \
	to_ != 0;                                                                                    \
})

// capture puts a packet in the ring of a tunnel: r, whose `kept` is how much may be copied, and what is at an
// offset. It returns how many packets are not there: 1 if there is no room. In the tick of one that had none this
// CPU tries no other.
static __attribute__((noinline)) __u32 capture(struct __sk_buff *skb, __u32 slot, struct counters *c, struct capture_record *r, __u32 offset)
{
	__u64 now = bpf_ktime_get_coarse_ns();
	__u32 end = skb->len, n = r->kept;
	void *ring;
	int room;

	if (c->no_room == now)
		return 1;
	ring = bpf_map_lookup_elem(&capture_rings, &slot);
	if (!ring)
		return 0;
	if (offset >= end)
		n = 0;
	else if (n > end - offset)
		n = end - offset;
	r->kept = n;
	asm volatile("" : "+r"(n)); // the bounds below are of the register that is passed on
	if (n <= 128)
		room = copy_to(128);
	else if (n <= 2048)
		room = copy_to(2048);
	else if (n <= CAPTURE_BYTES)
		room = copy_to(CAPTURE_BYTES);
	else
		room = 0;
	if (!room)
		c->no_room = now;
	return !room;
}
