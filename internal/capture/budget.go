package capture

import "time"

// What a packet of a capture costs all who copy it, in processor time: the data path, Stream, the kernel, and the
// process that reads the stream and writes a file.
const (
	packetCost = 1500 * time.Nanosecond
	byteCost   = time.Nanosecond // of the file

	// share is the part of the processors' time that a capture takes at most, of as many as mostProcessors: the
	// threads of the data path pay a tenth of it.
	share          = 0.02
	mostProcessors = 8
	// burst is how long it may take all of a processor, if it has needed less before.
	burst = 20 * time.Millisecond
)

// Budget keeps a capture from slowing its tunnel on a host with nothing to spare: it bounds how much Stream takes
// out of the ring, which is full then. What is missing is counted.
type Budget struct {
	stream         *Stream
	share          float64 // of one processor; 0: unlimited
	left           time.Duration
	at             time.Time
	packets, bytes uint64 // of stream at that time
}

// NewBudget returns the Budget of a Stream on a host with so many processors; with complete it is unlimited.
func NewBudget(s *Stream, complete bool, processors int, now time.Time) *Budget {
	b := &Budget{stream: s, share: share * float64(min(processors, mostProcessors)), left: burst, at: now, packets: s.packets, bytes: s.bytes}
	if complete {
		b.share = 0
	}
	return b
}

// Wait returns how long the Stream has to wait before it may take more out, given what it has taken since the last call:
// zero, or until half a burst is there again, since packets in a row tell more than as many single ones.
func (b *Budget) Wait(now time.Time) time.Duration {
	if b.share == 0 {
		return 0
	}
	b.left = min(burst, b.left+time.Duration(b.share*float64(now.Sub(b.at)))) - time.Duration(b.stream.packets-b.packets)*packetCost - time.Duration(b.stream.bytes-b.bytes)*byteCost
	b.at, b.packets, b.bytes = now, b.stream.packets, b.stream.bytes
	if b.left > 0 {
		return 0
	}
	return time.Duration(float64(burst/2-b.left) / b.share)
}
