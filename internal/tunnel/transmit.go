package tunnel

import (
	"errors"
	"os"
	"syscall"

	"ipipd/encap"
	"ipipd/internal/capture"
	"ipipd/internal/drop"
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
	"ipipd/internal/underlay"
)

// transmitter sends outer packets, fragmenting them if necessary. It is not safe for concurrent
// use.
type transmitter interface {
	// Write returns how many packets were sent and how many the cipher refused (already
	// counted). paths are as of underlay.Sender. err is the last error among the others.
	// Afterwards the buffers are the caller's again; their contents may have changed.
	Write(batch []*packet.Buffer, paths []*underlay.Path) (sent, refused int, err error)
}

// plainTx is the transmitter of a tunnel without a secret.
type plainTx struct{ underlay.Sender }

func (p plainTx) Write(batch []*packet.Buffer, paths []*underlay.Path) (sent, refused int, err error) {
	sent, err = p.Sender.Write(batch, paths)
	return sent, 0, err
}

// newTransmitter returns the transmitter that all packets of this tunnel must use.
func (t *Tunnel) newTransmitter(sender underlay.Sender) transmitter {
	if t.ipsecPolicy != nil {
		return newEncryptedTx(sender, capturedSealer{t}, t.count)
	}
	return plainTx{sender}
}

// sendLocal sends a packet that this process generated (a probe or its answer), and counts a
// drop if it was not sent.
func (t *Tunnel) sendLocal(tx transmitter, b *packet.Buffer, path *underlay.Path) {
	if txDrop := t.route.Load().txDrop; txDrop != drop.None {
		t.dropPacket(txDrop, capture.OuterOut, b.Bytes())
		return
	}
	batch, captures := []*packet.Buffer{b}, t.captures.Load()
	if sent, refused, err := tx.Write(batch, []*underlay.Path{path}); !errors.Is(err, os.ErrClosed) {
		t.sent(captures, batch, sent, refused, err)
	}
}

// sealer encrypts an outer packet in place, as ipsecPolicy does. Unless it returns drop.None,
// the packet must not be sent.
type sealer interface {
	Seal(b *packet.Buffer) drop.Reason
}

// encryptedTx sends only packets that its session has encrypted. A tunnel with a secret has no
// other transmitter, so its data, probes and answers cannot leave in cleartext.
//
// ESP packets above the path MTU are fragmented here (RFC 4303, section 3.3.4), since the
// socket fragments only protocol 4. If the first hop's MTU decreases, packets are too big
// until the route is updated.
type encryptedTx struct {
	sender    underlay.Sender
	session   sealer
	dropped   func(drop.Reason, int) // called with the packets that session refuses
	pending   []*packet.Buffer
	paths     []*underlay.Path // of pending
	fragments []*packet.Buffer
	size      int // capacity of each of fragments, in bytes
}

func newEncryptedTx(sender underlay.Sender, session sealer, dropped func(drop.Reason, int)) *encryptedTx {
	return &encryptedTx{sender: sender, session: session, dropped: dropped}
}

// Write encrypts batch in place and sends it. See transmitter.
func (s *encryptedTx) Write(batch []*packet.Buffer, paths []*underlay.Path) (sent, refused int, err error) {
	s.pending, s.paths = s.pending[:0], s.paths[:0]
	for i, b := range batch {
		path := paths[min(i, len(paths)-1)]
		if why := s.session.Seal(b); why != drop.None {
			s.dropped(why, 1)
			refused++
			continue
		}
		if path.MTU <= 0 || b.Len() <= path.MTU {
			if s.pending = append(s.pending, b); len(paths) > 1 || len(s.paths) == 0 {
				s.paths = append(s.paths, path)
			}
			continue
		}
		// Flush first, to keep the order.
		n, failed := s.flush()
		sent += n
		if failed != nil {
			err = failed
		}
		if failed := s.fragment(b, path); failed != nil {
			err = failed
		} else {
			sent++
		}
	}
	n, failed := s.flush()
	if failed != nil {
		err = failed
	}
	return sent + n, refused, err
}

func (s *encryptedTx) flush() (n int, err error) {
	if len(s.pending) == 0 {
		return 0, nil
	}
	n, err = s.sender.Write(s.pending, s.paths)
	s.pending, s.paths = s.pending[:0], s.paths[:0]
	return n, err
}

// fragment sends one packet in fragments. It fails unless all of them were sent; with DF set it
// returns EMSGSIZE.
func (s *encryptedTx) fragment(b *packet.Buffer, path *underlay.Path) error {
	p, err := ipv4.Parse(b.Bytes())
	if err != nil {
		return err
	}
	count := encap.FragmentCount(p, path.MTU)
	if count == 0 {
		return syscall.EMSGSIZE
	}
	if count > len(s.fragments) || path.MTU > s.size {
		s.fragments, s.size = packet.NewBatch(count, path.MTU), path.MTU
	}
	n, d := encap.Fragment(s.fragments[:count], p, path.MTU)
	if d != drop.None {
		return d
	}
	s.paths = append(s.paths[:0], path)
	sent, err := s.sender.Write(s.fragments[:n], s.paths)
	s.paths = s.paths[:0]
	if err == nil && sent < n {
		err = syscall.ENOBUFS
	}
	return err
}
