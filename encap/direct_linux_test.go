package encap

import (
	"errors"
	"os"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"ipipd/internal/netlab"
	"ipipd/internal/packet"
)

// directly is two hosts, a Socket of the first that sends frames to the second
// directly, and the way there.
func directly(t testing.TB) (a, b *netlab.NS, s *socket, path *Path) {
	t.Helper()
	a, b = twoHosts(t)
	s = open(t, a, SocketOptions{}).(*socket)
	setDirect(t, a, s, deviceIndex(t, a, "eth0"))
	framed := *pathA
	framed.Link = linkTo(t, a, b)
	return a, b, s, &framed
}

func setDirect(t testing.TB, ns *netlab.NS, s *socket, device int) {
	t.Helper()
	var err error
	netlab.ComesTrue(func() bool {
		ns.Do(func() { err = s.SetDirect(device) })
		return !errors.Is(err, unix.EBUSY) // the kernel is still about the one before
	})
	if errors.Is(err, unix.EAFNOSUPPORT) {
		t.Skip("needs AF_XDP in the kernel (CONFIG_XDP_SOCKETS)")
	}
	if err != nil {
		t.Fatal(err)
	}
}

// seenBySender is what a packet socket of the sender's sees: nothing that is sent directly.
func seenBySender(t *testing.T, ns *netlab.NS) *netlab.Recorder {
	t.Helper()
	return netlab.Capture(t, ns, "eth0", func(f netlab.Frame) bool { return f.Outgoing && f.Packet[9] == unix.IPPROTO_IPIP })
}

// numbered are n packets whose IDs count from first on; the sizes differ.
func numbered(path *Path, first, n int) (batch []*packet.Buffer) {
	for i := range n {
		batch = append(batch, outerPacket(path, 1500-(i%3)*700, uint16(first+i)))
	}
	return batch
}

func id(b *packet.Buffer) int { return int(b.Bytes()[4])<<8 | int(b.Bytes()[5]) }

// More than the ring holds, and few between many, which go the ordinary way: no packet
// is missing, or another, or out of order.
func TestFramesThatAreSentDirectlyAreTheSameToThePeer(t *testing.T) {
	a, b, s, path := directly(t)
	r := open(t, b, SocketOptions{}).Receivers()[0]
	seen := seenBySender(t, a)
	sender := s.NewSender()
	var want []*packet.Buffer
	for _, n := range []int{directRing*2 + 50, 1, directFew - 1, directFew, 100} {
		batch := numbered(path, len(want)+1, n)
		mustWrite(t, sender, path, batch...)
		want = append(want, batch...)
	}
	for i, got := range read(t, r, len(want), 2048) {
		if string(got.Bytes()) != string(want[i].Bytes()) {
			t.Fatalf("packet %d is another: ID %d, %d bytes", i, id(got), got.Len())
		}
	}
	if got := seen.AwaitN(directFew); len(got) != directFew {
		t.Errorf("%d packets went the ordinary way, not %d", len(got), directFew)
	}
	if s.direct.Load() == nil {
		t.Error("direct transmission has ended by itself")
	}
	setDirect(t, a, s, 0)
	mustWrite(t, sender, path, numbered(path, 1, 20)...)
	seen.AwaitN(directFew + 20)
}

func TestWhatIsNotForTheDeviceOrTooLargeIsNotSentDirectly(t *testing.T) {
	a, b, s, path := directly(t)
	r := open(t, b, SocketOptions{}).Receivers()[0]
	seen := seenBySender(t, a)
	sender := s.NewSender()
	byRoute, jumbo, elsewhere := *path, *path, *path
	byRoute.Link = nil
	jumbo.MTU = 9000
	elsewhere.Link = &Link{Device: path.Link.Device + 1000, Header: path.Link.Header}
	for _, p := range []*Path{&byRoute, &jumbo, &elsewhere} {
		mustWrite(t, sender, p, numbered(p, 1, 20)...)
		read(t, r, 20, 2048)
	}
	seen.AwaitN(60)
}

