package ipsec

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"ipipd/internal/drop"
	"ipipd/internal/ipsec/esp"
	"ipipd/internal/ipsec/ike"
	"ipipd/internal/packet"
)

// pair is two ends without sockets: IKE and the outbound SA of A, and the negotiator of B.
// A is behind a NAT that maps port 4500 to mappedPort.
type pair struct {
	t   *testing.T
	now time.Time
	a   *ike.Peer
	b   *negotiator
	out *esp.Outbound // of A
}

const mappedPort = 14500

func newPair(t *testing.T, mode ike.Mode) *pair {
	cfg := ikeConfig(mode).Config
	cfg.Local, cfg.Remote = addressInside, addressB
	now := time.Now()
	a, err := ike.NewPeer(cfg, now)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Local, cfg.Remote, cfg.Passive = addressB, addressA, true
	b, err := ike.NewPeer(cfg, now)
	if err != nil {
		t.Fatal(err)
	}
	n := &negotiator{manager: NewManager(Options{}), session: &Session{}, peer: b, local: addressB, remote: addressA, inbound: map[uint32]*inboundSA{}, lastPackets: map[uint32]uint64{}}
	n.session.negotiator = n
	p := &pair{t: t, now: now, a: a, b: n}
	p.fromA(a.Tick(now))
	p.fromB(b.Tick(now))
	return p
}

// fromA performs A's actions; messages are received by B.
func (p *pair) fromA(actions []ike.Action) {
	for _, action := range actions {
		switch a := action.(type) {
		case ike.Send:
			p.fromB(p.b.peer.Receive(p.now, a.LocalPort, netip.AddrPortFrom(addressA, a.LocalPort+mappedPort-4500), a.Payload))
		case ike.UseOutbound:
			var err error
			if p.out, err = esp.NewOutbound(a.Outbound); err != nil {
				p.t.Fatal(err)
			}
		}
	}
}

// fromB performs B's actions; messages are received by A.
func (p *pair) fromB(actions []ike.Action) {
	for _, action := range actions {
		if a, ok := action.(ike.Send); ok {
			p.fromA(p.a.Receive(p.now, a.To.Port()-mappedPort+4500, netip.AddrPortFrom(addressB, a.LocalPort), a.Payload))
			continue
		}
		p.b.do([]ike.Action{action})
	}
}

// esp lets B receive an ESP packet of A from that UDP port.
func (p *pair) esp(port uint16) {
	p.t.Helper()
	e := &endpoint{local: addressA, remote: addressB}
	b := packet.New(2000)
	b.Set(e.outer(100, 1))
	p.out.SetPorts(0, 0) // Manager.open gets it without the UDP header
	if d := p.out.Seal(b); d != drop.None || !p.b.manager.open(b, port, new([]byte)) {
		p.t.Fatalf("not opened (%v)", d)
	}
}

// destination returns the UDP port that B's Session sends to.
func (p *pair) destination() uint16 {
	p.t.Helper()
	b := packet.New(2000)
	b.Set((&endpoint{local: addressB, remote: addressA}).outer(100, 1))
	if d := p.b.session.Seal(b); d != drop.None {
		p.t.Fatal(d)
	}
	return uint16(b.Bytes()[22])<<8 | uint16(b.Bytes()[23])
}

// ESP is sent to the port of the last authenticated ESP, also after IKE has set another.
func TestNegotiatorPollSAs_natPort(t *testing.T) {
	for _, mode := range testModes {
		p := newPair(t, mode)
		if p.out == nil || p.b.current == nil {
			t.Fatalf("%v: no SA: %v", mode, p.b.peer.Problem())
		}
		step := func(what string, want uint16) {
			t.Helper()
			if got := p.destination(); got != want {
				t.Errorf("%v: %s: to port %d, want %d", mode, what, got, want)
			}
			if got := p.b.current.Outbound.DestinationPort; got != want {
				t.Errorf("%v: %s: the next SA is sent by to port %d, want %d", mode, what, got, want)
			}
		}
		p.esp(mappedPort)
		p.b.pollSAs(p.now)
		step("at first", mappedPort)
		// IKE sets a port after ESP has arrived, but before pollSAs has seen it.
		p.esp(mappedPort)
		p.b.current.Outbound.DestinationPort = 6666
		p.b.do([]ike.Action{ike.SetPorts{Child: p.b.current, Local: 4500, Remote: 6666}})
		p.b.pollSAs(p.now)
		step("moved by IKE", 6666)
		p.esp(mappedPort)
		p.b.pollSAs(p.now)
		step("ESP from the port before", mappedPort)
		p.esp(7777)
		p.b.pollSAs(p.now)
		step("ESP from a new port", 7777)
	}
}

