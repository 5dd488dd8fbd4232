package tunnel

import (
	"context"
	"errors"
	"os"
	"runtime"
	"syscall"
	"time"

	"ipipd/encap"
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
	"ipipd/internal/underlay"
	"ipipd/mss"
	"ipipd/tun"
)

// The data path, both directions of it, whole.
//
// outbound runs once per queue of a tunnel's device, inbound once per receiver
// of the process's socket, each on a thread of its own; while little comes, the
// receiver's serves both (lending.go). Between a Read and a Write everything is a
// function on bytes: nothing here waits, allocates, locks or logs for a packet.
// What has to be said about packets is counted; what has to be done about them
// beyond that (a probe's timer, a new route) is the supervisor's.

const (
	// batchSize is how many packets cross a door at once: more than the
	// segments of two 64 KiB superpackets at an MTU of 1480 (46 each).
	batchSize = 128

	// icmpSize has room for the largest ICMP error (RFC 1812, section 4.3.2.3).
	icmpSize = 576
)

// anyRouter, as the source of an ICMP error to an inner sender, leaves it to
// encap, which knows an address that the host accepts there.
var anyRouter [4]byte

// outbound is what carries packets from one queue of the device to the socket. One
// thread at a time uses it: its own, or one that has it lent (see borrower).
type outbound struct {
	tunnel *Tunnel
	queue  tun.Queue
	tx     transmitter
	ids    identifier
	batch  []*packet.Buffer
	out    []*packet.Buffer
	// message is for the ICMP errors that go back to inner senders.
	message *packet.Buffer

	load    load
	handoff handoff
}

func (t *Tunnel) newOutbound(queue tun.Queue, tx transmitter, ids identifier) *outbound {
	return &outbound{
		tunnel: t, queue: queue, tx: tx, ids: ids,
		batch:   t.outboundBatch(nil),
		out:     make([]*packet.Buffer, 0, batchSize),
		message: packet.New(icmpSize),
		handoff: handoff{back: make(chan struct{}, 1)},
	}
}

// run carries packets until either door is closed. ctx is done before they are.
func (o *outbound) run(ctx context.Context) error {
	runtime.LockOSThread()
	for {
		since := time.Now()
		n, err := o.queue.Read(o.batch)
		if err != nil {
			return err
		}
		idle := o.load.idle(n, since, time.Now())
		if err := o.carry(n); err != nil {
			return err
		}
		if idle {
			o.park(ctx)
		}
	}
}

// carry sends the first n packets of the batch.
func (o *outbound) carry(n int) error {
	t := o.tunnel
	route, unreachable := t.route.Load(), t.unreachable.Load()
	out := o.out[:0]
	var bytes uint64
	for _, b := range o.batch[:n] {
		inner, err := ipv4.Parse(b.Bytes())
		if err != nil {
			t.drop(innerDrop(err))
			continue
		}
		// The look for a loop is in here, and comes before any ICMP message:
		// one about our own outer packet would teach us a path MTU that is
		// not one.
		if d := route.outer.Encapsulate(b, inner, o.ids.next()); d != encap.DropNone {
			t.drop(d)
			continue
		}
		if route.refuse != encap.DropNone {
			t.drop(route.refuse)
			t.sendICMPError(o.queue, o.message, encap.HostUnreachable(o.message, inner, anyRouter))
			continue
		}
		if inner.TotalLen() > route.maxInner && route.outer.DontFragment(inner) {
			t.drop(encap.DropTooBig)
			t.sendICMPError(o.queue, o.message, encap.TooBig(o.message, inner, route.maxInner, anyRouter))
			continue
		}
		if unreachable { // it is sent all the same: only so is it found out that the path is back
			t.sendICMPError(o.queue, o.message, encap.HostUnreachable(o.message, inner, anyRouter))
		}
		bytes += uint64(inner.TotalLen())
		out = append(out, b)
	}
	if len(out) > 0 {
		sent, refused, err := o.tx.Write(out, &route.path) // sealed, if the tunnel has a secret
		if errors.Is(err, os.ErrClosed) {
			return err
		}
		if sent > 0 {
			t.counters.tx.add(sent, bytes)
		}
		if lost := len(out) - sent - refused; lost > 0 {
			t.counters.drops.add(sendDrop(err), lost)
		}
	}
	o.batch = t.outboundBatch(o.batch)
	return nil
}

