package tunnel

import (
	"context"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"ipipd/encap"
	"ipipd/internal/capture"
	"ipipd/internal/drop"
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
	"ipipd/internal/underlay"
)

// Captures. The data path copies packets into the rings of Tunnel.captures, which is nil while there is
// no capture, and one goroutine for each capture writes them out. It also takes the packets that the fast path
// has copied (capturefast.go).

// ErrCaptures means that no more captures can run at once.
var ErrCaptures = fmt.Errorf("%d captures run in this process, the most at once: end one of them", capture.MaxRings)

const (
	captureRuns = "a capture runs" // for fastPathBlocker
	// captureMinPause and captureMaxPause bound how long a capture sleeps before it looks for packets again:
	// longer and longer while there are none, since the data path does not wake it.
	captureMinPause = time.Millisecond
	captureMaxPause = 50 * time.Millisecond
	// overflowInterval is how often a capture looks for packets that the kernel had no room for.
	overflowInterval = time.Second
	// missedInterval is how often it asks how many packets of the fast path had no room in the ring buffer.
	missedInterval = 100 * time.Millisecond
)

// Capture writes the packets of the tunnel of that Config.Name to w, as a pcapng file, until ctx is done,
// Options.Count is reached, the tunnel has ended or w fails. A tunnel that is made again is captured on.
// It fails with os.ErrNotExist if no such tunnel runs, and with ErrCaptures.
func (e *Engine) Capture(ctx context.Context, name string, o capture.Options, program string, w io.Writer) (result capture.Result, err error) {
	t := e.Tunnel(name)
	if t == nil {
		return result, os.ErrNotExist
	}
	ring := capture.NewRing(o)
	if err := e.addCapture(t, ring); err != nil {
		return result, err
	}
	defer func() { e.removeCapture(t, ring) }()
	t.syncCaptured(ctx)
	s, err := capture.NewStream(w, ring, t.captureHeader(program), time.Now())
	if err != nil {
		return result, err
	}
	overflows, looked := e.socket.Overflows(), time.Now()
	counted := looked
	budget := capture.NewBudget(s, o.Complete, runtime.NumCPU(), looked)
	pause := captureMinPause
	timer := time.NewTimer(pause)
	defer timer.Stop()
	for done := false; !done; {
		n, more := 0, false
		if err = t.takeFast(); err != nil {
			break
		}
		if n, more, err = s.Copy(); err != nil || s.Full() {
			break
		}
		now := time.Now()
		if now.Sub(counted) >= missedInterval {
			counted = now
			t.countMissedFast()
		}
		if now.Sub(looked) >= overflowInterval {
			looked = now
			if more := e.socket.Overflows(); more > overflows {
				err = s.Lost(drop.ReceiveOverflow, more-overflows, now)
				overflows = more
			}
		}
		switch {
		case more:
			pause = 0
		case n > 0:
			pause = captureMinPause
		default:
			pause = min(max(2*pause, captureMinPause), captureMaxPause)
		}
		timer.Reset(max(pause, budget.Wait(now)))
		select {
		case <-timer.C:
		case <-ctx.Done():
			done = true
		case <-t.done:
			next := e.nextTunnel(name)
			if next == nil || e.addCapture(next, ring) != nil {
				done = true
				break
			}
			t = next
			t.syncCaptured(ctx)
		}
	}
	if err == nil && !s.Full() {
		err = t.takeFast()
	}
	t.countMissedFast()
	e.removeCapture(t, ring)
	if result, end := s.End(time.Now()); err == nil {
		return result, end
	}
	return result, err
}

// nextTunnel returns the tunnel that Apply has made again in the place of one that has ended; nil if there is none.
func (e *Engine) nextTunnel(name string) *Tunnel {
	e.applying.Lock() // Apply closes the old tunnel before it makes the new one
	defer e.applying.Unlock()
	return e.Tunnel(name)
}

