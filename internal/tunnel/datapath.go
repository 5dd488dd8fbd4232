package tunnel

import (
	"errors"
	"os"
	"syscall"
	"time"

	"ipipd/encap"
	"ipipd/internal/capture"
	"ipipd/internal/drop"
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
	"ipipd/internal/underlay"
	"ipipd/mss"
	"ipipd/tun"
)

// The data path in both directions.
//
// There is an outbound per TUN queue, and an inbound per receiver. Workers call them (worker.go); at low
// load one thread serves both (handoff_linux.go). Between Read and Write nothing blocks, allocates, locks
// or logs per packet. Packets are counted here; timers and route changes are control's.

const (
	// batchSize is the number of packets per Read and Write: more than the segments of two
	// 64 KiB superpackets at an MTU of 1480 (46 each).
	batchSize = 128

	// maxReads is how many full batches in a row a TUN queue may have before others have their turn.
	maxReads = 4

	// icmpSize is the largest ICMP error in bytes (RFC 1812, section 4.3.2.3).
	icmpSize = 576
)

// anyRouter as the source of an ICMP error lets encap choose a source address that the host
// accepts.
var anyRouter [4]byte

// outbound forwards packets from one TUN queue to the underlay.
type outbound struct {
	tunnel *Tunnel
	device tun.Device
	queue  tun.Queue   // of device
	tx     transmitter // with the worker's Sender
	ids    idCounter
	remote route // the route that to returned last
}

func (o *outbound) failed(err error) {
	select {
	case o.tunnel.events <- func(c *control) { c.interfaceGone(o.device, err, time.Now()) }:
	case <-o.tunnel.ctx.Done():
	}
}

// carry reads and forwards a batch, and more while part of a superpacket is left in b.scratch, which the
// next queue needs.
func (o *outbound) carry(b *buffers) (n int, err error) {
	batch := b.outbound(o.tunnel)
	for reads := 1; ; reads++ {
		var got int
		if reads <= maxReads {
			got, err = o.queue.Read(&b.scratch, batch) // what is left, and more
		} else {
			got = b.scratch.Segments(batch)
		}
		if got > 0 && err == nil {
			n += got
			err = o.forward(b, batch[:got])
		}
		if err != nil || !b.scratch.Pending() {
			return n, err
		}
	}
}

// to returns the route to a remote that has none of its own, made of base. It is valid until the next call.
func (o *outbound) to(remote [4]byte, base *route) *route {
	if o.remote.base != base || o.remote.path.Remote != remote {
		o.remote = *base
		o.remote.base, o.remote.path.Remote, o.remote.outer.Remote = base, remote, remote
	}
	return &o.remote
}

