package capture

import "time"

// What a packet of a capture costs all who copy it, in processor time: the data path, Stream, the kernel, and the
// process that reads the stream.
const (
	packetCost = 400 * time.Nanosecond
	byteCost   = time.Nanosecond // of the file

	// share is the part of one processor's time that a capture takes at most.
	share = 0.03
	// burst is how much time it saves up while it needs less.
	burst = 20 * time.Millisecond
)

// Budget keeps a capture from slowing its tunnel on a host with nothing to spare: it bounds how much Stream takes
// out of the ring, which is full then. What is missing is counted.
type Budget struct {
	stream         *Stream
	complete       bool
	left           time.Duration
	at             time.Time
	packets, bytes uint64 // of stream by then
}

// NewBudget returns the budget of a Stream; complete is one without bounds.
func NewBudget(s *Stream, complete bool, now time.Time) *Budget {
	return &Budget{stream: s, complete: complete, left: burst, at: now, packets: s.packets, bytes: s.bytes}
}

// Wait is how long the Stream has to wait until it may take more out, given what it has since the last call. It is
// short or zero, or so long that half of what burst is for is there again: packets that follow each other say more.
func (b *Budget) Wait(now time.Time) time.Duration {
	if b.complete {
		return 0
	}
	b.left = min(burst, b.left+time.Duration(share*float64(now.Sub(b.at)))) - time.Duration(b.stream.packets-b.packets)*packetCost - time.Duration(b.stream.bytes-b.bytes)*byteCost
	b.at, b.packets, b.bytes = now, b.stream.packets, b.stream.bytes
	if b.left > 0 {
		return 0
	}
	return time.Duration(float64(burst/2-b.left) / share)
}
