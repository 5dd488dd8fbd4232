package esp

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha1"
	"encoding/binary"
	"encoding/hex"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"ipipd/internal/drop"
	"ipipd/internal/packet"
)

var suites = []Suite{
	{AESCBC, 128, HMACSHA1}, {AESCBC, 192, HMACSHA1}, {AESCBC, 256, HMACSHA1},
	{AESCBC, 128, HMACSHA256}, {AESCBC, 256, HMACSHA384}, {AESCBC, 256, HMACSHA512},
	{AESGCM, 128, 0}, {AESGCM, 192, 0}, {AESGCM, 256, 0},
	{TripleDESCBC, 192, HMACSHA1},
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func testKeys(s Suite) Keys {
	k := Keys{make([]byte, s.EncryptionKeyLen()), make([]byte, s.IntegrityKeyLen())}
	for i := range k.Encryption {
		k.Encryption[i] = byte(i*7 + 1)
	}
	for i := range k.Integrity {
		k.Integrity[i] = byte(i*5 + 3)
	}
	return k
}

// pair makes both ends of an SA. Unset fields of c get defaults.
func pair(t testing.TB, c Config) (*Outbound, *Inbound) {
	t.Helper()
	if c.SPI == 0 {
		c.SPI = 0xc0ffee01
	}
	if c.Protocol == 0 {
		c.Protocol = 4
	}
	if c.Keys.Encryption == nil {
		c.Keys = testKeys(c.Suite)
	}
	o, err := NewOutbound(c)
	if err != nil {
		t.Fatal(err)
	}
	i, err := NewInbound(c)
	if err != nil {
		t.Fatal(err)
	}
	return o, i
}

// datagram returns an IPv4 packet of protocol 4 with n bytes of payload.
func datagram(n int) []byte {
	p := make([]byte, 20+n)
	copy(p, []byte{0x45, 0xb8, 0, 0, 0x12, 0x34, 0x40, 0, 64, 4, 0, 0, 192, 0, 2, 1, 198, 51, 100, 1})
	for i := range p[20:] {
		p[20+i] = byte(i * 3)
	}
	finishIPv4(p, 20, 4)
	return p
}

// sealed seals p in a Buffer that was not zeroed.
func sealed(t testing.TB, o *Outbound, p []byte) *packet.Buffer {
	t.Helper()
	b := packet.New(packet.MaxSize)
	for i := range b.Space() {
		b.Space()[i] = 0xa5
	}
	b.Set(p)
	if d := o.Seal(b); d != drop.None {
		t.Fatalf("Seal: %v", d)
	}
	return b
}

// stripUDP removes the UDP header of the UDP-encapsulated ESP packet in b, and sets the IPv4
// header to protocol 50. The UDP checksum is not verified.
func stripUDP(b *packet.Buffer) drop.Reason {
	p := b.Bytes()
	hl, d := checkIPv4(p)
	if d != drop.None {
		return d
	}
	if p[9] != protocolUDP || len(p) < hl+udpLen+headerLen || int(binary.BigEndian.Uint16(p[hl+4:])) != len(p)-hl {
		return drop.ESPMalformed
	}
	copy(p[udpLen:], p[:hl])
	b.Pull(udpLen)
	finishIPv4(b.Bytes(), hl, ProtocolESP)
	return drop.None
}

func TestInboundOpen_roundTrip(t *testing.T) {
	for _, s := range suites {
		for _, esn := range []bool{false, true} {
			for _, udp := range []bool{false, true} {
				c := Config{Suite: s, ESN: esn}
				if udp {
					c.SourcePort, c.DestinationPort = 4500, 1024
				}
				o, i := pair(t, c)
				for _, n := range []int{0, 1, 13, 14, 15, 20, 1418, 1419, 65400} {
					want := datagram(n)
					b := sealed(t, o, want)
					if n > 20 && bytes.Contains(b.Bytes(), want[24:40]) {
						t.Fatalf("%v: cleartext in the sealed packet", s)
					}
					if udp {
						if k := ClassifyUDP(b.Bytes()[28:]); k != UDPESP {
							t.Fatalf("classified as %d", k)
						}
						if d := stripUDP(b); d != drop.None {
							t.Fatalf("stripUDP: %v", d)
						}
					}
					if spi, d := SPI(b); d != drop.None || spi != 0xc0ffee01 {
						t.Fatalf("SPI = %#x, %v", spi, d)
					}
					if d := i.Open(b); d != drop.None {
						t.Fatalf("%v esn=%v udp=%v n=%d: Open: %v", s, esn, udp, n, d)
					}
					if !bytes.Equal(b.Bytes(), want) {
						t.Fatalf("%v n=%d: got\n%x want\n%x", s, n, b.Bytes(), want)
					}
				}
			}
		}
	}
}

// Only protocol, total length and checksum of the IPv4 header change.
func TestOutboundSeal_outerHeader(t *testing.T) {
	o, _ := pair(t, Config{Suite: suites[0]})
	want := datagram(100)
	got := sealed(t, o, want).Bytes()
	for _, r := range [][2]int{{0, 2}, {4, 9}, {12, 20}} {
		if !bytes.Equal(got[r[0]:r[1]], want[r[0]:r[1]]) {
			t.Errorf("bytes %d to %d changed", r[0], r[1])
		}
	}
	if got[9] != 50 || int(binary.BigEndian.Uint16(got[2:])) != len(got) {
		t.Errorf("protocol %d, total length %d of %d", got[9], binary.BigEndian.Uint16(got[2:]), len(got))
	}
}

// RFC 3602 section 4, case 5: a transport-mode ESP packet with an ICMP echo request. The
// RFC's packet has no ICV; the test adds one.
func TestInboundOpen_rfc3602(t *testing.T) {
	key := unhex(t, "90d382b4 10eeba7a d938c46c ec1a82bf")
	esp := unhex(t, `00004321 00000001
		e96e8c08 ab465763 fd098d45 dd3ff893
		f663c25d 325c18c6 a9453e19 4e120849 a4870b66 cc6b9965 330013b4 898dc856
		a4699e52 3a55db08 0b59ec3a 8e4b7e52 775b07d1 db34ed9c 538ab50c 551b874a
		a269add0 47ad2d59 13ac19b7 cfbad4a6`)
	plaintext := unhex(t, `08000ebd a70a0000 8e9c083d b95b0700 08090a0b 0c0d0e0f 10111213 14151617
		18191a1b 1c1d1e1f 20212223 24252627 28292a2b 2c2d2e2f 30313233 34353637`)
	auth := []byte("01234567890123456789")
	mac := hmac.New(sha1.New, auth)
	mac.Write(esp)
	esp = append(esp, mac.Sum(nil)[:12]...)
	p := append(unhex(t, "4500000008f20000 40320000 c0a87b03 c0a87b64"), esp...)
	finishIPv4(p, 20, 50)
	in, err := NewInbound(Config{SPI: 0x4321, Suite: Suite{AESCBC, 128, HMACSHA1}, Keys: Keys{key, auth}, Protocol: 1})
	if err != nil {
		t.Fatal(err)
	}
	b := packet.New(2000)
	b.Set(p)
	if d := in.Open(b); d != drop.None {
		t.Fatal(d)
	}
	if got := b.Bytes()[20:]; !bytes.Equal(got, plaintext) {
		t.Errorf("got %x", got)
	}
	if b.Bytes()[9] != 1 {
		t.Errorf("protocol %d", b.Bytes()[9])
	}
}

// ESP packets from draft-mcgrew-gcm-test-01.
func TestInboundOpen_gcmVectors(t *testing.T) {
	for _, c := range []struct {
		name, key, esp, plaintext string
		sequence                  uint64
		esn                       bool
	}{
		{"128, extended sequence number", "4c80cdefbb5d10da906ac73c3613a634 2e443b68",
			`00004321 00000000 4956ed7e3b244cfe
			fecf537e729d5b07dc30df528dd22b768d1b98736696a6fd348509fa13ceac34cfa2436f14a3f3cf65925bf1f4a13c5d
			15b21e1884f5ff6247aeabb786b93bce61bc17d768fd9732 459018148f6cbe722fd04796562dfdb4`,
			`45000048699a000080114db7c0a80102c0a801010a9bf15638d301000001000000000000045f736970045f7564700373
			6970096379626572636974790 2646b0000210001`, 0x8765432100000000, true},
		{"192", "feffe9928665731c6d6a8f9467308308feffe9928665731c cafebabe",
			`0000a5f8 0000000a facedbaddecaf888
			a5b1f8066029aea40e598b8122de02420938b3ab33f828e687b8858b5bfbdbd0315b27452144cc77 95457b9652037f5318027b5b4cd7a636`,
			"45000028a4ad4000400678800a01038f0a010612802306b8cb712602dd6bb03e501016d07568", 10, false},
	} {
		key := unhex(t, c.key)
		in, err := NewInbound(Config{SPI: binary.BigEndian.Uint32(unhex(t, c.esp[:8])), ESN: c.esn, Protocol: 1,
			Suite: Suite{AESGCM, len(key)*8 - 32, 0}, Keys: Keys{Encryption: key}})
		if err != nil {
			t.Fatal(err)
		}
		in.window.top.Store(c.sequence - 1)
		p := append(unhex(t, "4500000008f20000 40320000 c0a87b03 c0a87b64"), unhex(t, c.esp)...)
		finishIPv4(p, 20, 50)
		b := packet.New(2000)
		b.Set(p)
		if d := in.Open(b); d != drop.None {
			t.Fatalf("%s: %v", c.name, d)
		}
		if got := b.Bytes()[20:]; !bytes.Equal(got, unhex(t, c.plaintext)) {
			t.Errorf("%s: got %x", c.name, got)
		}
	}
}

// Forged and truncated packets are dropped, and do not move the anti-replay window.
func TestInboundOpen_forged(t *testing.T) {
	for _, s := range suites {
		o, i := pair(t, Config{Suite: s})
		good := bytes.Clone(sealed(t, o, datagram(64)).Bytes())
		b := packet.New(2000)
		for bit := 20 * 8; bit < len(good)*8; bit += 3 {
			bad := bytes.Clone(good)
			bad[bit/8] ^= 1 << (bit % 8)
			b.Set(bad)
			if d := i.Open(b); d == drop.None {
				t.Fatalf("%v: accepted with bit %d flipped", s, bit)
			}
		}
		for n := range len(good) {
			bad := bytes.Clone(good[:n])
			if n >= 20 {
				finishIPv4(bad, 20, 50)
			}
			b.Set(bad)
			if d := i.Open(b); d == drop.None {
				t.Fatalf("%v: accepted when truncated to %d bytes", s, n)
			}
		}
		b.Set(good)
		if d := i.Open(b); d != drop.None {
			t.Fatalf("%v: the real one is refused afterwards: %v", s, d)
		}
		b.Set(good)
		if d := i.Open(b); d != drop.ESPReplay {
			t.Fatalf("%v: a replay gives %v", s, d)
		}
	}
}

// Dummy packets and protocols other than the SA's are not delivered, nor sealed.
func TestInboundOpen_selector(t *testing.T) {
	for _, c := range []struct {
		protocol byte
		want     drop.Reason
	}{{4, drop.None}, {59, drop.ESPDummy}, {1, drop.ESPSelector}, {50, drop.ESPSelector}, {41, drop.ESPSelector}} {
		o, _ := pair(t, Config{Suite: suites[0], Protocol: c.protocol})
		_, i := pair(t, Config{Suite: suites[0], Protocol: 4})
		p := datagram(40)
		finishIPv4(p, 20, c.protocol)
		if d := i.Open(sealed(t, o, p)); d != c.want {
			t.Errorf("protocol %d: %v, want %v", c.protocol, d, c.want)
		}
	}
	o, _ := pair(t, Config{Suite: suites[0]})
	b := packet.New(100)
	p := datagram(40)
	finishIPv4(p, 20, 1)
	b.Set(p)
	if d := o.Seal(b); d != drop.ESPSelector {
		t.Errorf("an outbound SA for protocol 4 sealed ICMP: %v", d)
	}
}

// The padding must be 1, 2, 3… (RFC 4303 section 2.4).
func TestInboundOpen_padding(t *testing.T) {
	s := suites[0]
	_, i := pair(t, Config{Suite: s})
	for n, c := range []struct {
		tail []byte
		want drop.Reason
	}{
		{[]byte{1, 2, 3, 3, 4}, drop.None},
		{[]byte{1, 2, 4, 3, 4}, drop.ESPPadding},
		{[]byte{0, 0, 0, 3, 4}, drop.ESPPadding},
		{[]byte{1, 2, 3, 200, 4}, drop.ESPPadding},
		{[]byte{9, 9, 9, 0, 4}, drop.None},
	} {
		e, err := newEngine(s, testKeys(s), true)
		if err != nil {
			t.Fatal(err)
		}
		body := make([]byte, 8+16+32+12)
		binary.BigEndian.PutUint32(body, 0xc0ffee01)
		binary.BigEndian.PutUint32(body[4:], uint32(n+1))
		copy(body[8+16+32-len(c.tail):], c.tail)
		e.seal(body, uint64(n+1), false)
		p := append(datagram(0), body...)
		finishIPv4(p, 20, 50)
		b := packet.New(200)
		b.Set(p)
		if d := i.Open(b); d != c.want {
			t.Errorf("tail %v: %v, want %v", c.tail, d, c.want)
		}
	}
}

func TestCheckIPv4(t *testing.T) {
	o, i := pair(t, Config{Suite: suites[0]})
	for name, change := range map[string]func([]byte) []byte{
		"more fragments": func(p []byte) []byte { p[6] |= 0x20; return p },
		"offset":         func(p []byte) []byte { p[7] = 1; return p },
		"version":        func(p []byte) []byte { p[0] = 0x65; return p },
		"header length":  func(p []byte) []byte { p[0] = 0x44; return p },
		"long header":    func(p []byte) []byte { p[0] = 0x4f; return p[:24] },
		"total length":   func(p []byte) []byte { p[3]++; return p },
		"trailing bytes": func(p []byte) []byte { return append(p, 0) },
		"empty":          func(p []byte) []byte { return p[:0] },
	} {
		b := packet.New(2000)
		b.Set(change(datagram(30)))
		if d := o.Seal(b); d != drop.ESPMalformed && d != drop.ESPFragment {
			t.Errorf("%s: Seal gives %v", name, d)
		}
		b.Set(change(sealed(t, o, datagram(30)).Bytes()))
		if d := i.Open(b); d != drop.ESPMalformed && d != drop.ESPFragment {
			t.Errorf("%s: Open gives %v", name, d)
		}
	}
}

// No sequence number is used twice: Seal fails at the limit, and NeedsRekey comes before.
func TestOutboundSeal_exhausted(t *testing.T) {
	for _, c := range []struct {
		suite Suite
		esn   bool
		limit uint64
	}{{suites[0], false, 1<<32 - 1}, {suites[6], false, 1<<32 - 1}, {suites[9], false, 1<<32 - 1}, {suites[9], true, limitESN}, {suites[6], true, limitESN}} {
		o, i := pair(t, Config{Suite: c.suite, ESN: c.esn})
		if o.NeedsRekey() {
			t.Error("a new SA needs a rekey")
		}
		o.sequence.Store(c.limit - 1)
		i.window.top.Store(c.limit - 1)
		if !o.NeedsRekey() {
			t.Error("no rekey asked for at the end")
		}
		if d := i.Open(sealed(t, o, datagram(10))); d != drop.None {
			t.Errorf("the last sequence number: %v", d)
		}
		for range 3 {
			b := packet.New(100)
			b.Set(datagram(10))
			if d := o.Seal(b); d != drop.ESPExhausted {
				t.Errorf("%v: after the last sequence number: %v", c.suite, d)
			}
		}
	}
}

// With 3DES, which has 64-bit blocks, the limit is in blocks, whatever the size of packets.
func TestOutboundSeal_blocks3DES(t *testing.T) {
	for _, n := range []int{0, 10, 1480, 65400} {
		o, i := pair(t, Config{Suite: suites[9]})
		blocks := uint64(n+trailerLen+7) / 8
		if d := i.Open(sealed(t, o, datagram(n))); d != drop.None || o.blocks.Load() != blocks {
			t.Fatalf("%d bytes: %v, %d blocks, want %d", n, d, o.blocks.Load(), blocks)
		}
		o.blocks.Store(limit3DES/2 + 1)
		if o.NeedsRekey() {
			t.Errorf("%d bytes: needs a rekey after half of the blocks", n)
		}
		o.blocks.Store(limit3DES - blocks)
		if !o.NeedsRekey() {
			t.Errorf("%d bytes: no rekey asked for at the end", n)
		}
		if d := i.Open(sealed(t, o, datagram(n))); d != drop.None {
			t.Errorf("%d bytes: the last blocks: %v", n, d)
		}
		for range 2 {
			b := packet.New(packet.MaxSize)
			b.Set(datagram(n))
			if d := o.Seal(b); d != drop.ESPExhausted {
				t.Errorf("%d bytes: after the last blocks: %v", n, d)
			}
		}
	}
	o, _ := pair(t, Config{Suite: suites[0]})
	o.blocks.Store(limit3DES)
	if sealed(t, o, datagram(10)); o.NeedsRekey() || o.blocks.Load() != limit3DES {
		t.Error("AES has the limit of 3DES")
	}
}

func TestOutboundClose(t *testing.T) {
	o, i := pair(t, Config{Suite: suites[0]})
	b := sealed(t, o, datagram(10))
	i.Close()
	if d := i.Open(b); d != drop.ESPExhausted {
		t.Errorf("Open: %v", d)
	}
	o.Close()
	b.Set(datagram(10))
	if d := o.Seal(b); d != drop.ESPExhausted {
		t.Errorf("Seal: %v", d)
	}
}

func TestOutboundSeal_noRoom(t *testing.T) {
	o, _ := pair(t, Config{Suite: suites[0]})
	b := packet.New(packet.MaxSize)
	b.Set(datagram(packet.MaxSize - 20 - 30))
	if d := o.Seal(b); d != drop.ESPNoRoom {
		t.Errorf("a packet beyond 65535: %v", d)
	}
	b = packet.New(200)
	b.Set(datagram(100))
	for b.Headroom() > 10 {
		b.Push(1)
		b.Trim(b.Len() - 1)
	}
	copy(b.Bytes(), datagram(100))
	if d := o.Seal(b); d != drop.ESPNoRoom {
		t.Errorf("no headroom: %v", d)
	}
}

// With ESN an SA continues beyond 2^32 packets.
func TestInboundOpen_esn(t *testing.T) {
	for _, s := range []Suite{suites[0], suites[6]} {
		o, i := pair(t, Config{Suite: s, ESN: true})
		start := uint64(1)<<32 - 2000
		o.sequence.Store(start)
		i.window.top.Store(start)
		for n := range 4000 {
			if d := i.Open(sealedDatagram(t, o, 20)); d != drop.None {
				t.Fatalf("%v: packet %d: %v", s, n, d)
			}
		}
		if top := i.window.top.Load(); top != start+4000 {
			t.Errorf("window at %d", top)
		}
	}
}

func sealedDatagram(t testing.TB, o *Outbound, n int) *packet.Buffer {
	b := packet.New(200)
	b.Set(datagram(n))
	if d := o.Seal(b); d != drop.None {
		t.Fatal(d)
	}
	return b
}

func TestOutboundSeal_uniqueIVs(t *testing.T) {
	o, _ := pair(t, Config{Suite: suites[0]})
	seen := map[string]bool{}
	for range 1000 {
		iv := string(sealedDatagram(t, o, 20).Bytes()[28:44])
		if seen[iv] {
			t.Fatal("an IV came twice")
		}
		seen[iv] = true
	}
}

func TestInboundOpen_concurrent(t *testing.T) {
	o, i := pair(t, Config{Suite: suites[0]})
	var wg sync.WaitGroup
	var bad atomic.Int32
	for range 12 { // more than enginePool.free holds
		wg.Go(func() {
			b := packet.New(200)
			for range 50 {
				b.Set(datagram(90))
				if o.Seal(b) != drop.None || i.Open(b) != drop.None || !bytes.Equal(b.Bytes(), datagram(90)) {
					bad.Add(1)
				}
			}
		})
	}
	wg.Wait()
	if bad.Load() != 0 {
		t.Errorf("%d packets lost", bad.Load())
	}
	if o.Packets() != 600 || i.Packets() != 600 {
		t.Errorf("counted %d %d", o.Packets(), i.Packets())
	}
}

func TestInboundOpen_allocs(t *testing.T) {
	for _, s := range suites {
		for _, udp := range []uint16{0, 4500} {
			o, i := pair(t, Config{Suite: s, ESN: true, SourcePort: udp, DestinationPort: udp})
			b, p := packet.New(2000), datagram(1400)
			n := testing.AllocsPerRun(100, func() {
				b.Set(p)
				if o.Seal(b) != drop.None || udp != 0 && stripUDP(b) != drop.None || i.Open(b) != drop.None {
					t.Fatal("lost")
				}
			})
			if n != 0 {
				t.Errorf("%v, UDP port %d: %v allocations", s, udp, n)
			}
		}
	}
}

func TestConfigValidate(t *testing.T) {
	good := Config{SPI: 256, Suite: suites[0], Keys: testKeys(suites[0]), Protocol: 4}
	for name, change := range map[string]func(*Config){
		"reserved SPI":   func(c *Config) { c.SPI = 255 },
		"short key":      func(c *Config) { c.Keys.Encryption = c.Keys.Encryption[1:] },
		"no integrity":   func(c *Config) { c.Suite.Integrity = 0 },
		"GCM and a hash": func(c *Config) { c.Suite.Cipher = AESGCM },
		"no cipher":      func(c *Config) { c.Suite.Cipher = 0 },
		"AES-64":         func(c *Config) { c.Suite.KeyBits = 64 },
		"3DES-128":       func(c *Config) { c.Suite.Cipher, c.Suite.KeyBits = TripleDESCBC, 128 },
	} {
		c := good
		change(&c)
		if _, err := NewOutbound(c); err == nil {
			t.Errorf("%s: NewOutbound took it", name)
		}
		if _, err := NewInbound(c); err == nil {
			t.Errorf("%s: NewInbound took it", name)
		}
	}
	good.Window = 31
	if _, err := NewInbound(good); err == nil {
		t.Error("a window of 31 was taken")
	}
}
