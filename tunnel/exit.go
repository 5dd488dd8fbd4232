package tunnel

import (
	"errors"
	"os"
	"syscall"

	"ipipd/encap"
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
	"ipipd/ipsec/esp"
)

// exit is a way out for whole outer packets. Of those of a batch, sent went to the
// network, and refused are those that must not go there and have been counted; err
// is about one of the rest. One goroutine uses it.
type exit interface {
	Write(batch []*packet.Buffer, path *encap.Path) (sent, refused int, err error)
}

// plainExit is that of a tunnel without a secret.
type plainExit struct{ encap.Sender }

func (p plainExit) Write(batch []*packet.Buffer, path *encap.Path) (sent, refused int, err error) {
	sent, err = p.Sender.Write(batch, path)
	return sent, 0, err
}

// exit is the only way that packets of this tunnel leave by the sender.
func (t *Tunnel) exit(sender encap.Sender) exit {
	if t.guard != nil {
		return sealed(sender, t.guard)
	}
	return plainExit{sender}
}

// write sends a packet that is not of the host, and counts it if it is not sent.
func (t *Tunnel) write(way exit, b *packet.Buffer, path *encap.Path) {
	if refuse := t.route.Load().refuse; refuse != encap.DropNone {
		t.drop(refuse)
		return
	}
	sent, refused, err := way.Write([]*packet.Buffer{b}, path)
	if sent+refused == 0 && !errors.Is(err, os.ErrClosed) {
		t.drop(sendDrop(err))
	}
}

// sealer is what a gate is to a way out: see ipsec.Protector.
type sealer interface {
	Seal(b *packet.Buffer) esp.Drop
}

// sealing is a way out that sends nothing but what a gate has sealed. A tunnel
// with a secret has no other: its data path, its probes and its answers cannot
// send a plain packet even by mistake.
//
// A packet that is longer than the path's MTU once it is sealed is cut here: the
// socket's own way of having it cut knows protocol 4 only. So where the first hop's
// MTU falls, packets are too big until the route has followed.
type sealing struct {
	sender    encap.Sender
	gate      sealer
	out       []*packet.Buffer
	fragments []*packet.Buffer
	size      int // of each of fragments, in bytes
}

func sealed(sender encap.Sender, gate sealer) *sealing {
	return &sealing{sender: sender, gate: gate}
}

// Write seals and sends whole outer packets. Those that the gate does not seal are
// refused.
func (s *sealing) Write(batch []*packet.Buffer, path *encap.Path) (sent, refused int, err error) {
	s.out = s.out[:0]
	for _, b := range batch {
		if s.gate.Seal(b) != esp.DropNone {
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
		if failed := s.cut(b, path); failed != nil {
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

func (s *sealing) flush(path *encap.Path) (n int, err error) {
	if len(s.out) == 0 {
		return 0, nil
	}
	n, err = s.sender.Write(s.out, path)
	s.out = s.out[:0]
	return n, err
}

// cut sends one packet in fragments, all of them or it has failed.
func (s *sealing) cut(b *packet.Buffer, path *encap.Path) error {
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
