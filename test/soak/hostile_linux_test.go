//go:build linux && soak

package soak

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/internal/ipv4"
)

// Kinds of hostile packets.
const (
	ipip = iota
	espPacket
	ike
	natt
	kinds
)

// forger makes hostile packets.
type forger struct {
	s      *soak
	random *rand.Rand
}

// mac returns the present MAC address of eth0.
func (e *end) mac() net.HardwareAddr {
	var mac net.HardwareAddr
	e.ns.Do(func() {
		if ifi, err := net.InterfaceByName("eth0"); err == nil {
			mac = ifi.HardwareAddr
		}
	})
	return mac
}

// frameFor puts an Ethernet header from a stranger to mac in front of a packet.
func frameFor(mac net.HardwareAddr, packet []byte) []byte {
	b := make([]byte, etherLen, etherLen+len(packet))
	copy(b, mac)
	copy(b[6:], []byte{2, 0, 0, 0, 0, 0x66})
	binary.BigEndian.PutUint16(b[12:], unix.ETH_P_IP)
	return append(b, packet...)
}

// outer returns a packet of a protocol to an address of the end, from a peer's address or a stranger's.
func (f *forger) outer(to int, protocol byte, payload []byte) []byte {
	flow := f.s.flows[f.random.IntN(len(f.s.flows))]
	h := ipv4.Header{ID: uint16(f.random.Uint32()), TTL: uint8(1 + f.random.IntN(255)), TOS: uint8(f.random.Uint32()), Protocol: protocol, Source: flow.outer[1-to].As4(), Destination: flow.outer[to].As4(), TotalLen: ipv4.HeaderLen + len(payload)}
	if f.random.IntN(3) == 0 {
		h.Source = [4]byte{192, 0, 2, byte(200 + f.random.IntN(50))}
	}
	b := make([]byte, h.TotalLen)
	h.Put(b)
	copy(b[ipv4.HeaderLen:], payload)
	return b
}

// bytes returns n random bytes.
func (f *forger) bytes(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(f.random.Uint32())
	}
	return b
}

// inner returns an inner packet that is right, or damaged in its header, or noise.
func (f *forger) inner(to int) []byte {
	flow := f.s.flows[f.random.IntN(len(f.s.flows))]
	payload := f.bytes(80 + f.random.IntN(500))
	h := ipv4.Header{TTL: 64, Protocol: 253, Source: flow.inner[1-to].As4(), Destination: flow.inner[to].As4(), TotalLen: ipv4.HeaderLen + len(payload), TOS: uint8(f.random.Uint32())}
	if f.random.IntN(3) == 0 {
		h.Source = [4]byte(f.bytes(4))
	}
	if f.random.IntN(3) == 0 {
		h.Destination = [4]byte(f.bytes(4))
	}
	b := make([]byte, h.TotalLen)
	h.Put(b)
	copy(b[ipv4.HeaderLen:], payload)
	switch f.random.IntN(4) {
	case 0:
		b[f.random.IntN(ipv4.HeaderLen)] ^= 1 << f.random.IntN(8)
	case 1:
		return f.bytes(20 + f.random.IntN(600))
	case 2:
		return b[:20+f.random.IntN(len(b)-20)]
	}
	return b
}

// udp returns a datagram with the same source and destination port, without checksum (RFC 768).
func udp(port uint16, payload []byte) []byte {
	b := make([]byte, 8, 8+len(payload))
	binary.BigEndian.PutUint16(b[0:], port)
	binary.BigEndian.PutUint16(b[2:], port)
	binary.BigEndian.PutUint16(b[4:], uint16(8+len(payload)))
	return append(b, payload...)
}

// ikeMessage returns a header of IKE, of either version, with noise in the payloads that it announces.
func (f *forger) ikeMessage() []byte {
	b := f.bytes(28 + f.random.IntN(400))
	if f.random.IntN(2) == 0 {
		clear(b[8:16]) // a beginning
	}
	b[16] = []byte{1, 33, 34, 5, byte(f.random.Uint32())}[f.random.IntN(5)]
	b[17] = []byte{0x10, 0x20}[f.random.IntN(2)]
	b[18] = []byte{2, 4, 5, 32, 34, 35, 36, 37}[f.random.IntN(8)]
	binary.BigEndian.PutUint32(b[24:], uint32(len(b)))
	return b
}

// next returns a hostile packet for an end.
func (f *forger) next(to int) (packet []byte, kind int) {
	switch f.random.IntN(8) {
	case 0, 1, 2:
		return f.mutate(to)
	case 3:
		return f.outer(to, ipv4.ProtocolIPIP, f.inner(to)), ipip
	case 4:
		return f.outer(to, unix.IPPROTO_ESP, f.bytes(f.random.IntN(300))), espPacket
	case 5, 6:
		return f.outer(to, ipv4.ProtocolUDP, udp(500, f.ikeMessage())), ike
	}
	payload := f.bytes(f.random.IntN(300)) // ESP in UDP
	if f.random.IntN(2) == 0 {
		payload = append(make([]byte, 4), f.ikeMessage()...)
	}
	return f.outer(to, ipv4.ProtocolUDP, udp(4500, payload)), natt
}