// A Status is published for a change, but not for each datagram.
func TestNegotiatorPublishIfChanged(t *testing.T) {
	for _, mode := range testModes {
		p := newPair(t, mode)
		n := p.b
		n.publishIfChanged()
		before := n.session.status.Load()
		if before == nil || !before.Established {
			t.Fatalf("%v: %+v", mode, before)
		}
		for i := range 100 {
			b := make([]byte, 28) // an IKEv2 header without payloads
			b[0], b[17], b[18], b[19], b[27] = byte(1+i), 0x20, 34, 0x08, 28
			n.do(n.peer.Receive(p.now, 500, netip.AddrPortFrom(addressA, 500), b))
			n.publishIfChanged()
		}
		n.pollSAs(p.now)
		n.publishIfChanged()
		if n.session.status.Load() != before {
			t.Errorf("%v: a status was made of nothing", mode)
		}
		n.do(n.peer.Close(p.now)[:1]) // the SA is deleted
		n.publishIfChanged()
		if now := n.session.status.Load(); now == before || now.Established {
			t.Errorf("%v: %+v", mode, now)
		}
	}
}

// An SA that is used again, after its successor has ended, repeats no sequence number.
func TestNegotiatorSetOutbound_usedAgain(t *testing.T) {
	n := &negotiator{manager: NewManager(Options{}), session: &Session{}, local: addressB, remote: addressA, inbound: map[uint32]*inboundSA{}, lastPackets: map[uint32]uint64{}}
	suite := esp.Suite{Cipher: esp.AESGCM, KeyBits: 128}
	child := func(spi uint32) *ike.Child {
		cfg := esp.Config{SPI: spi, Suite: suite, Protocol: 4, Keys: esp.Keys{Encryption: make([]byte, suite.EncryptionKeyLen())}}
		return &ike.Child{Inbound: cfg, Outbound: cfg}
	}
	sequence := func() uint32 {
		b := packet.New(packet.MaxSize)
		b.Set(append([]byte{0x45, 0, 0, 40, 0, 0, 0, 0, 64, 4, 0, 0, 192, 0, 2, 2, 192, 0, 2, 1}, make([]byte, 20)...))
		if why := n.session.Seal(b); why != drop.None {
			t.Fatal(why)
		}
		return binary.BigEndian.Uint32(b.Bytes()[24:])
	}
	one, two := child(1000), child(2000)
	n.do([]ike.Action{ike.AddInbound{Child: one}, ike.UseOutbound{Child: one}})
	for want := uint32(1); want < 4; want++ {
		if got := sequence(); got != want {
			t.Fatalf("%d, want %d", got, want)
		}
	}
	first := n.session.outbound.Load()
	n.do([]ike.Action{ike.AddInbound{Child: two}, ike.UseOutbound{Child: two}})
	if got := sequence(); got != 1 {
		t.Errorf("the second SA begins with %d", got)
	}
	n.do([]ike.Action{ike.UseOutbound{Child: one}, ike.Remove{Child: two}})
	if got := sequence(); got != 4 {
		t.Errorf("the first one goes on with %d", got)
	}
	n.do([]ike.Action{ike.UseOutbound{}, ike.UseOutbound{Child: one}})
	if got := sequence(); got != 5 {
		t.Errorf("the first one goes on with %d after there was none", got)
	}
	n.do([]ike.Action{ike.UseOutbound{}, ike.Remove{Child: one}})
	b := packet.New(packet.MaxSize)
	b.Set([]byte{0x45, 0, 0, 20, 0, 0, 0, 0, 64, 4, 0, 0, 192, 0, 2, 2, 192, 0, 2, 1})
	if why := first.Seal(b); why != drop.ESPExhausted {
		t.Errorf("an SA that was removed seals: %v", why)
	}
}
