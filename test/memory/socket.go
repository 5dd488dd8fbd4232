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

// Faults are the impairments of a link, each with a probability from 0 to 1.
type Faults struct {
	Loss, Duplicate float64
	// Reorder delays the packet until the next one is sent.
	Reorder float64
	// Corrupt flips one bit.
	Corrupt float64
	// Seed makes the faults reproducible.
	Seed uint64
}

// Socket is one end of a connected pair: an underlay.Socket with one Receiver.
type Socket struct {
	peer      *Socket
	in        *ring // outer packets
	icmp      *ring // ICMP errors
	overflows atomic.Uint64

	reception atomic.Pointer[underlay.Reception]

	mu      sync.Mutex // protects the fields below, the link to the peer
	faults  Faults
	random  *rand.Rand
	held    []byte // delayed by Reorder
	holding bool
	scratch []byte
}

var _ underlay.ReceiveSetter = (*Socket)(nil)

// NewSocketPair returns two connected Sockets: each receives the other's packets, whatever
// their addresses.
func NewSocketPair() (a, b *Socket) {
	a, b = &Socket{in: newRing(), icmp: newRing()}, &Socket{in: newRing(), icmp: newRing()}
	a.peer, b.peer = b, a
	return a, b
}

// SetFaults sets the impairments of packets that s sends.
func (s *Socket) SetFaults(f Faults) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults, s.random = f, rand.New(rand.NewPCG(f.Seed, 0))
}

// InjectError queues a copy of icmp, an IPv4 packet with its header, for ReadError of s.
func (s *Socket) InjectError(icmp []byte) error {
	_, err := s.icmp.push(icmp, packet.Offload{}, true)
	return err
}

// Inject queues a copy of p, a complete outer packet, for the Receiver of s. offload is the
// inner packet's, as reported by the link layer.
func (s *Socket) Inject(p []byte, offload packet.Offload) error {
	_, err := s.in.push(p, offload, true)
	return err
}

// ReceiveWithin takes the next received packet instead of the Receiver, or returns nil after
// wait.
func (s *Socket) ReceiveWithin(wait time.Duration) *packet.Buffer { return s.in.popWithin(wait) }

// PacketSockets implements underlay.ReceiveSetter: a Reception may be LinkLayer.
func (s *Socket) PacketSockets() bool { return true }

// SetReceive implements underlay.ReceiveSetter: it records r, without effect.
func (s *Socket) SetReceive(r underlay.Reception) error {
	s.reception.Store(&r)
	return nil
}

// Reception returns the last argument of SetReceive.
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

// Close implements underlay.Socket. The peer may go on sending.
func (s *Socket) Close() error {
	s.in.close()
	s.icmp.close()
	return nil
}

type receiver Socket

func (r *receiver) Watch(opened func(fd int) error) error { return opened(r.in.fd()) }

func (r *receiver) Read(batch []*packet.Buffer) (int, error) { return r.in.tryPop(batch) }

type sender Socket

// The offset and mask of DF in an IPv4 header (RFC 791, section 3.1).
const (
	flagsOffset  = 6
	dontFragment = 0x40
)

// Write sends packets. As with a kernel's raw socket the checksum state is lost, and a
// packet with DF that exceeds the path MTU fails with EMSGSIZE. Without DF it arrives whole,
// as after fragmentation and reassembly.
func (w *sender) Write(batch []*packet.Buffer, paths []*underlay.Path) (n int, err error) {
	if w.in.isClosed() {
		return 0, os.ErrClosed
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, b := range batch {
		p, path := b.Bytes(), paths[min(i, len(paths)-1)]
		if len(p) > path.MTU && len(p) > flagsOffset && p[flagsOffset]&dontFragment != 0 {
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
		w.deliver(p)
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
	w.deliver(p)
	if w.chance(f.Duplicate) {
		w.deliver(p)
	}
	if w.holding {
		w.holding = false
		w.deliver(w.held)
	}
}

func (w *sender) chance(probability float64) bool { return w.random.Float64() < probability }

// deliver appends p to the peer's receive buffer. If that is full the packet is dropped and
// counted; if the peer is closed it is dropped.
func (w *sender) deliver(p []byte) {
	if ok, err := w.peer.in.push(p, packet.Offload{}, false); !ok && err == nil {
		w.peer.overflows.Add(1)
	}
}
