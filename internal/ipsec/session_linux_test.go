package ipsec

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/internal/drop"
	"ipipd/internal/ipsec/esp"
	"ipipd/internal/ipsec/ike"
	"ipipd/internal/packet"
	"ipipd/test/netlab"
)

// An error names the other IKE daemons, and Protect can be repeated.
func TestManagerProtect_portInUse(t *testing.T) {
	ns := netlab.New(t)
	for _, port := range []int{500, 4500} {
		e := newEndpoint(t, ns, addressA, addressB)
		ns.Run("ip", "address", "replace", "192.0.2.1/24", "dev", "lo")
		var taken *net.UDPConn
		ns.Do(func() {
			var err error
			if taken, err = net.ListenUDP("udp4", &net.UDPAddr{Port: port}); err != nil {
				t.Fatal(err)
			}
		})
		err := e.protect(ikeConfig(ike.Main))
		if err == nil || !strings.Contains(err.Error(), "stop strongSwan, ") || strings.Contains(err.Error(), "\n") {
			t.Errorf("port %d taken: %v", port, err)
		}
		taken.Close()
		if err := e.protect(ikeConfig(ike.Main)); err != nil {
			t.Errorf("port %d free again: %v", port, err)
		}
		if err := e.protect(ikeConfig(ike.Main)); err == nil {
			t.Error("a second tunnel between the same addresses was taken")
		}
		e.manager.Close()
	}
}

// A Protect that fails leaves the ESP socket restricted to the only tunnel, as before.
func TestManagerProtect_failedSecond(t *testing.T) {
	ns := netlab.New(t)
	ns.Run("ip", "address", "add", "192.0.2.1/24", "dev", "lo")
	ns.Run("ip", "address", "add", "192.0.2.9/24", "dev", "lo")
	e := newEndpoint(t, ns, addressA, addressB)
	if err := e.protect(ikeConfig(ike.Main)); err != nil {
		t.Fatal(err)
	}
	before := e.manager.raw.(*rawESP).raw.Binding()
	if before.Remote != as4(addressB) {
		t.Fatalf("with one tunnel: %v", before)
	}
	ns.Do(func() {
		taken, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(192, 0, 2, 9), Port: 500})
		if err != nil {
			t.Fatal(err)
		}
		defer taken.Close()
		cfg := ikeConfig(ike.Main)
		cfg.Local, cfg.Remote = netip.MustParseAddr("192.0.2.9"), addressB
		if _, err := e.manager.Protect(cfg); err == nil {
			t.Fatal("port 500 is taken, and there is no error")
		}
	})
	if after := e.manager.raw.(*rawESP).raw.Binding(); after != before {
		t.Errorf("afterwards %v, want %v", after, before)
	}
}

// On a path that passes IKE but not ESP, EventNoESP is emitted once.
func TestNegotiatorPollSAs_noESP(t *testing.T) {
	if testing.Short() {
		t.Skip("takes noESPTimeout")
	}
	t.Parallel()
	nsA, nsB := netlab.New(t), netlab.New(t)
	netlab.Veth(t, nsA, nsB, netlab.End{Name: "u0", Address: "192.0.2.1/24"}, netlab.End{Name: "u0", Address: "192.0.2.2/24"})
	if out, err := nsA.Try("nft", "add table ip f; add chain ip f in { type filter hook prerouting priority -400; }; add rule ip f in ip protocol 50 drop"); err != nil {
		t.Skipf("needs nft: %s", out)
	}
	a, b := newEndpoint(t, nsA, addressA, addressB), newEndpoint(t, nsB, addressB, addressA)
	cfg := ikeConfig(ike.Main)
	for _, e := range []*endpoint{a, b} {
		if err := e.protect(cfg); err != nil {
			t.Fatal(err)
		}
	}
	netlab.Eventually(t, "both SAs are established", func() bool { return a.session.Established() && b.session.Established() })
	deadline := time.Now().Add(noESPTimeout + netlab.Timeout())
	for !strings.Contains(a.log.String(), "but no ESP is received") {
		if time.Now().After(deadline) {
			t.Fatalf("no EventNoESP:\n%s", a.log.String())
		}
		a.send(a.outer(100, 1))
		b.send(b.outer(100, 1))
		time.Sleep(50 * time.Millisecond)
	}
	if n := strings.Count(a.log.String(), "but no ESP is received"); n != 1 {
		t.Errorf("EventNoESP was emitted %d times", n)
	}
}

