package esp

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"sync/atomic"

	"ipipd/internal/drop"
	"ipipd/internal/packet"
)

// Config describes an SA, which has one direction.
type Config struct {
	// SPI in host byte order, at least 256 (RFC 4303 section 2.1).
	SPI   uint32
	Suite Suite
	// Keys are copied.
	Keys Keys
	// ESN selects extended sequence numbers of 64 bits.
	ESN bool
	// Protocol is the SA's selector, the IP protocol that it carries: 4 for a tunnel.
	Protocol uint8
	// Window is the size of an inbound SA's anti-replay window in packets, 32 to 65536;
	// 0 is DefaultWindow.
	Window int
	// SourcePort and DestinationPort, if not zero, make an outbound SA encapsulate
	// ESP in UDP (RFC 3948).
	SourcePort, DestinationPort uint16
	// Counters must not be reset while the keys are in use: an outbound SA's sequence number and 3DES blocks
	// (OutboundWords), or an inbound SA's anti-replay window of DefaultWindow packets (InboundWords). A new
	// SA's are zero. They are the caller's memory, with which another SA object of the same keys continues
	// this one; nil is memory of the SA object's own.
	Counters []atomic.Uint64
}

// The lengths of Config.Counters.
const (
	OutboundWords = 2
	InboundWords  = 1 + DefaultWindow/32 + 2
)

func (c *Config) validate() error {
	if c.SPI < 256 {
		return errors.New("esp: an SPI below 256 is reserved")
	}
	return c.Suite.checkKeys(c.Keys)
}

// The hard lifetime of an outbound SA in packets: sequence numbers must not wrap (RFC 4303
// section 3.3.3), and limitESN is out of reach. That of 3DES is also in blocks: of 2^29 blocks
// of 64 bits, 4 GiB, two are equal with a probability of 1/128 (Sweet32, CVE-2016-2183).
const (
	limit        = 1<<32 - 1
	limitESN     = 1 << 62
	limit3DES    = 1 << 29
	softFraction = 4 // the soft lifetime ends when less than a quarter is left
)

// Outbound is an outbound SA. Its methods may be called concurrently.
type Outbound struct {
	suite    Suite
	spi      uint32
	esn      bool
	protocol uint8
	limit    uint64
	engines  *enginePool
	ivCipher cipher.Block // nil for GCM

	closed   atomic.Bool
	ports    atomic.Uint32  // source port in the upper half; 0: no UDP encapsulation
	sequence *atomic.Uint64 // last used; grows beyond limit
	blocks   *atomic.Uint64 // encrypted with 3DES; grows beyond limit3DES
}

// NewOutbound makes an outbound SA.
func NewOutbound(c Config) (*Outbound, error) {
	if err := c.validate(); err != nil {
		return nil, err
	}
	engines, err := newEnginePool(c.Suite, c.Keys, true)
	if err != nil {
		return nil, err
	}
	if c.Counters == nil {
		c.Counters = make([]atomic.Uint64, OutboundWords)
	}
	o := &Outbound{
		suite: c.Suite, spi: c.SPI, esn: c.ESN, protocol: c.Protocol, engines: engines, limit: limit,
		sequence: &c.Counters[0], blocks: &c.Counters[1],
	}
	if c.ESN {
		o.limit = limitESN
	}
	if c.Suite.Cipher != AESGCM {
		// CBC needs unpredictable IVs (RFC 3602 section 3): the sequence number,
		// encrypted with a random key.
		var key [16]byte
		if _, err := rand.Read(key[:]); err != nil {
			return nil, err
		}
		if o.ivCipher, err = aes.NewCipher(key[:]); err != nil {
			return nil, err
		}
	}
	o.SetPorts(c.SourcePort, c.DestinationPort)
	return o, nil
}

// SetPorts sets the ports of the UDP encapsulation (RFC 3948), as when a NAT's mapping
// changes. With zeros ESP is not encapsulated.
func (o *Outbound) SetPorts(source, destination uint16) {
	o.ports.Store(uint32(source)<<16 | uint32(destination))
}

// Packets returns the number of packets sealed with these Counters.
func (o *Outbound) Packets() uint64 { return min(o.sequence.Load(), o.limit) }

// NeedsRekey reports whether the soft lifetime has ended.
func (o *Outbound) NeedsRekey() bool {
	return o.sequence.Load() > o.limit-o.limit/softFraction ||
		o.suite.Cipher == TripleDESCBC && o.blocks.Load() > limit3DES-limit3DES/softFraction
}

// Close makes every later Seal return drop.ESPExhausted.
func (o *Outbound) Close() { o.closed.Store(true) }