// sendICMPError gives an ICMP error that was made for an inner sender to the host.
func (t *Tunnel) sendICMPError(queue tun.Queue, message *packet.Buffer, made encap.Drop) {
	if made == encap.DropNone && !t.icmpLimit.allow(time.Now()) {
		made = encap.DropICMPLimited
	}
	if made != encap.DropNone {
		t.drop(made)
		return
	}
	if _, err := queue.Write([]*packet.Buffer{message}); err != nil && !errors.Is(err, os.ErrClosed) {
		t.drop(writeDrop(err))
	}
}

// origin is how an outer packet came in.
type origin bool

const (
	fromIPIP origin = false // as protocol 4
	fromESP  origin = true  // as ESP, and it was opened
)

// inbound carries packets from one receiver to the devices of the tunnels they
// belong to, until the receiver is closed.
func (h *Engine) inbound(receiver underlay.Receiver, sender underlay.Sender, index int, how origin) error {
	runtime.LockOSThread()
	var (
		batch  = packet.NewBatch(batchSize, packet.MaxSize)
		owners [batchSize]*Tunnel
		run    = make([]*packet.Buffer, 0, batchSize)
		rxLoop = newRxLoop(receiver)
	)
	defer rxLoop.releaseAll()
	for {
		n, err := receiver.Read(batch)
		if err != nil {
			return err
		}
		now := time.Now()
		table := h.table.Load()
		for i, b := range batch[:n] {
			owners[i] = nil
			outer, d := encap.ParseOuter(b)
			if d != encap.DropNone {
				h.drop(d)
				continue
			}
			t := table.find(outer.Destination(), outer.Source())
			if t == nil {
				h.drop(encap.DropUnknownPeer)
				continue
			}
			if sealed := t.ipsecPolicy != nil; sealed != bool(how) {
				t.countPolicyMismatch(sealed)
				continue
			}
			if t.accept(b, outer, sender, now) {
				owners[i] = t
			}
		}
		// A batch holds few tunnels, most often one: gather each one's packets,
		// in order, so that its device can coalesce them.
		for i := range n {
			t := owners[i]
			if t == nil {
				continue
			}
			run = run[:0]
			for j := i; j < n; j++ {
				if owners[j] == t {
					run = append(run, batch[j])
					owners[j] = nil
				}
			}
			t.deliver(run, index)
			if len(run) < smallBatch {
				t.noteReceiver(rxLoop)
			}
		}
		rxLoop.serve(n, now)
	}
}