// addCapture has the packets of t go to ring.
func (e *Engine) addCapture(t *Tunnel, ring *capture.Ring) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	all := rings(e.captures.Load())
	if !slices.Contains(all, ring) {
		if len(all) == capture.MaxRings {
			return ErrCaptures
		}
		all = append(slices.Clone(all), ring)
		e.captures.Store(&all)
	}
	of := append(slices.Clone(rings(t.captures.Load())), ring)
	t.captures.Store(&of)
	return nil
}

// removeCapture undoes addCapture. It may be called more than once.
func (e *Engine) removeCapture(t *Tunnel, ring *capture.Ring) {
	e.mu.Lock()
	defer e.mu.Unlock()
	left := func(captures *capture.Rings) *capture.Rings {
		of := capture.Rings(without(rings(captures), capture.Rings{ring}))
		if len(of) == 0 {
			return nil
		}
		return &of
	}
	e.captures.Store(left(e.captures.Load()))
	t.captures.Store(left(t.captures.Load()))
	t.wakeControl() // the fast path may be used again
}

func rings(captures *capture.Rings) capture.Rings {
	if captures == nil {
		return nil
	}
	return *captures
}

// syncCaptured has control act on a new capture, and returns when the fast path copies its packets or is left.
func (t *Tunnel) syncCaptured(ctx context.Context) {
	left := make(chan struct{})
	select {
	case t.events <- func(c *control) { c.syncFastPath(); close(left) }:
	case <-t.done:
		return
	case <-ctx.Done():
		return
	}
	select {
	case <-left:
	case <-t.done:
	case <-ctx.Done():
	}
}

// captureHeader returns the pcapng header that describes the tunnel. No secret is in it.
func (t *Tunnel) captureHeader(program string) capture.Header {
	s := t.Status()
	h := capture.Header{Tunnel: s.Name(), Program: program, Comment: "packets are carried in userspace: " + s.FastPath}
	switch why, left := strings.CutPrefix(s.FastPath, captureRuns+": "); {
	case t.fast.active():
		h.Comment = "packets of the fast path are captured by a ring buffer of the kernel, those of userspace by ipipd"
	case left:
		h.Comment = "the fast path is left while the capture runs, and packets are carried in userspace meanwhile, which is slower: " + why
	}
	var of []string
	for _, p := range Properties() {
		if v := s.Setting(p.Name); v != "" && !p.Secret {
			of = append(of, p.Name+"="+v)
		}
	}
	of = append(of, fmt.Sprintf("current-local-address=%s current-remote-address=%s actual-mtu=%d path-mtu=%d keepalive-state=%s",
		s.CurrentLocalAddress, s.CurrentRemoteAddress, s.ActualMTU, s.PathMTU, s.KeepaliveState))
	if s.IPsec != "" {
		of = append(of, "ipsec="+s.IPsec)
	}
	h.Description = strings.Join(of, " ")
	cfg, path := t.config.Load(), &t.route.Load().path
	remote := s.Name() + "-remote"
	if _, named := cfg.remote(); named {
		remote = cfg.RemoteAddress
	}
	for _, n := range []capture.Name{{Address: path.Local, Name: s.Name() + "-local"}, {Address: path.Remote, Name: remote}} {
		if n.Address != [4]byte{} {
			n.Name = strings.ReplaceAll(n.Name, " ", "-")
			h.Names = append(h.Names, n)
		}
	}
	return h
}

// capture copies packet p, which is dropped unless why is drop.None, to the captures of the tunnel.
func (t *Tunnel) capture(where capture.Point, p []byte, why drop.Reason) {
	if captures := t.captures.Load(); captures != nil {
		captures.Packet(where, p, capture.NewID(), why, time.Now())
	}
}

