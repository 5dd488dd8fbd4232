package tunnel

import (
	"errors"
	"os"
	"syscall"

	"ipipd/encap"
	"ipipd/internal/ipsec/esp"
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
	"ipipd/internal/underlay"
)

// transmitter is a way out for whole outer packets. Of those of a batch, sent went to the
// network, and refused are those that must not go there and have been counted; err
// is about one of the rest. One goroutine uses it.
type transmitter interface {
	Write(batch []*packet.Buffer, path *underlay.Path) (sent, refused int, err error)
}

// plainTx is that of a tunnel without a secret.
type plainTx struct{ underlay.Sender }

func (p plainTx) Write(batch []*packet.Buffer, path *underlay.Path) (sent, refused int, err error) {
	sent, err = p.Sender.Write(batch, path)
	return sent, 0, err
}

// transmitter is the only way that packets of this tunnel leave by the sender.
func (t *Tunnel) transmitter(sender underlay.Sender) transmitter {
	if t.ipsecPolicy != nil {
		return newEncryptedTx(sender, t.ipsecPolicy)
	}
	return plainTx{sender}
}

// write sends a packet that is not of the host, and counts it if it is not sent.
func (t *Tunnel) write(tx transmitter, b *packet.Buffer, path *underlay.Path) {
	if refuse := t.route.Load().refuse; refuse != encap.DropNone {
		t.drop(refuse)
		return
	}
	sent, refused, err := tx.Write([]*packet.Buffer{b}, path)
	if sent+refused == 0 && !errors.Is(err, os.ErrClosed) {
		t.drop(sendDrop(err))
	}
}

// sealer is what a gate is to a way out: see ipsec.Session.
type sealer interface {
	Seal(b *packet.Buffer) esp.Drop
}

// encryptedTx is a way out that sends nothing but what a gate has sealed. A tunnel
// with a secret has no other: its data path, its probes and its answers cannot
// send a plain packet even by mistake.
//
// A packet that is longer than the path's MTU once it is sealed is cut here: the
// socket's own way of having it cut knows protocol 4 only. So where the first hop's
// MTU falls, packets are too big until the route has followed.
type encryptedTx struct {
	sender    underlay.Sender
	session   sealer
	out       []*packet.Buffer
	fragments []*packet.Buffer
	size      int // of each of fragments, in bytes
}

func newEncryptedTx(sender underlay.Sender, session sealer) *encryptedTx {
	return &encryptedTx{sender: sender, session: session}
}

// Write seals and sends whole outer packets. Those that the gate does not seal are
// refused.
func (s *encryptedTx) Write(batch []*packet.Buffer, path *underlay.Path) (sent, refused int, err error) {
	s.out = s.out[:0]
	for _, b := range batch {
		if s.session.Seal(b) != esp.DropNone {
			refused++
			continue
		}
		if path.MTU <= 0 || b.Len() <= path.MTU {
			s.out = append(s.out, b)
			continue
		}
		// What came before it goes first, so that the order stays.
		n, failed := s.flush(path)
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
	n, failed := s.flush(path)
	if failed != nil {
		err = failed
	}
	return sent + n, refused, err
}

func (s *encryptedTx) flush(path *underlay.Path) (n int, err error) {
	if len(s.out) == 0 {
		return 0, nil
	}
	n, err = s.sender.Write(s.out, path)
	s.out = s.out[:0]
	return n, err
}

// fragment sends one packet in fragments, all of them or it has failed.
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
	if d != encap.DropNone {
		return d
	}
	sent, err := s.sender.Write(s.fragments[:n], path)
	if err == nil && sent < n {
		err = syscall.ENOBUFS
	}
	return err
}
