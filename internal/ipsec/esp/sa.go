package esp

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"sync/atomic"

	"ipipd/internal/packet"
)

// Config is one direction of a security association.
type Config struct {
	// SPI in host byte order, at least 256 (RFC 4303 section 2.1).
	SPI   uint32
	Suite Suite
	// Keys are copied.
	Keys Keys
	// ESN selects extended sequence numbers of 64 bits.
	ESN bool
	// Protocol is the only IP protocol that the SA carries, 4 for a tunnel.
	Protocol uint8
	// Window is the anti-replay window of an inbound SA in packets, 32 to 65536;
	// 0 stands for DefaultWindow.
	Window int
	// SourcePort and DestinationPort, where not zero, have an outbound SA wrap
	// ESP in UDP (RFC 3948).
	SourcePort, DestinationPort uint16
}

func (c *Config) validate() error {
	if c.SPI < 256 {
		return errors.New("esp: an SPI below 256 is reserved")
	}
	return c.Suite.checkKeys(c.Keys)
}

// How many packets an outbound SA seals at most. A sequence number must not come
// twice (RFC 4303 section 3.3.3). One of 64 bits cannot in the lifetime of a machine; the limit
// on 3DES keeps the blocks under one key far below 2^32 (RFC 4303 section 7, and the Sweet32 attack).
const (
	limit        = 1<<32 - 1
	limitESN     = 1 << 62
	limit3DES    = 1 << 22
	softFraction = 4 // a rekey is due when less than a quarter is left
)

// Outbound seals packets. Its methods may be called by several goroutines.
type Outbound struct {
	suite      Suite
	spi        uint32
	esn        bool
	protocol   uint8
	limit      uint64
	enginePool *enginePool
	ivCipher   cipher.Block // nil for GCM

	closed   atomic.Bool
	ports    atomic.Uint32 // source port in the upper half
	sequence atomic.Uint64 // the last that was used
	bytes    atomic.Uint64
}