// mutate returns a packet of the past, with some bits turned, cut, longer, as a fragment, or as it was.
func (f *forger) mutate(to int) (packet []byte, kind int) {
	b := f.s.ends[1-to].port.sample(f.random.IntN(256))
	if len(b) < etherLen+ipv4.HeaderLen {
		return f.outer(to, ipv4.ProtocolIPIP, f.inner(to)), ipip
	}
	b = b[etherLen:]
	switch protocol := b[9]; {
	case protocol == unix.IPPROTO_ESP:
		kind = espPacket
	case protocol == ipv4.ProtocolUDP && len(b) > 24 && binary.BigEndian.Uint16(b[22:]) == 500:
		kind = ike
	case protocol == ipv4.ProtocolUDP:
		kind = natt
	}
	switch f.random.IntN(6) {
	case 0:
		b = b[:ipv4.HeaderLen+f.random.IntN(len(b)-ipv4.HeaderLen+1)]
		binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
	case 1:
		b = append(b, f.bytes(f.random.IntN(100))...)
	case 2:
		binary.BigEndian.PutUint16(b[6:], uint16(f.random.Uint32()))
	case 3: // as it was
	default:
		for range 1 + f.random.IntN(8) {
			b[f.random.IntN(len(b))] ^= 1 << f.random.IntN(8)
		}
	}
	if n := int(b[0]&0xf) * 4; f.random.IntN(4) != 0 && n >= ipv4.HeaderLen && n <= len(b) {
		b[10], b[11] = 0, 0
		binary.BigEndian.PutUint16(b[10:], ipv4.Checksum(b[:n], 0))
	}
	return b, kind
}

// flood sends hostile packets to both ends while hostileOn is set.
func (s *soak) flood(stop <-chan struct{}) {
	f := &forger{s, s.random(400)}
	const ticks = 100
	for tick := time.NewTicker(time.Second / ticks); ; {
		select {
		case <-stop:
			tick.Stop()
			return
		case <-tick.C:
		}
		if !s.hostileOn.Load() {
			continue
		}
		macs := [2]net.HardwareAddr{s.ends[0].mac(), s.ends[1].mac()}
		for n := range *soakRate / ticks {
			to := n % 2
			packet, kind := f.next(to)
			if _, err := s.ends[to].port.file.Write(frameFor(macs[to], packet)); err == nil {
				s.hostile[kind].Add(1)
			}
		}
	}
}

// forge sends forged packets to both ends while all is calm, and checks that each of them is counted: as
// received, since whoever can forge the peer's address can send, or as dropped.
func (s *soak) forge(round int) {
	const each = 3000
	f := &forger{s, s.random(500, uint64(round))}
	before, err := s.standstill()
	if err != nil {
		s.failf("forged packets: %v", err)
		return
	}
	macs, sent := [2]net.HardwareAddr{s.ends[0].mac(), s.ends[1].mac()}, [2]int{}
	for n := range each {
		for to, e := range s.ends {
			packet, kind := f.outer(to, unix.IPPROTO_ESP, f.bytes(100+f.random.IntN(300))), espPacket
			if f.random.IntN(2) == 0 {
				packet, kind = f.outer(to, ipv4.ProtocolIPIP, f.inner(to)), ipip
			}
			if _, err := e.port.file.Write(frameFor(macs[to], packet)); err == nil {
				sent[to]++
				s.hostile[kind].Add(1)
			}
		}
		if n%20 == 0 {
			time.Sleep(5 * time.Millisecond)
		}
	}
	counted := func(p picture, to int) (n int) {
		a := p.ends[to]
		for name := range a.rx {
			n += int(a.rx[name] + a.rxDrops[name])
		}
		return n + int(a.process)
	}
	if !s.agrees(fmt.Sprintf("round %d, forged packets", round), func(now picture) (problems []string) {
		for to, e := range s.ends {
			answers := 0 // ICMP errors of the other host, about forged packets that were let in
			for name, tx := range now.ends[1-to].tx {
				answers += int(tx - before.ends[1-to].tx[name])
			}
			if n := counted(now, to) - counted(before, to); n != sent[to]+answers {
				problems = append(problems, fmt.Sprintf("end %s: of %d forged packets and %d answers %d are counted (%s)", e.name, sent[to], answers, n, difference(before.ends[to].reasons, now.ends[to].reasons)))
			}
		}
		return problems
	}) {
		return
	}
	s.logf("ledger: round %d: %d forged packets, all accounted for", round, sent[0]+sent[1])
}
