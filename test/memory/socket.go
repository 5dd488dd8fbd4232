package memory

import (
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"ipipd/internal/packet"
	"ipipd/internal/underlay"
)

// Faults are what a wire does to packets, each with a probability from 0 to 1.
type Faults struct {
	// Loss, Duplicate: the packet arrives not at all, or twice.
	Loss, Duplicate float64
	// Reorder: the packet arrives behind the next one, whenever that is sent.
	Reorder float64
	// Corrupt: one bit of the packet is wrong.
	Corrupt float64
	// Seed makes the faults the same each time.
	Seed uint64
}

// Socket is one end of a pair: an underlay.Socket with one Receiver.
type Socket struct {
	peer      *Socket
	in        *ring // outer packets
	icmp      *ring // ICMP errors
	overflows atomic.Uint64

	reception atomic.Pointer[underlay.Reception]

	mu      sync.Mutex // of what follows: the wire to the peer
	faults  Faults
	random  *rand.Rand
	held    []byte // by Reorder
	holding bool
	scratch []byte
}

var _ underlay.ReceiveSetter = (*Socket)(nil)

// NewSocketPair makes two Sockets. What is sent into one comes out of the other,
// whatever its addresses.
func NewSocketPair() (a, b *Socket) {
	a, b = &Socket{in: newRing(), icmp: newRing()}, &Socket{in: newRing(), icmp: newRing()}
	a.peer, b.peer = b, a
	return a, b
}

// SetFaults is about the packets that are sent into s from now on.
func (s *Socket) SetFaults(f Faults) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults, s.random = f, rand.New(rand.NewPCG(f.Seed, 0))
}

// InjectError makes a ReadError of s get a copy of icmp, which starts with its
// outer IPv4 header.
func (s *Socket) InjectError(icmp []byte) error {
	_, err := s.icmp.push(icmp, packet.Offload{}, true)
	return err
}

// Inject makes the Receiver of s get a copy of p, a whole outer packet, with what
// a link layer would say about its inner one.
func (s *Socket) Inject(p []byte, offload packet.Offload) error {
	_, err := s.in.push(p, offload, true)
	return err
}

// ReceiveWithin takes a packet that came to s, in the place of a Receiver. It is
// nil if none comes in time.
func (s *Socket) ReceiveWithin(wait time.Duration) *packet.Buffer { return s.in.popWithin(wait) }

// SetReceive implements underlay.ReceiveSetter: it notes what is asked for, and changes nothing.
func (s *Socket) SetReceive(r underlay.Reception) error {
	s.reception.Store(&r)
	return nil
}

// Reception is what SetReceive last asked for.
func (s *Socket) Reception() (r underlay.Reception) {
	if p := s.reception.Load(); p != nil {
		r = *p
	}
	return r
}

// Receivers implements underlay.Socket.
func (s *Socket) Receivers() []underlay.Receiver { return []underlay.Receiver{(*receiver)(s)} }

// NewSender implements underlay.Socket.
func (s *Socket) NewSender() underlay.Sender { return (*sender)(s) }

// ReadError implements underlay.Socket.
func (s *Socket) ReadError(buf []byte) (n int, err error) {
	b := packet.New(packet.MaxSize)
	if _, err := s.icmp.pop([]*packet.Buffer{b}, time.Time{}); err != nil {
		return 0, err
	}
	return copy(buf, b.Bytes()), nil
}

// Overflows implements underlay.Socket.
func (s *Socket) Overflows() uint64 { return s.overflows.Load() }

// Close implements underlay.Socket. The peer may go on sending, as on a network.
func (s *Socket) Close() error {
	s.in.close()
	s.icmp.close()
	return nil
}

type receiver Socket

func (r *receiver) Read(batch []*packet.Buffer) (int, error) { return r.in.pop(batch, time.Time{}) }

type sender Socket

// The byte of an IPv4 header with DF (RFC 791, section 3.1).
const (
	flags        = 6
	dontFragment = 0x40
)

// Write puts packets on the wire. As on a kernel's raw socket nothing is said of
// their checksums, and one with DF that is longer than the path's MTU is refused
// (EMSGSIZE). One without DF arrives whole, as if it had been cut and reassembled.
func (w *sender) Write(batch []*packet.Buffer, path *underlay.Path) (n int, err error) {
	if w.in.isClosed() {
		return 0, os.ErrClosed
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, b := range batch {
		p := b.Bytes()
		if len(p) > path.MTU && len(p) > flags && p[flags]&dontFragment != 0 {
			err = syscall.EMSGSIZE
			continue
		}
		w.send(p)
		n++
	}
	return n, err
}

func (w *sender) send(p []byte) {
	f := &w.faults
	if *f == (Faults{}) {
		w.arrive(p)
		return
	}
	if w.chance(f.Loss) {
		return
	}
	if w.chance(f.Corrupt) && len(p) > 0 {
		w.scratch = append(w.scratch[:0], p...)
		w.scratch[w.random.IntN(len(p))] ^= 1 << w.random.IntN(8)
		p = w.scratch
	}
	if !w.holding && w.chance(f.Reorder) {
		w.held, w.holding = append(w.held[:0], p...), true
		return
	}
	w.arrive(p)
	if w.chance(f.Duplicate) {
		w.arrive(p)
	}
	if w.holding {
		w.holding = false
		w.arrive(w.held)
	}
}

func (w *sender) chance(probability float64) bool { return w.random.Float64() < probability }

// arrive is at the peer's kernel. What it has no room for is lost, as is what
// comes to a closed socket.
func (w *sender) arrive(p []byte) {
	if ok, err := w.peer.in.push(p, packet.Offload{}, false); !ok && err == nil {
		w.peer.overflows.Add(1)
	}
}