// forward encapsulates and sends a batch of inner packets.
func (o *outbound) forward(buf *buffers, batch []*packet.Buffer) error {
	t := o.tunnel
	route, unreachable, captures := t.route.Load(), t.unreachable.Load(), t.captures.Load()
	base, path, out, paths := route, &route.path, buf.run[:0], buf.paths[:0]
	many := t.many
	if many != nil {
		many.lookUp(batch, buf.next[:])
	}
	for i, b := range batch {
		inner, err := ipv4.Parse(b.Bytes())
		if err != nil {
			t.dropPacket(innerDrop(err), capture.InnerOut, b.Bytes())
			continue
		}
		if many != nil {
			n := &buf.next[i]
			remote, d := n.remote, n.why
			if d != drop.None && base.outer.Loops(inner) || base.anyLocal() && t.many.loops(inner, remote) {
				d = drop.Loop
			}
			if d != drop.None {
				t.dropPacket(d, capture.InnerOut, b.Bytes())
				if d == drop.RemoteNotUsable { // no-remote may be a route that is not followed yet
					t.sendICMPError(o.queue, buf, encap.HostUnreachable(buf.icmp[0], inner, anyRouter))
				}
				continue
			}
			if remote != route.path.Remote { // which is zero if route is base
				if route, path = n.route, &base.path; route != nil {
					path = &route.path
				} else {
					route = o.to(remote, base)
				}
			}
		}
		// Encapsulate detects a loop. That must come before any ICMP error, since one about
		// our own outer packet would set a wrong path MTU.
		if d := route.outer.Encapsulate(b, inner, o.ids.next()); d != drop.None {
			t.dropPacket(d, capture.InnerOut, inner.Bytes())
			continue
		}
		if route.txDrop != drop.None {
			t.dropPacket(route.txDrop, capture.InnerOut, inner.Bytes())
			t.sendICMPError(o.queue, buf, encap.HostUnreachable(buf.icmp[0], inner, anyRouter))
			continue
		}
		if inner.TotalLen() > route.maxInner && route.outer.DontFragment(inner) {
			t.dropPacket(drop.TooBig, capture.InnerOut, inner.Bytes())
			t.sendICMPError(o.queue, buf, encap.TooBig(buf.icmp[0], inner, route.maxInner, anyRouter))
			continue
		}
		if unreachable || route.unreachable { // still sent: an answer is what shows that the path is back
			t.sendICMPError(o.queue, buf, encap.HostUnreachable(buf.icmp[0], inner, anyRouter))
		}
		if out = append(out, b); many != nil || len(paths) == 0 {
			paths = append(paths, path)
		}
	}
	buf.paths = paths // append may have made it larger
	if len(out) == 0 {
		return nil
	}
	var bytes uint64
	for _, b := range out {
		bytes += uint64(b.Len() - encap.Overhead)
	}
	sent, refused, err := o.tx.Write(out, paths) // encrypts, if the tunnel has a secret
	if errors.Is(err, os.ErrClosed) {
		return err
	}
	if sent > 0 {
		t.counters.tx.add(sent, bytes)
		t.engine.noteTraffic()
	}
	t.sent(captures, out, sent, refused, err)
	return nil
}

// sendICMPError writes the ICMP error in b.icmp to the TUN device, rate-limited. d is the reason
// why the error could not be built, or drop.None.
func (t *Tunnel) sendICMPError(queue tun.Queue, b *buffers, d drop.Reason) {
	if d == drop.None && !t.icmpLimit.allow(time.Now(), perSecond) {
		d = drop.ICMPLimited
	}
	if d != drop.None {
		t.drop(d)
		return
	}
	_, err := queue.Write(&b.scratch, b.icmp)
	if err != nil && !errors.Is(err, os.ErrClosed) {
		d = writeDrop(err)
		t.count(d, 1)
	}
	t.capture(capture.InnerIn, b.icmp[0].Bytes(), d)
}

// origin is the protocol of a received outer packet.
type origin bool

const (
	fromIPIP origin = false // protocol 4, cleartext
	fromESP  origin = true  // protocol 50 or UDP-encapsulated ESP, decrypted
)

// inbound forwards packets from one receiver to their tunnels' devices.
type inbound struct {
	engine   *Engine
	receiver underlay.Receiver
	from     origin
	fail     func(error) // called if the receiver fails
}

func (in *inbound) failed(err error) {
	in.engine.log.Error("receiving failed", "esp", bool(in.from), "err", err)
	in.fail(err)
}

