package conformance

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"ipipd/internal/ipsec/esp"
	"ipipd/internal/ipsec/ike"
	"ipipd/internal/ipv4"
	"ipipd/test/netlab"
)

// espPeer is b's end of an encrypted tunnel without a daemon: the test has its keys, and seals by itself what no
// daemon sends. It waits for the other end to negotiate.
type espPeer struct {
	t        *testing.T
	mu       sync.Mutex
	ike      *ike.Peer
	sequence uint32 // last used, of all SAs
}

// newESPPeer returns an espPeer that negotiates at b until the test ends.
func newESPPeer(t *testing.T, b *netlab.NS) *espPeer {
	t.Helper()
	sink(t, b, ipv4.ProtocolESP)
	peer, err := ike.NewPeer(ike.Config{
		Local: netip.MustParseAddr(outerB), Remote: netip.MustParseAddr(outerA), Secret: ike.Secret(secret), PFS: ike.MODP1024, Passive: true,
	}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	var conn *net.UDPConn
	b.Do(func() { conn, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.ParseIP(outerB), Port: 500}) })
	if err != nil {
		t.Fatal(err)
	}
	p, done := &espPeer{t: t, ike: peer}, make(chan struct{})
	go func() {
		defer close(done)
		p.negotiate(conn)
	}()
	t.Cleanup(func() { conn.Close(); <-done })
	return p
}

// negotiate answers until conn is closed.
func (p *espPeer) negotiate(conn *net.UDPConn) {
	message := make([]byte, 65536)
	for {
		p.mu.Lock()
		next := p.ike.Next()
		p.mu.Unlock()
		_ = conn.SetReadDeadline(next) // zero is none
		n, from, err := conn.ReadFromUDPAddrPort(message)
		p.mu.Lock()
		var actions []ike.Action
		switch timeout, _ := err.(net.Error); {
		case err == nil:
			actions = p.ike.Receive(time.Now(), 500, from, message[:n])
		case timeout != nil && timeout.Timeout():
			actions = p.ike.Tick(time.Now())
		default:
			p.mu.Unlock()
			return
		}
		p.mu.Unlock()
		for _, a := range actions {
			if send, ok := a.(ike.Send); ok {
				_, _ = conn.WriteToUDPAddrPort(send.Payload, send.To)
			}
		}
	}
}

// children returns the child SAs, the newest last. It waits for the first.
func (p *espPeer) children() (cs []*ike.Child) {
	p.t.Helper()
	netlab.Eventually(p.t, "there is an SA", func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		cs = p.ike.Children()
		return p.ike.Current() != nil
	})
	return cs
}

// seal returns an ESP packet to a, by AES-GCM (RFC 4106) and the newest SA: payload, padding and next header are as
// they are given, and authentic (RFC 4303, section 2).
func (p *espPeer) seal(payload, padding []byte, next uint8) []byte {
	p.t.Helper()
	sas := p.children()
	sa := sas[len(sas)-1].Outbound
	if sa.Suite.Cipher != esp.AESGCM || sa.ESN {
		p.t.Fatalf("the SA is of %v, with extended sequence numbers: %v", sa.Suite, sa.ESN)
	}
	key, salt := sa.Keys.Encryption[:sa.Suite.KeyBits/8], sa.Keys.Encryption[sa.Suite.KeyBits/8:]
	block, err := aes.NewCipher(key)
	if err != nil {
		p.t.Fatal(err)
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		p.t.Fatal(err)
	}
	p.sequence++
	header := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, sa.SPI), p.sequence)
	iv := binary.BigEndian.AppendUint64(nil, uint64(p.sequence))
	text := slices.Concat(payload, padding, []byte{uint8(len(padding)), next})
	sealed := gcm.Seal(slices.Concat(header, iv), slices.Concat(salt, iv), text, header)
	return build(ipv4.Header{TTL: 64, Protocol: ipv4.ProtocolESP, Source: addr(outerB), Destination: addr(outerA)}, sealed)
}

// exhaust leaves the SAs of a kept process one sequence number (RFC 4303, section 3.3.3), until it has negotiated
// others. keeper has the file that the sequence numbers are in: of each pair of SAs a tag, the SPIs, and behind it
// the number of the last packet.
func (p *espPeer) exhaust(keeper int) {
	p.t.Helper()
	file := openState(p.t, keeper)
	defer file.Close()
	counters := make([]byte, 2<<20)
	if _, err := file.ReadAt(counters, 0); err != nil {
		p.t.Fatal(err)
	}
	found := false
	for _, c := range p.children() {
		tag := binary.NativeEndian.AppendUint64(nil, uint64(c.Outbound.SPI)<<32|uint64(c.Inbound.SPI))
		if at := bytes.Index(counters, tag); at >= 0 {
			found = true
			if _, err := file.WriteAt(binary.NativeEndian.AppendUint64(nil, 1<<32-2), int64(at+len(tag))); err != nil {
				p.t.Fatal(err)
			}
		}
	}
	if !found {
		p.t.Fatal("the state has the sequence numbers of no SA")
	}
}

// openState opens the file of handover.State.
func openState(t *testing.T, keeper int) *os.File {
	t.Helper()
	descriptors, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", keeper))
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range descriptors {
		if name, _ := os.Readlink(d); strings.HasPrefix(name, "/memfd:ipipd-state") {
			file, err := os.OpenFile(d, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			return file
		}
	}
	t.Fatal("the keeper has no state")
	return nil
}
