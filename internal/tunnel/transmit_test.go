package tunnel

import (
	"bytes"
	"errors"
	"syscall"
	"testing"

	"ipipd/internal/drop"
	"ipipd/internal/ipsec/esp"
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
	"ipipd/internal/underlay"
)

// recordingSender is a Sender that records packets, and fails at one above the path MTU.
type recordingSender struct {
	sent    [][]byte
	longest int // the longest packet's length
}

func (w *recordingSender) Write(batch []*packet.Buffer, paths []*underlay.Path) (int, error) {
	for i, b := range batch {
		if b.Len() > paths[min(i, len(paths)-1)].MTU {
			return 0, errors.New("longer than the path takes")
		}
		w.sent = append(w.sent, bytes.Clone(b.Bytes()))
		w.longest = max(w.longest, b.Len())
	}
	return len(batch), nil
}

type discardSender struct{}

func (discardSender) Write(batch []*packet.Buffer, _ []*underlay.Path) (int, error) {
	return len(batch), nil
}

type noSA struct{}

func (noSA) Seal(*packet.Buffer) drop.Reason { return drop.ESPNoSA }

func saPair(t *testing.T) (*esp.Outbound, *esp.Inbound) {
	t.Helper()
	cfg := esp.Config{SPI: 4711, Suite: esp.Suite{Cipher: esp.AESCBC, KeyBits: 128, Integrity: esp.HMACSHA1}, Protocol: 4,
		Keys: esp.Keys{Encryption: make([]byte, 16), Integrity: make([]byte, 20)}}
	out, err := esp.NewOutbound(cfg)
	if err != nil {
		t.Fatal(err)
	}
	in, err := esp.NewInbound(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return out, in
}

// outerOf returns an outer packet of that length with protocol 4, filled with v.
func outerOf(length int, v byte, df bool) *packet.Buffer {
	b := packet.New(packet.MaxSize)
	p := bytes.Repeat([]byte{v}, length)
	h := ipv4.Header{TotalLen: length, ID: uint16(v), DF: df, TTL: 64, Protocol: 4, Source: [4]byte{192, 0, 2, 1}, Destination: [4]byte{192, 0, 2, 2}}
	h.Put(p)
	b.Set(p)
	return b
}

// Without an SA nothing is sent.
func TestEncryptedTxWrite_noSA(t *testing.T) {
	w := &recordingSender{}
	var drops drop.Counters
	s := newEncryptedTx(w, noSA{}, func(why drop.Reason, n int) { drops.Add(why, uint64(n)) })
	sent, refused, err := s.Write([]*packet.Buffer{outerOf(100, 1, false), outerOf(3000, 2, false)}, []*underlay.Path{{MTU: 1500}})
	if sent != 0 || refused != 2 || err != nil || len(w.sent) != 0 {
		t.Errorf("%d sent, %d refused, %v, %d on the wire", sent, refused, err, len(w.sent))
	}
	if n := drops.Load(drop.ESPNoSA); n != 2 {
		t.Errorf("%d dropped, want 2", n)
	}
}

// ESP packets above the path MTU are fragmented, and the order is kept.
func TestEncryptedTxWrite_fragments(t *testing.T) {
	out, in := saPair(t)
	w := &recordingSender{}
	s := newEncryptedTx(w, out, nil)
	path := &underlay.Path{MTU: 1500}
	var batch, want []*packet.Buffer
	for i, length := range []int{100, 1458, 1459, 4000, 20, 60000, 500} {
		batch = append(batch, outerOf(length, byte(i+1), false))
		want = append(want, outerOf(length, byte(i+1), false))
	}
	if sent, refused, err := s.Write(batch, []*underlay.Path{path}); sent != len(batch) || refused != 0 || err != nil {
		t.Fatalf("%d sent, %d refused, %v", sent, refused, err)
	}
	if w.longest > path.MTU {
		t.Errorf("a packet of %d bytes", w.longest)
	}
	// Reassemble and decrypt.
	var whole []byte
	var opened int
	for _, p := range w.sent {
		view, err := ipv4.Parse(p)
		if err != nil {
			t.Fatal(err)
		}
		if view.Protocol() != 50 || bytes.Contains(p, bytes.Repeat([]byte{byte(opened + 1)}, 16)) {
			t.Fatalf("on the wire: %x", p[:40])
		}
		if view.FragmentOffset() == 0 {
			whole = bytes.Clone(p)
		} else {
			whole = append(whole, view.Payload()...)
		}
		if view.MF() {
			continue
		}
		h := ipv4.Header{TotalLen: len(whole), ID: view.ID(), TTL: 64, Protocol: 50, Source: [4]byte{192, 0, 2, 1}, Destination: [4]byte{192, 0, 2, 2}}
		h.Put(whole)
		b := packet.New(packet.MaxSize)
		b.Set(whole)
		if d := in.Open(b); d != drop.None {
			t.Fatalf("packet %d: %v", opened, d)
		}
		if !bytes.Equal(b.Bytes(), want[opened].Bytes()) {
			t.Errorf("packet %d is not what was sent", opened)
		}
		opened++
	}
	if opened != len(want) {
		t.Errorf("%d of %d packets opened", opened, len(want))
	}
}

func TestEncryptedTxWrite_dontFragment(t *testing.T) {
	out, _ := saPair(t)
	w := &recordingSender{}
	sent, refused, err := newEncryptedTx(w, out, nil).Write([]*packet.Buffer{outerOf(1459, 1, true), outerOf(1458, 2, true)}, []*underlay.Path{{MTU: 1500}})
	if sent != 1 || refused != 0 || !errors.Is(err, syscall.EMSGSIZE) || len(w.sent) != 1 {
		t.Errorf("%d sent, %d refused, %v", sent, refused, err)
	}
}

func TestEncryptedTxWrite_allocations(t *testing.T) {
	out, _ := saPair(t)
	s := newEncryptedTx(discardSender{}, out, nil)
	path := &underlay.Path{MTU: 1500}
	batch := []*packet.Buffer{packet.New(4000), packet.New(4000)}
	small, large := outerOf(1400, 1, false).Bytes(), outerOf(3900, 2, false).Bytes()
	if n := testing.AllocsPerRun(100, func() {
		batch[0].Set(small)
		batch[1].Set(large)
		if sent, _, err := s.Write(batch, []*underlay.Path{path}); sent != 2 || err != nil {
			t.Fatal(sent, err)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