// carry receives a batch, decapsulates it, and delivers it to the tunnels' devices.
func (in *inbound) carry(buf *buffers) (n int, err error) {
	e, batch, owners := in.engine, buf.inbound(), &buf.owners
	n, err = in.receiver.Read(batch)
	if n == 0 || err != nil {
		return n, err
	}
	now := time.Now()
	table, others, captured := e.table.Load(), e.others.Load(), e.captures.Load() != nil
	for i, b := range batch[:n] {
		owners[i] = nil
		outer, d := encap.ParseOuter(b)
		if d != drop.None {
			e.dropPacket(d, b.Bytes())
			continue
		}
		t := table.find(outer.Destination(), outer.Source())
		if t == nil {
			t = others.find(outer.Destination(), outer.Source())
		}
		if t == nil {
			t = table.findMany(outer.Destination())
		}
		if t == nil {
			e.dropPacket(drop.UnknownPeer, outer.Bytes())
			continue
		}
		if encrypted := t.ipsecPolicy != nil; encrypted != bool(in.from) {
			t.dropPolicyMismatch(encrypted, outer)
			continue
		}
		deliver := false
		if captured {
			deliver = t.decapsulateCaptured(b, outer, in.from, buf.sender, now)
		} else {
			deliver, _ = t.decapsulate(b, outer, buf.sender, now)
		}
		if deliver {
			owners[i] = t
		}
	}
	// Write each tunnel's packets together and in order, so that its device can coalesce
	// them. A batch rarely has packets of several tunnels.
	for i := range n {
		t := owners[i]
		if t == nil {
			continue
		}
		run := buf.run[:0]
		for j := i; j < n; j++ {
			if owners[j] == t {
				run = append(run, batch[j])
				owners[j] = nil
			}
		}
		t.deliver(run, buf)
	}
	return n, nil
}

// decapsulate turns the outer packet in b into an inner packet, and reports whether b is to be
// delivered to the device. Probes are not, nor packets that are dropped, which it counts under d.
func (t *Tunnel) decapsulate(b *packet.Buffer, outer ipv4.Packet, sender underlay.Sender, now time.Time) (deliver bool, d drop.Reason) {
	route := t.route.Load()
	if route.txDrop == drop.NoLocalAddress && !route.receiveOnly {
		t.engine.count(drop.UnknownPeer, 1) // in transit to the host that has the address
		return false, drop.UnknownPeer
	}
	path, other := &route.path, (*otherRemote)(nil)
	if outer.Source() != path.Remote {
		if other = t.other(outer.Source()); other != nil {
			path = &other.path
		}
	}
	local, remote := path.Local, path.Remote
	if t.many != nil {
		local, remote = outer.Destination(), outer.Source()
	}
	inner, kind, d := encap.Decapsulate(b, outer, local, remote)
	if t.many != nil {
		d = t.many.accepts(remote, inner, kind, d)
	}
	if d != drop.None {
		t.count(d, 1)
		return false, d
	}
	back := route // the route to the remote
	if t.many != nil {
		if back = t.many.heard(remote, int64(now.Sub(t.epoch))); back != nil && back.unreachable {
			t.wakeControl()
		}
	}
	if other == nil {
		t.noteReceived(now)
	} else {
		t.noteOther(other, now)
	}
	switch kind {
	case encap.KindEmpty:
		if route.echo != nil { // the peer's own probe: the answer to ours is an echo reply
			t.peerProbes.Store(true)
		} else {
			t.noteProbeAnswer(now)
		}
		return false, drop.None
	case encap.KindReflect:
		t.noteReflect(inner.Destination(), remote)
		return false, t.answerProbe(b, sender, fromLocal(path, local), local, remote, t.reflects(back, now))
	}
	mtu := t.MTU()
	if b.Checksum == packet.ChecksumUnknown {
		d := encap.DeriveOffload(b, inner, max(mtu, route.maxInner))
		if (b.Checksum == packet.ChecksumPartial || d == drop.SuperpacketSizeUnknown) && t.engine.partialChecksums.observe(now) {
			t.wakeControl() // see updateReception
		}
		if d != drop.None {
			t.count(d, 1)
			return false, d
		}
	} else if b.Checksum == packet.ChecksumPartial {
		t.engine.partialChecksums.observe(now)
	}
	if route.echo != nil && route.echo.IsReply(inner) {
		t.noteProbeAnswer(now)
		return false, drop.None
	}
	if inner.TotalLen() > mtu && b.SegmentSize == 0 && t.oversize.note(inner.TotalLen()) { // delivered nevertheless
		t.wakeControl()
	}
	if route.clampMSS {
		mss.Clamp(inner, back.largest(mtu), b.Checksum == packet.ChecksumPartial)
	}
	return true, drop.None
}