// NewOutbound makes the sending half of an SA.
func NewOutbound(c Config) (*Outbound, error) {
	if err := c.validate(); err != nil {
		return nil, err
	}
	enginePool, err := newEnginePool(c.Suite, c.Keys, true)
	if err != nil {
		return nil, err
	}
	o := &Outbound{suite: c.Suite, spi: c.SPI, esn: c.ESN, protocol: c.Protocol, enginePool: enginePool, limit: limit}
	switch {
	case c.Suite.Cipher == TripleDESCBC:
		o.limit = limit3DES
	case c.ESN:
		o.limit = limitESN
	}
	if c.Suite.Cipher != AESGCM {
		// CBC wants an IV that nobody can predict (RFC 3602 section 3): the
		// sequence number, encrypted under a key that is used for nothing else.
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

// SPI of the SA, in host byte order.
func (o *Outbound) SPI() uint32 { return o.spi }

// Suite of the SA.
func (o *Outbound) Suite() Suite { return o.suite }

// SetPorts sets the UDP ports that ESP is wrapped in (RFC 3948), as a NAT's
// mapping changes; zeros send ESP itself.
func (o *Outbound) SetPorts(source, destination uint16) {
	o.ports.Store(uint32(source)<<16 | uint32(destination))
}

// UDP reports whether ESP is wrapped in UDP.
func (o *Outbound) UDP() bool { return o.ports.Load() != 0 }

// Packets and Bytes count what has been sealed; bytes are those of the payload.
func (o *Outbound) Packets() uint64 { return min(o.sequence.Load(), o.limit) }

// Bytes counts the payload bytes that have been sealed.
func (o *Outbound) Bytes() uint64 { return o.bytes.Load() }

// NeedsRekey reports that so much has been sealed that the SA should be replaced.
func (o *Outbound) NeedsRekey() bool { return o.sequence.Load() > o.limit-o.limit/softFraction }

// Close has every later Seal fail with DropExhausted.
func (o *Outbound) Close() { o.closed.Store(true) }

// Seal turns the whole IPv4 packet in b into an ESP packet in place: the header
// stays in front, with protocol, total length and checksum made right; what it
// carried is encrypted. Where Seal returns a Drop, b must not be sent: it may
// hold plain text still.
func (o *Outbound) Seal(b *packet.Buffer) Drop {
	p := b.Bytes()
	hl, d := checkIPv4(p)
	if d != DropNone {
		return d
	}
	if p[9] != o.protocol {
		return DropSelector
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
		return DropNoRoom
	}
	// The counter goes on beyond the limit, but with 64 bits it does not wrap.
	sequence := o.sequence.Add(1)
	if sequence > o.limit || o.closed.Load() {
		return DropExhausted
	}
	o.bytes.Add(uint64(payload))

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

	e := o.enginePool.get()
	binary.BigEndian.PutUint64(e.iv[8:], sequence)
	if o.ivCipher == nil {
		// The IV of GCM has to be different, not unpredictable (RFC 4106 section 3.1).
		copy(body[headerLen:front], e.iv[8:])
	} else {
		clear(e.iv[:8])
		o.ivCipher.Encrypt(e.iv[:], e.iv[:])
		copy(body[headerLen:front], e.iv[:])
	}
	e.seal(body, sequence, o.esn)
	o.enginePool.put(e)

	proto := byte(ProtocolESP)
	if udp != 0 {
		proto = protocolUDP
		binary.BigEndian.PutUint32(p[hl:], ports)
		binary.BigEndian.PutUint16(p[hl+4:], uint16(size-hl))
		binary.BigEndian.PutUint16(p[hl+6:], 0) // RFC 3948 section 2.1: SHOULD be zero
	}
	finishIPv4(p, hl, proto)
	b.Offload = packet.Offload{}
	return DropNone
}

// Inbound opens packets. Its methods may be called by several goroutines.
type Inbound struct {
	suite      Suite
	spi        uint32
	esn        bool
	protocol   uint8
	enginePool *enginePool
	window     *window

	closed  atomic.Bool
	packets atomic.Uint64
	bytes   atomic.Uint64
}

// NewInbound makes the receiving half of an SA.
func NewInbound(c Config) (*Inbound, error) {
	if c.Window == 0 {
		c.Window = DefaultWindow
	}
	if c.Window < 32 || c.Window > 65536 {
		return nil, errors.New("esp: the anti-replay window has 32 to 65536 packets")
	}
	if err := c.validate(); err != nil {
		return nil, err
	}
	enginePool, err := newEnginePool(c.Suite, c.Keys, false)
	if err != nil {
		return nil, err
	}
	return &Inbound{
		suite: c.Suite, spi: c.SPI, esn: c.ESN, protocol: c.Protocol,
		enginePool: enginePool, window: newWindow(c.Window),
	}, nil
}

// SPI of the SA, in host byte order.
func (i *Inbound) SPI() uint32 { return i.spi }

// Suite of the SA.
func (i *Inbound) Suite() Suite { return i.suite }

// Packets counts the authentic packets, dummies included.
func (i *Inbound) Packets() uint64 { return i.packets.Load() }

// Bytes counts the payload bytes of authentic packets.
func (i *Inbound) Bytes() uint64 { return i.bytes.Load() }

// Close has every later Open fail with DropExhausted.
func (i *Inbound) Close() { i.closed.Store(true) }

// Open turns the ESP packet in b, a whole IPv4 packet of protocol 50, back into
// the one that was sealed, in place. Where it returns a Drop, what b holds means nothing.
//
// Trusted are the payload and its protocol only. The IPv4 header is the one that
// the network delivered: transport mode does not protect it.
func (i *Inbound) Open(b *packet.Buffer) Drop {
	p := b.Bytes()
	hl, d := checkIPv4(p)
	if d != DropNone {
		return d
	}
	if i.closed.Load() {
		return DropExhausted
	}
	var (
		body    = p[hl:]
		iv, icv = i.suite.ivLen(), i.suite.icvLen()
		text    = len(body) - headerLen - iv - icv
	)
	if p[9] != ProtocolESP || text < trailerLen || text&(i.suite.align()-1) != 0 ||
		binary.BigEndian.Uint32(body) != i.spi {
		return DropMalformed
	}
	low := binary.BigEndian.Uint32(body[4:])
	sequence := uint64(low)
	if i.esn {
		sequence = i.window.infer(low)
	}
	if !i.window.check(sequence) {
		return DropReplay
	}
	e := i.enginePool.get()
	authentic := e.open(body, sequence, i.esn)
	i.enginePool.put(e)
	if !authentic {
		return DropAuthentication
	}
	if !i.window.accept(sequence) {
		return DropReplay // another thread was faster with a copy
	}
	i.packets.Add(1)

	plain := body[headerLen+iv : headerLen+iv+text]
	pad, next := int(plain[text-2]), plain[text-1]
	payload := text - trailerLen - pad
	if payload < 0 {
		return DropPadding
	}
	var wrong byte
	for n, v := range plain[payload : payload+pad] {
		wrong |= v ^ byte(n+1)
	}
	if wrong != 0 {
		return DropPadding
	}
	if next == ProtocolNone {
		return DropDummy
	}
	if next != i.protocol {
		return DropSelector
	}
	i.bytes.Add(uint64(payload))
	copy(p[headerLen+iv:], p[:hl])
	b.Pull(headerLen + iv)
	b.Trim(hl + payload)
	finishIPv4(b.Bytes(), hl, next)
	b.Offload = packet.Offload{}
	return DropNone
}
