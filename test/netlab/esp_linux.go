package netlab

import (
	"encoding/binary"
	"net/netip"
	"sync"
	"testing"
)

// ESPWire counts what a host sends and receives that is encrypted, or should be.
type ESPWire struct {
	mu   sync.Mutex
	seen ESPSeen
	esp  map[string]bool // by addresses, SPI and sequence number
	spis map[uint32]bool
}

// ESPSeen has the counts of an ESPWire.
type ESPSeen struct {
	// ESP counts ESP packets, but for those that are Repeated: with addresses, SPI and sequence number of an earlier one.
	ESP, Repeated int
	// SPIs is how many different SPIs these have.
	SPIs int
	// Plain counts packets of protocol 4.
	Plain int
	// Negotiating counts IKE messages, but for informational ones (dead peer detection, deleted SAs).
	Negotiating int
}

// WatchESP watches the packets from and to an IPv4 address at a device, until the test ends.
func WatchESP(t testing.TB, ns *NS, device, address string) *ESPWire {
	t.Helper()
	w := &ESPWire{esp: map[string]bool{}, spis: map[uint32]bool{}}
	of := string(netip.MustParseAddr(address).AsSlice())
	Capture(t, ns, device, func(f Frame) bool {
		if p := f.Packet; len(p) >= 28 && (string(p[12:16]) == of || string(p[16:20]) == of) {
			w.note(p)
		}
		return false
	})
	return w
}

// note counts a packet of 28 bytes or more.
func (w *ESPWire) note(p []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch payload := p[20:]; p[9] {
	case 4:
		w.seen.Plain++
	case 50:
		id := string(p[12:28])
		if w.esp[id] {
			w.seen.Repeated++
		} else {
			w.seen.ESP++
		}
		w.esp[id], w.spis[binary.BigEndian.Uint32(payload)] = true, true
	case 17:
		message := payload[8:]
		switch binary.BigEndian.Uint16(payload[2:]) {
		case 4500:
			message = message[min(4, len(message)):] // the non-ESP marker
		case 500:
		default:
			return
		}
		const exchange = 18 // RFC 7296 3.1; informational is 37, and 5 in IKEv1
		if len(message) >= 28 && message[exchange] != 5 && message[exchange] != 37 {
			w.seen.Negotiating++
		}
	}
}

// Seen returns the counts so far.
func (w *ESPWire) Seen() ESPSeen {
	w.mu.Lock()
	defer w.mu.Unlock()
	seen := w.seen
	seen.SPIs = len(w.spis)
	return seen
}