// If this host's firewall refuses IKE's messages, Status says so, and not that the peer does not answer.
func TestPortsSend_refused(t *testing.T) {
	nsA, nsB := netlab.New(t), netlab.New(t)
	netlab.Veth(t, nsA, nsB, netlab.End{Name: "u0", Address: "192.0.2.1/24"}, netlab.End{Name: "u0", Address: "192.0.2.2/24"})
	if out, err := nsA.Try("nft", "add table ip f; add chain ip f out { type filter hook output priority 0; }; add rule ip f out udp dport { 500, 4500 } drop"); err != nil {
		t.Skipf("needs nft: %s", out)
	}
	a, b := newEndpoint(t, nsA, addressA, addressB), newEndpoint(t, nsB, addressB, addressA)
	for _, e := range []*endpoint{a, b} {
		if err := e.protect(ikeConfig(ike.Main)); err != nil {
			t.Fatal(err)
		}
	}
	netlab.Eventually(t, "the status says so", func() bool { return strings.Contains(a.session.Status().Describe(time.Now()), "this host refuses") })
	nsA.Run("nft", "delete", "table", "ip", "f")
	netlab.Eventually(t, "both SAs are established", func() bool { return a.session.Established() && b.session.Established() })
	if problem := a.session.Status().Problem; problem != "" {
		t.Errorf("the problem is still %q", problem)
	}
}

// An SA is for one pair of addresses, and either with or without UDP encapsulation.
func TestManagerOpen(t *testing.T) {
	m := NewManager(Options{})
	keys := esp.Keys{Encryption: make([]byte, 16), Integrity: make([]byte, 20)}
	cfg := esp.Config{SPI: 4711, Suite: esp.Suite{Cipher: esp.AESCBC, KeyBits: 128, Integrity: esp.HMACSHA1}, Keys: keys, Protocol: 4}
	in, err := esp.NewInbound(cfg)
	if err != nil {
		t.Fatal(err)
	}
	out, err := esp.NewOutbound(cfg)
	if err != nil {
		t.Fatal(err)
	}
	session := &Session{dropped: func(drop.Reason, int) {}}
	n := &negotiator{manager: m, session: session, local: addressA, remote: addressB}
	m.addSA(n.key(4711), &inboundSA{Inbound: in, owner: n})
	from := func(source, destination [4]byte) *packet.Buffer {
		e := &endpoint{local: addressB, remote: addressA}
		p := e.outer(50, 7)
		copy(p[12:], source[:])
		copy(p[16:], destination[:])
		b := packet.New(200)
		b.Set(p)
		if d := out.Seal(b); d != drop.None {
			t.Fatal(d)
		}
		return b
	}
	a, b := addressA.As4(), addressB.As4()
	var kept []byte
	if m.open(from([4]byte{203, 0, 113, 9}, a), 0, &kept) || m.open(from(b, [4]byte{203, 0, 113, 9}), 0, &kept) || m.open(from(b, a), 4500, &kept) {
		t.Error("opened what is not the peer's")
	}
	good := from(b, a)
	again := packet.New(200)
	again.Set(good.Bytes())
	if !m.open(good, 0, &kept) || !bytes.Equal(good.Bytes()[20:], bytes.Repeat([]byte{7}, 50)) {
		t.Error("the peer's own was not opened")
	}
	if m.open(again, 0, &kept) {
		t.Error("opened twice")
	}
	sealed, buffer := from(b, a).Bytes(), packet.New(200)
	if n := testing.AllocsPerRun(100, func() {
		buffer.Set(sealed)
		m.open(buffer, 0, &kept)
	}); n != 0 {
		t.Errorf("%v allocations a packet", n)
	}
	m.removeSA(n.key(4711), (*m.table.Load())[n.key(4711)])
	if m.open(from(b, a), 0, &kept) {
		t.Error("opened after the SA was removed")
	}
}

func TestSessionSeal_noSA(t *testing.T) {
	p := &Session{}
	e := &endpoint{local: addressA, remote: addressB}
	b := packet.New(200)
	b.Set(e.outer(50, 7))
	if d := p.Seal(b); d != drop.ESPNoSA {
		t.Errorf("Seal: %v", d)
	}
	if p.Established() {
		t.Error("a session without an SA is established")
	}
}