// accept turns the outer packet in b into an inner packet for the device, and
// reports whether there is one: a probe ends here, and so does a packet that
// breaks a rule.
func (t *Tunnel) accept(b *packet.Buffer, outer ipv4.Packet, sender underlay.Sender, now time.Time) bool {
	route := t.route.Load()
	if route.refuse == encap.DropNoLocalAddress {
		t.host.drop(encap.DropUnknownPeer) // it passes this host, on its way to that which has the address
		return false
	}
	kind, d := encap.Decapsulate(b, outer, route.path.Local, route.path.Remote)
	if d != encap.DropNone {
		t.drop(d)
		return false
	}
	t.noteReceived(now)
	switch kind {
	case encap.KindEmpty:
		t.answered.Store(true)
		return false
	case encap.KindReflect:
		t.probes.Store(true)
		t.answer(b, sender, route, now)
		return false
	}
	mtu := t.MTU()
	if b.Checksum == packet.ChecksumUnknown {
		d := encap.DeriveOffload(b, max(mtu, route.maxInner))
		if (b.Checksum == packet.ChecksumPartial || d == encap.DropSuperpacketSizeUnknown) && t.host.unfinished.note(now) {
			t.wakeSupervisor() // the peer is on our own machine: see chooseReceiving
		}
		if d != encap.DropNone {
			t.drop(d)
			return false
		}
	} else if b.Checksum == packet.ChecksumPartial {
		t.host.unfinished.note(now)
	}
	inner, err := ipv4.Parse(b.Bytes())
	if err != nil {
		t.drop(encap.DropReceivedMalformed)
		return false
	}
	if t.echo != nil && t.echo.IsReply(inner) {
		t.answered.Store(true)
		return false
	}
	if inner.TotalLen() > mtu && b.SegmentSize == 0 && t.oversize.Load() == 0 {
		t.oversize.Store(int32(inner.TotalLen())) // it is delivered all the same
		t.wakeSupervisor()
	}
	if t.cfg.ClampTCPMSS {
		mss.Clamp(inner, mtu, b.Checksum == packet.ChecksumPartial)
	}
	return true
}

// deliver hands inner packets of one tunnel to its device.
func (t *Tunnel) deliver(run []*packet.Buffer, index int) {
	packets, bytes := countSegments(run)
	n, err := t.queues[index%len(t.queues)].Write(run)
	t.counters.rx.add(packets-(len(run)-n), bytes)
	if n < len(run) && !errors.Is(err, os.ErrClosed) {
		t.counters.drops.add(writeDrop(err), len(run)-n)
	}
}

// answer sends the inner packet of the peer's reflect probe back to it, which is
// what a router's forwarding would do. It must not reach the device.
func (t *Tunnel) answer(b *packet.Buffer, sender underlay.Sender, route *route, now time.Time) {
	if !t.reflectLimit.allow(now) {
		t.drop(encap.DropReflectLimited)
		return
	}
	if d := encap.ReflectAnswer(b, route.path.Remote); d != encap.DropNone {
		t.drop(d)
		return
	}
	t.write(t.transmitter(sender), b, &route.path)
}

// countPolicyMismatch counts a packet that came plain to a tunnel with a secret, or sealed to
// one without, for which it is a stranger's.
func (t *Tunnel) countPolicyMismatch(secret bool) {
	if secret {
		t.ipsecPolicy.countCleartext()
	} else {
		t.host.drop(encap.DropUnknownPeer)
	}
}

// innerDrop names the reason why a packet that the host sent is not one for the
// tunnel.
func innerDrop(err error) encap.Drop {
	if err == ipv4.ErrVersion {
		return encap.DropInnerNotIPv4
	}
	return encap.DropInnerMalformed
}

// sendDrop names the reason why the kernel took no packet.
func sendDrop(err error) encap.Drop {
	switch {
	case errors.Is(err, syscall.ENOBUFS), errors.Is(err, syscall.EAGAIN):
		return encap.DropQueueFull
	case errors.Is(err, syscall.EMSGSIZE):
		return encap.DropTooBig
	case errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETDOWN):
		return encap.DropNoPath
	}
	return encap.DropSendFailed
}

// writeDrop names the reason why the host took no packet.
func writeDrop(err error) encap.Drop {
	if errors.Is(err, syscall.EIO) { // the interface is down
		return encap.DropReceivedNotRunning
	}
	return encap.DropWriteFailed
}

// identifier gives out values for the ID field of outer packets with DF=0, which
// must not repeat soon (RFC 6864 section 4.2). Each queue has its own, with values
// from first to end that no other has, so that none needs a lock. They are given
// out one after the other: the receiver's GRO merges no others.
type identifier struct{ at, first, end uint16 }

func (i *identifier) next() uint16 {
	if i.at == i.end {
		i.at = i.first
	} else {
		i.at++
	}
	return i.at
}