// deliver writes inner packets of one tunnel to its device and counts them.
func (t *Tunnel) deliver(run []*packet.Buffer, b *buffers) {
	packets, bytes := countSegments(run)
	queues, captures := *t.queues.Load(), t.captures.Load()
	if captures != nil && captures.Full() {
		captures.Missed(capture.InnerIn, drop.None, len(run))
		captures = nil
	}
	if captures != nil {
		b.hold(captures, run)
	}
	n, err := queues[b.index%len(queues)].Write(&b.scratch, run)
	t.counters.rx.add(packets-(len(run)-n), bytes)
	t.engine.noteTraffic()
	if n < len(run) {
		t.count(writeDrop(err), len(run)-n)
	}
	if captures != nil {
		b.settle(captures, len(run), n, err)
	}
}

// reflects reports whether to answer one more reflect probe now. r is the remote's own route; nil if it has none.
func (t *Tunnel) reflects(r *route, now time.Time) bool {
	if r == nil || r.remote == nil {
		return t.reflectLimit.allow(now, perSecond)
	}
	return r.remote.reflectLimit.allow(now, remotePerSecond)
}

// answerProbe sends the inner packet of the peer's reflect probe back to the peer, as a forwarding
// router would, if it is allowed. The packet must not reach the device.
func (t *Tunnel) answerProbe(b *packet.Buffer, sender underlay.Sender, path *underlay.Path, local, remote [4]byte, allowed bool) (d drop.Reason) {
	if !allowed {
		d = drop.ReflectLimited
	} else {
		d = encap.ReflectAnswer(b, local, remote)
	}
	if d != drop.None {
		t.count(d, 1)
		return d
	}
	t.sendLocal(t.newTransmitter(sender), b, path)
	return drop.None
}

// dropPolicyMismatch drops a cleartext packet for a tunnel with a secret, or an ESP packet
// for one without.
func (t *Tunnel) dropPolicyMismatch(encrypted bool, outer ipv4.Packet) {
	if encrypted {
		t.dropPacket(drop.ESPPlainText, capture.OuterIn, outer.Bytes())
	} else {
		t.engine.dropPacket(drop.UnknownPeer, outer.Bytes())
	}
}

// innerDrop maps a parse error of an inner packet to its drop reason.
func innerDrop(err error) drop.Reason {
	if err == ipv4.ErrVersion {
		return drop.InnerNotIPv4
	}
	return drop.InnerMalformed
}

// sendDrop maps an error of an underlay send to its drop reason.
func sendDrop(err error) drop.Reason {
	if reason, ok := err.(drop.Reason); ok { // from encryptedTx
		return reason
	}
	switch {
	case errors.Is(err, syscall.ENOBUFS), errors.Is(err, syscall.EAGAIN):
		return drop.QueueFull
	case errors.Is(err, syscall.EMSGSIZE):
		return drop.TooBig
	case errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETDOWN):
		return drop.NoPath
	}
	return drop.SendFailed
}

// writeDrop maps an error of a TUN write to its drop reason.
func writeDrop(err error) drop.Reason {
	if errors.Is(err, syscall.EIO) || errors.Is(err, os.ErrClosed) { // the interface is down, or gone
		return drop.ReceivedNotRunning
	}
	return drop.WriteFailed
}

// idCounter allocates the Identification of outer packets with DF=0, which must not repeat
// within a packet's lifetime (RFC 6864, section 4.2). Each queue has its own range, first to
// end, and so needs no lock. Values are consecutive, as the receiver's GRO requires.
type idCounter struct{ at, first, end uint16 }

func (i *idCounter) next() uint16 {
	if i.at == i.end {
		i.at = i.first
	} else {
		i.at++
	}
	return i.at
}