// A packet that races with the removal of the SA is dropped as ESPNoSA, not as ESPExhausted.
func TestSessionSeal_concurrentClose(t *testing.T) {
	cfg := esp.Config{
		SPI: 4711, Suite: esp.Suite{Cipher: esp.AESCBC, KeyBits: 128, Integrity: esp.HMACSHA1},
		Keys: esp.Keys{Encryption: make([]byte, 16), Integrity: make([]byte, 20)}, Protocol: 4,
	}
	p, e := &Session{}, &endpoint{local: addressA, remote: addressB}
	var stop atomic.Bool
	var drops drop.Counters
	done := make(chan struct{})
	go func() {
		defer close(done)
		for b := packet.New(200); !stop.Load(); {
			b.Set(e.outer(50, 7))
			drops.Add(p.Seal(b), 1)
		}
	}()
	for range 20_000 {
		out, err := esp.NewOutbound(cfg)
		if err != nil {
			t.Fatal(err)
		}
		p.outbound.Store(out)
		runtime.Gosched()
		p.outbound.Store(nil) // before Close, as in setOutbound
		out.Close()
	}
	stop.Store(true)
	<-done
	if n := drops.Load(drop.ESPExhausted); n != 0 || drops.Load(drop.ESPNoSA) == 0 {
		t.Errorf("%d packets are counted as exhausted, %d as without an SA", n, drops.Load(drop.ESPNoSA))
	}
}

// Read does not allocate per packet, and Close unblocks it.
func TestReceiverRead_allocs(t *testing.T) {
	ns := netlab.New(t)
	m := NewManager(Options{})
	var r Receiver
	var c io.Closer
	var raw int
	ns.Do(func() {
		var err error
		if c, r, err = openESP(m); err != nil {
			t.Fatal(err)
		}
		if raw, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW); err != nil {
			t.Fatal(err)
		}
	})
	defer unix.Close(raw)
	keys := esp.Keys{Encryption: make([]byte, 20)}
	cfg := esp.Config{SPI: 4711, Suite: esp.Suite{Cipher: esp.AESGCM, KeyBits: 128}, Keys: keys, Protocol: 4}
	in, _ := esp.NewInbound(cfg)
	out, err := esp.NewOutbound(cfg)
	if err != nil {
		t.Fatal(err)
	}
	session := &Session{dropped: func(drop.Reason, int) {}}
	local := net.IPv4(127, 0, 0, 1).To4()
	m.addSA(saKey{remote: [4]byte(local), local: [4]byte(local), spi: 4711}, &inboundSA{Inbound: in, owner: &negotiator{session: session}})
	e := &endpoint{local: addressA, remote: addressB}
	p := e.outer(500, 9)
	copy(p[12:], local)
	copy(p[16:], local)
	b, batch := packet.New(2000), packet.NewBatch(8, 2000)
	to := &unix.SockaddrInet4{Addr: [4]byte(local)}
	roundTrip := func() {
		b.Set(p)
		if d := out.Seal(b); d != drop.None {
			t.Fatal(d)
		}
		if err := unix.Sendto(raw, b.Bytes(), 0, to); err != nil {
			t.Fatal(err)
		}
		if n, err := readSome(r, batch); n != 1 || err != nil || !bytes.Equal(batch[0].Bytes()[20:], p[20:]) {
			t.Fatalf("%d packets, %v", n, err)
		}
	}
	roundTrip()
	base := testing.AllocsPerRun(50, func() {
		b.Set(p)
		out.Seal(b)
		_ = unix.Sendto(raw, b.Bytes(), 0, to) // x/sys allocates the address
		batch[0].Space()
	})
	for range 51 { // the packets that AllocsPerRun has sent
		readOne(t, r, batch)
	}
	if n := testing.AllocsPerRun(50, roundTrip); n > base {
		t.Errorf("%v allocations a packet", n-base)
	}
	c.Close()
	if _, err := r.Read(batch); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// readSome reads packets, and waits for the first.
func readSome(r Receiver, batch []*packet.Buffer) (n int, err error) {
	for end := time.Now().Add(netlab.Timeout()); n == 0 && err == nil && time.Now().Before(end); {
		n, err = r.Read(batch)
	}
	return n, err
}

