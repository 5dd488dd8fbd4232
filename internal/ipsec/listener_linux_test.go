package ipsec

import (
	"bytes"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"ipipd/internal/ipsec/ike"
	"ipipd/test/netlab"
)

// heard has the remotes that wanted was called with, and whether with esp.
type heard struct {
	mu     sync.Mutex
	wanted bool
	ike    []netip.Addr
	esp    []netip.Addr
}

func (h *heard) hear(remote netip.Addr, esp bool) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if esp {
		h.esp = append(h.esp, remote)
	} else {
		h.ike = append(h.ike, remote)
	}
	return h.wanted
}

func (h *heard) has(remote netip.Addr, esp bool) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if esp {
		return slices.Contains(h.esp, remote)
	}
	return slices.Contains(h.ike, remote)
}

// wanted is called for a remote that begins to negotiate, whose first message its Session then gets, and for one
// that sends ESP with an SPI that is no longer known.
func TestManagerListen(t *testing.T) {
	for _, mode := range testModes {
		nsA, nsB := netlab.New(t), netlab.New(t)
		netlab.Veth(t, nsA, nsB, netlab.End{Name: "veth0", Address: "192.0.2.1/24"}, netlab.End{Name: "veth0", Address: "192.0.2.2/24"})
		a, b := newEndpoint(t, nsA, addressA, addressB), newEndpoint(t, nsB, addressB, addressA)
		h := &heard{wanted: true}
		listen := func() (l *Listener, err error) {
			nsA.Do(func() { l, err = a.manager.Listen(addressA, 0, 0, h.hear) })
			return l, err
		}
		l, err := listen()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := listen(); err == nil {
			t.Error("a second Listener at that address is taken")
		}
		if err := b.protect(ikeConfig(mode)); err != nil {
			t.Fatal(err)
		}
		kept := func() int {
			a.manager.mu.Lock()
			defer a.manager.mu.Unlock()
			return len(a.manager.firstMessages)
		}
		netlab.Eventually(t, "the remote is told of", func() bool { return h.has(addressB, false) && kept() == 1 })
		cfg := ikeConfig(mode)
		cfg.OnDemand = true
		if err := a.protect(cfg); err != nil {
			t.Fatal(err)
		}
		if kept() != 0 {
			t.Error("the message is kept")
		}
		netlab.Eventually(t, "there are SAs", func() bool { return a.session.Established() && b.session.Established() })

		a.manager.updateTable(func(sas saTable) { clear(sas) }) // as after a restart
		netlab.Eventually(t, "ESP by an SA that is not known is told of", func() bool {
			b.send(b.message())
			return h.has(addressB, true)
		})

		first := a.session
		if err := a.protect(cfg); err == nil {
			t.Error("a second Session on demand is taken")
		}
		cfg.OnDemand = false
		if err := a.protect(cfg); err != nil {
			t.Errorf("a tunnel with that remote alone: %v", err)
		}
		if first.Established() {
			t.Error("the one on demand goes on")
		}
		first.Close()
		l.Close()
		a.session.Close()
		if n := len(a.manager.ports); n != 0 {
			t.Errorf("%d pairs of ports are left", n)
		}
	}
}

// A message is not kept if its remote is not wanted, or if it does not begin a negotiation.
func TestManager_keepFirst(t *testing.T) {
	ns := netlab.New(t)
	a := newEndpoint(t, ns, addressA, addressB)
	h := &heard{}
	var l *Listener
	ns.Do(func() {
		var err error
		if l, err = a.manager.Listen(addressA, 0, 0, h.hear); err != nil {
			t.Fatal(err)
		}
	})
	p, err := ike.NewPeer(ike.Config{Local: addressB, Remote: addressA, Secret: ike.Secret("s")}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	begin := p.Tick(time.Now())[0].(ike.Send).Payload
	deliver := func(b []byte) {
		a.manager.deliver(addressA, 500, netip.AddrPortFrom(addressB, 500), b)
	}
	deliver(begin[:20])
	deliver(append(bytes.Clone(begin), make([]byte, maxFirst)...))
	if h.has(addressB, false) {
		t.Error("what is no beginning is told of")
	}
	deliver(begin)
	if !h.has(addressB, false) || len(a.manager.firstMessages) != 0 {
		t.Errorf("a beginning that is not wanted: %v, %d kept", h.ike, len(a.manager.firstMessages))
	}
	h.wanted = true
	for i := range 2 * maxFirsts {
		a.manager.deliver(addressA, 500, netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, byte(i >> 8), byte(i)}), 500), begin)
	}
	if n := len(a.manager.firstMessages); n != maxFirsts {
		t.Errorf("%d are kept, want %d", n, maxFirsts)
	}
	deliver(begin)
	if _, kept := a.manager.firstMessages[tunnelKey{addressA, addressB}]; !kept {
		t.Error("forged sources keep out another's message")
	}
	l.Close()
	if len(a.manager.firstMessages)+len(a.manager.ports) != 0 {
		t.Errorf("after Close %d are kept, %d pairs of ports", len(a.manager.firstMessages), len(a.manager.ports))
	}
}