// Seal turns the IPv4 packet in b into an ESP packet in transport mode, in place. Of the
// IPv4 header only protocol, total length and checksum change. If Seal returns a drop.Reason, b is
// unchanged: as it is cleartext, it must not be sent.
func (o *Outbound) Seal(b *packet.Buffer) drop.Reason {
	p := b.Bytes()
	hl, d := checkIPv4(p)
	if d != drop.None {
		return d
	}
	if p[9] != o.protocol {
		return drop.ESPSelector
	}
	var (
		ports   = o.ports.Load()
		iv, icv = o.suite.ivLen(), o.suite.icvLen()
		payload = len(p) - hl
		align   = o.suite.align()
		pad     = -(payload + trailerLen) & (align - 1)
		front   = headerLen + iv
		udp     = 0
	)
	if ports != 0 {
		udp = udpLen
	}
	size := hl + udp + front + payload + pad + trailerLen + icv
	if size > packet.MaxSize || front+udp > b.Headroom() || size-len(p)-front-udp > b.Tailroom() {
		return drop.ESPNoRoom
	}
	// The counters grow beyond their limits, but cannot wrap at 2^64.
	if o.suite.Cipher == TripleDESCBC && o.blocks.Add(uint64(payload+pad+trailerLen)/8) > limit3DES {
		return drop.ESPExhausted
	}
	sequence := o.sequence.Add(1)
	if sequence > o.limit || o.closed.Load() {
		return drop.ESPExhausted
	}

	b.Push(front + udp)
	b.SetLen(size)
	p = b.Bytes()
	copy(p[:hl], p[front+udp:])
	body := p[hl+udp:]
	binary.BigEndian.PutUint32(body, o.spi)
	binary.BigEndian.PutUint32(body[4:], uint32(sequence))
	trailer := body[front+payload:]
	for i := range pad {
		trailer[i] = byte(i + 1)
	}
	trailer[pad] = byte(pad)
	trailer[pad+1] = o.protocol

	e := o.engines.get()
	binary.BigEndian.PutUint64(e.iv[8:], sequence)
	if o.ivCipher == nil {
		// GCM's IV must be unique, not unpredictable (RFC 4106 section 3.1).
		copy(body[headerLen:front], e.iv[8:])
	} else {
		clear(e.iv[:8])
		o.ivCipher.Encrypt(e.iv[:], e.iv[:])
		copy(body[headerLen:front], e.iv[:])
	}
	e.seal(body, sequence, o.esn)
	o.engines.put(e)

	proto := byte(ProtocolESP)
	if udp != 0 {
		proto = protocolUDP
		binary.BigEndian.PutUint32(p[hl:], ports)
		binary.BigEndian.PutUint16(p[hl+4:], uint16(size-hl))
		binary.BigEndian.PutUint16(p[hl+6:], 0) // RFC 3948 section 2.1: SHOULD be zero
	}
	finishIPv4(p, hl, proto)
	b.Offload = packet.Offload{}
	return drop.None
}

// Inbound is an inbound SA. Its methods may be called concurrently.
type Inbound struct {
	suite    Suite
	spi      uint32
	esn      bool
	protocol uint8
	engines  *enginePool
	window   *window

	closed  atomic.Bool
	packets atomic.Uint64
}

// NewInbound makes an inbound SA.
func NewInbound(c Config) (*Inbound, error) {
	if c.Window == 0 {
		c.Window = DefaultWindow
	}
	if c.Window < 32 || c.Window > 65536 || c.Counters != nil && len(c.Counters) < windowWords(c.Window) {
		return nil, errors.New("esp: the anti-replay window has 32 to 65536 packets, and room in Counters")
	}
	if err := c.validate(); err != nil {
		return nil, err
	}
	engines, err := newEnginePool(c.Suite, c.Keys, false)
	if err != nil {
		return nil, err
	}
	return &Inbound{
		suite: c.Suite, spi: c.SPI, esn: c.ESN, protocol: c.Protocol,
		engines: engines, window: newWindow(c.Window, c.Counters),
	}, nil
}

// Packets returns the number of authentic packets, dummy packets included.
func (i *Inbound) Packets() uint64 { return i.packets.Load() }

// Close makes every later Open return drop.ESPExhausted.
func (i *Inbound) Close() { i.closed.Store(true) }

// Open authenticates and decrypts the IPv4 packet of protocol 50 in b, in place. If it
// returns a drop.Reason, the contents of b are undefined.
//
// Only the payload and its protocol are authenticated: transport mode does not protect the
// IPv4 header.
func (i *Inbound) Open(b *packet.Buffer) drop.Reason {
	p := b.Bytes()
	hl, d := checkIPv4(p)
	if d != drop.None {
		return d
	}
	if i.closed.Load() {
		return drop.ESPExhausted
	}
	var (
		body    = p[hl:]
		iv, icv = i.suite.ivLen(), i.suite.icvLen()
		text    = len(body) - headerLen - iv - icv
	)
	if p[9] != ProtocolESP || text < trailerLen || text&(i.suite.align()-1) != 0 ||
		binary.BigEndian.Uint32(body) != i.spi {
		return drop.ESPMalformed
	}
	low := binary.BigEndian.Uint32(body[4:])
	sequence := uint64(low)
	if i.esn {
		sequence = i.window.infer(low)
	}
	if !i.window.check(sequence) {
		return drop.ESPReplay
	}
	e := i.engines.get()
	authentic := e.open(body, sequence, i.esn)
	i.engines.put(e)
	if !authentic {
		return drop.ESPAuthentication
	}
	if !i.window.accept(sequence) {
		return drop.ESPReplay // a copy was accepted concurrently
	}
	i.packets.Add(1)

	plaintext := body[headerLen+iv : headerLen+iv+text]
	pad, next := int(plaintext[text-2]), plaintext[text-1]
	payload := text - trailerLen - pad
	if payload < 0 {
		return drop.ESPPadding
	}
	var wrong byte
	for n, v := range plaintext[payload : payload+pad] {
		wrong |= v ^ byte(n+1)
	}
	if wrong != 0 {
		return drop.ESPPadding
	}
	if next == ProtocolNone {
		return drop.ESPDummy
	}
	if next != i.protocol {
		return drop.ESPSelector
	}
	copy(p[headerLen+iv:], p[:hl])
	b.Pull(headerLen + iv)
	b.Trim(hl + payload)
	finishIPv4(b.Bytes(), hl, next)
	b.Offload = packet.Offload{}
	return drop.None
}