// readOne reads one packet.
func readOne(t *testing.T, r Receiver, batch []*packet.Buffer) {
	t.Helper()
	one := batch[:1]
	if n, err := readSome(r, one); n != 1 || err != nil {
		t.Fatalf("%d packets, %v", n, err)
	}
}

// recordingTap is a Tap that keeps the packets that it gets.
type recordingTap struct {
	packets [][]byte
	why     []drop.Reason
}

func (*recordingTap) Wants() bool { return true }

func (r *recordingTap) Received(p []byte, why drop.Reason) uint32 {
	r.packets, r.why = append(r.packets, bytes.Clone(p)), append(r.why, why)
	return uint32(len(r.packets))
}

// A Tap gets each packet of an SA as it was received, decrypted or not, and why it is dropped. A packet of no SA
// goes to Options.Dropped.
func TestManagerOpen_tap(t *testing.T) {
	strangers := &recordingTap{} // packets of no SA
	m := NewManager(Options{Dropped: func(why drop.Reason, p []byte) { strangers.Received(p, why) }})
	cfg := esp.Config{SPI: 4711, Suite: esp.Suite{Cipher: esp.AESCBC, KeyBits: 128, Integrity: esp.HMACSHA1}, Protocol: 4,
		Keys: esp.Keys{Encryption: make([]byte, 16), Integrity: make([]byte, 20)}}
	in, err := esp.NewInbound(cfg)
	if err != nil {
		t.Fatal(err)
	}
	var counted drop.Counters
	tap := &recordingTap{}
	n := &negotiator{manager: m, session: &Session{dropped: func(why drop.Reason, n int) { counted.Add(why, uint64(n)) }, tap: tap}, local: addressA, remote: addressB}
	m.addSA(n.key(4711), &inboundSA{Inbound: in, owner: n})
	number := uint32(0)
	sealed := func(protocol uint8) *packet.Buffer {
		cfg := cfg
		cfg.Protocol = protocol
		out, err := esp.NewOutbound(cfg)
		if err != nil {
			t.Fatal(err)
		}
		number++
		b := packet.New(200)
		for range number { // the sequence numbers of each SA begin with 1
			p := (&endpoint{local: addressB, remote: addressA}).outer(50, 7)
			p[9] = protocol
			b.Set(p)
			if d := out.Seal(b); d != drop.None {
				t.Fatal(d)
			}
		}
		return b
	}
	rows := []struct {
		why  drop.Reason
		make func() *packet.Buffer
	}{
		{drop.None, func() *packet.Buffer { return sealed(4) }},
		{drop.ESPSelector, func() *packet.Buffer { return sealed(17) }},
		{drop.ESPFragment, func() *packet.Buffer {
			b := sealed(4)
			b.Bytes()[6] |= 0x20
			return b
		}},
		{drop.ESPExhausted, func() *packet.Buffer {
			in.Close()
			return sealed(4)
		}},
	}
	var kept []byte
	for i, row := range rows {
		b := row.make()
		p := bytes.Clone(b.Bytes())
		opened := m.open(b, 0, &kept)
		got := tap
		if row.why == drop.ESPFragment {
			got = strangers
		}
		if last := len(got.why) - 1; last < 0 || got.why[last] != row.why || !bytes.Equal(got.packets[last], p) || opened != (row.why == drop.None) {
			t.Fatalf("packet %d, %v: opened %v, seen are %v and %v", i, row.why, opened, tap.why, strangers.why)
		}
		if row.why == drop.None {
			if b.CaptureID != 1 {
				t.Errorf("its CaptureID is %d", b.CaptureID)
			}
			continue
		}
		if got == tap && counted.Load(row.why) != 1 {
			t.Errorf("%v is counted %d times", row.why, counted.Load(row.why))
		}
	}
	m.removeSA(n.key(4711), (*m.table.Load())[n.key(4711)])
	b := sealed(4)
	p := bytes.Clone(b.Bytes())
	if m.open(b, 0, &kept) || len(tap.why) != len(rows)-1 || len(strangers.why) != 2 || strangers.why[1] != drop.ESPNoSA || !bytes.Equal(strangers.packets[1], p) {
		t.Errorf("without an SA: %v", strangers.why)
	}
}