// sent counts the packets of batch that were not sent, and captures all but those that the cipher refused.
// captures are the rings as loaded before transmitter.Write.
func (t *Tunnel) sent(captures *capture.Rings, batch []*packet.Buffer, sent, refused int, err error) {
	lost, why := len(batch)-sent-refused, drop.None
	if lost > 0 {
		why = sendDrop(err)
		t.count(why, lost)
	}
	if captures == nil || lost == 0 && captures.DropsOnly() {
		return
	}
	if lost == 0 && t.ipsecPolicy == nil && len(batch) > 1 && captures.Full() { // a single one may be an empty probe
		captures.Missed(capture.InnerOut, drop.None, len(batch))
		captures.Missed(capture.OuterOut, drop.None, len(batch))
		return
	}
	now := time.Now()
	if lost > 0 && sent > 0 { // Write does not tell which
		captures.Lost(why, lost, now)
		why = drop.None
	}
	for _, b := range batch {
		p := b.Bytes()
		switch {
		case t.ipsecPolicy == nil:
			b.CaptureID = capture.NewID()
			if inner := p[encap.Overhead:]; len(inner) > 0 {
				captures.Packet(capture.InnerOut, inner, b.CaptureID, why, now)
			}
		case b.CaptureID == 0: // refused, or the capture has begun since
			continue
		}
		captures.Packet(capture.OuterOut, p, b.CaptureID, why, now)
	}
}

// capturedSealer is the sealer of an encrypted tunnel. It captures the inner packet before that is encrypted in place.
type capturedSealer struct{ *Tunnel }

func (s capturedSealer) Seal(b *packet.Buffer) drop.Reason {
	captures := s.captures.Load()
	if captures == nil {
		return s.ipsecPolicy.Seal(b)
	}
	id := capture.NewID()
	var held capture.Held
	if inner := b.Bytes()[encap.Overhead:]; len(inner) > 0 {
		held = captures.Hold(capture.InnerOut, inner, id, time.Now())
	}
	why := s.ipsecPolicy.Seal(b)
	held.Settle(why)
	if why == drop.None {
		b.CaptureID = id
	}
	return why
}

// espTap captures received ESP packets: see ipsec.Tap.
type espTap struct{ *Tunnel }

func (t espTap) Wants() bool { return t.captures.Load() != nil }

func (t espTap) Received(p []byte, why drop.Reason) (id uint32) {
	if captures := t.captures.Load(); captures != nil {
		id = capture.NewID()
		captures.Packet(capture.OuterIn, p, id, why, time.Now())
	}
	return id
}

// decapsulateCaptured is decapsulate while a capture may run. It captures the outer packet or, of an ESP packet, whose
// outer packet espTap has captured, the inner packet if it is dropped; deliver captures those that are not.
func (t *Tunnel) decapsulateCaptured(b *packet.Buffer, outer ipv4.Packet, from origin, sender underlay.Sender, now time.Time) bool {
	var held capture.Held
	if captures := t.captures.Load(); captures != nil {
		if from == fromIPIP && captures.Full() {
			b.CaptureID = 0
			deliver, why := t.decapsulate(b, outer, sender, now)
			captures.Missed(capture.OuterIn, why, 1)
			return deliver
		}
		if from == fromESP {
			held = captures.Hold(capture.InnerIn, outer.Payload(), b.CaptureID, now)
		} else {
			b.CaptureID = capture.NewID()
			held = captures.Hold(capture.OuterIn, outer.Bytes(), b.CaptureID, now)
		}
	}
	deliver, why := t.decapsulate(b, outer, sender, now)
	if from == fromESP && why == drop.None {
		held.Discard()
	} else {
		held.Settle(why)
	}
	return deliver
}

// hold holds the inner packets of run, which are about to be written to the TUN.
func (b *buffers) hold(captures *capture.Rings, run []*packet.Buffer) {
	if b.held == nil {
		b.held = make([]capture.Held, batchSize)
	}
	now := time.Now()
	for i, p := range run {
		b.held[i] = captures.Hold(capture.InnerIn, p.Bytes(), p.CaptureID, now)
	}
}

// settle ends hold: n of the packets were written.
func (b *buffers) settle(captures *capture.Rings, held, n int, err error) {
	why := drop.None
	if n < held {
		why = writeDrop(err)
	}
	if n > 0 && n < held { // the TUN does not tell which
		captures.Lost(why, held-n, time.Now())
		why = drop.None
	}
	for i := range held {
		b.held[i].Settle(why)
	}
	clear(b.held[:held])
}