// An interface that is down or gone costs direct transmission, and no more packets than
// it would have without.
func TestDirectTransmissionEndsWithItsInterface(t *testing.T) {
	a, b := twoHosts(t)
	netlab.Veth(t, a, b, netlab.End{Name: "old"}, netlab.End{Name: "old"})
	s := open(t, a, SocketOptions{}).(*socket)
	r := open(t, b, SocketOptions{}).Receivers()[0]
	old := deviceIndex(t, a, "old")
	path := *pathA
	path.Link = &Link{Device: old}
	for _, command := range []string{"ip link set old down", "ip link delete old"} {
		a.Run("ip", "link", "set", "old", "up")
		setDirect(t, a, s, old)
		a.Run("sh", "-c", command)
		sender := s.NewSender()
		mustWrite(t, sender, &path, numbered(&path, 1, 20)...) // by the routes
		for i, got := range read(t, r, 20, 2048) {
			if id(got) != i+1 {
				t.Errorf("after %q packet %d is %d", command, i, id(got))
			}
		}
		if s.direct.Load() != nil {
			t.Errorf("after %q it goes on", command)
		}
	}
	var err error
	if a.Do(func() { err = s.SetDirect(old) }); err == nil {
		t.Error("it begins anew on an interface that is not there")
	}
	if s.direct.Load() != nil || s.SetDirect(0) != nil {
		t.Error("what failed is in use")
	}
}

// A peer that is down has the driver refuse what it is given.
func TestFramesThatTheDriverRefusesAreNotCountedAsSent(t *testing.T) {
	a, b, s, path := directly(t)
	b.Run("ip", "link", "set", "eth0", "down")
	netlab.Eventually(t, "the carrier is lost", func() bool { _, err := a.Try("sh", "-c", "ip link show eth0 | grep -q NO-CARRIER"); return err == nil })
	n, err := s.NewSender().Write(numbered(path, 1, 20), path)
	if n != 0 || err == nil {
		t.Errorf("%d were sent: %v", n, err)
	}
}

// Senders share what there is of direct transmission, or do without, while it begins and
// ends. Each one's packets stay in order.
func TestSendersShareDirectTransmission(t *testing.T) {
	const senders, rounds, each = 3, 60, 40
	a, b, s, path := directly(t)
	r := open(t, b, SocketOptions{ReceiveBuffer: 64 << 20}).Receivers()[0]
	device := deviceIndex(t, a, "eth0")
	done := make(chan struct{})
	var sending, switching sync.WaitGroup
	switching.Go(func() {
		a.Do(func() {
			for on := false; ; on = !on {
				select {
				case <-done:
					return
				default:
				}
				to := 0
				if on {
					to = device
				}
				if err := s.SetDirect(to); err != nil && !errors.Is(err, unix.EBUSY) {
					t.Error(err)
				}
			}
		})
	})
	for i := range senders {
		sending.Go(func() {
			sender := s.NewSender()
			for round := range rounds {
				if n, err := sender.Write(numbered(path, i*10_000+round*each+1, each), path); n != each || err != nil {
					t.Errorf("%d of %d: %v", n, each, err)
				}
			}
		})
	}
	got := read(t, r, senders*rounds*each, 2048)
	sending.Wait()
	close(done)
	switching.Wait()
	var last [senders]int
	for _, b := range got {
		from := id(b) / 10_000
		if id(b)%10_000 != last[from]+1 {
			t.Fatalf("sender %d: %d follows %d", from, id(b)%10_000, last[from])
		}
		last[from]++
	}
}

func TestCloseEndsDirectTransmission(t *testing.T) {
	a, _, s, path := directly(t)
	before := openFiles(t)
	sender := s.NewSender()
	mustWrite(t, sender, path, numbered(path, 1, 20)...)
	s.Close()
	if _, err := sender.Write(numbered(path, 1, 20), path); !errors.Is(err, os.ErrClosed) {
		t.Error(err)
	}
	var err error
	if a.Do(func() { err = s.SetDirect(path.Link.Device) }); !errors.Is(err, os.ErrClosed) {
		t.Error(err)
	}
	if s.direct.Load() != nil || openFiles(t) >= before {
		t.Error("it is open")
	}
}

func TestSendingDirectlyDoesNotAllocate(t *testing.T) {
	_, _, s, path := directly(t)
	sender, batch := s.NewSender(), numbered(path, 1, 64)
	mustWrite(t, sender, path, batch...)
	if n := testing.AllocsPerRun(20, func() { mustWrite(t, sender, path, batch...) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
