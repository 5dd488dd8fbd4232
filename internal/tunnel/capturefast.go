package tunnel

import (
	"ipipd/internal/capture"
	"ipipd/internal/drop"
	"ipipd/internal/fastpath"
)

// Captures of the fast path. While a tunnel is captured the eBPF programs copy the beginning of each packet into a
// ring buffer of the kernel, and the goroutines of the captures copy it from there into theirs. If the kernel has
// none to offer, the fast path is left while the capture runs.

// noteCaptures notes what the captures of the tunnel want the fast path to copy.
func (c *control) noteCaptures() {
	c.fast.captured = fastpath.Capture{}
	if captures := c.captures.Load(); captures != nil {
		c.fast.captured.Snaplen, c.fast.captured.Drops = captures.Wanted()
	}
}

// openFastCapture has the kernel make the ring buffer, if it is needed and is not there.
func (c *control) openFastCapture() {
	c.fast.captureErr = nil
	if link := c.fast.link.Load(); link != nil && c.fast.captured.Snaplen > 0 {
		c.fast.captureErr = link.OpenCapture()
	}
}

// closeFastCapture closes the ring buffer if no capture needs it. The programs do not use it any more by now.
func (c *control) closeFastCapture() {
	if link := c.fast.link.Load(); link != nil && c.fast.captured.Snaplen == 0 {
		link.CloseCapture()
	}
}

// takeFast copies the packets that the fast path has carried and dropped from its ring buffer to the captures.
func (t *Tunnel) takeFast() error {
	link, captures := t.fast.link.Load(), t.captures.Load()
	if link == nil || captures == nil {
		return nil
	}
	_, err := link.Captured(captures.Room, func(p *fastpath.Captured) { captureFast(*captures, p) })
	return err
}

// countMissedFast counts the packets for which the kernel's ring buffer had no room as missed by the captures.
func (t *Tunnel) countMissedFast() {
	link, captures := t.fast.link.Load(), t.captures.Load()
	if link == nil || captures == nil {
		return
	}
	n, drops, err := link.NotCaptured()
	if err != nil {
		t.log.Debug("cannot read how many packets of the fast path were not captured", "err", err)
	}
	if n > 0 { // of either direction: each is missing as inner and as outer packet
		captures.Missed(capture.InnerIn, drop.None, int(n))
		captures.Missed(capture.OuterIn, drop.None, int(n))
	}
	if drops > 0 {
		captures.Missed(capture.OuterIn, drop.ReversePath, int(drops))
	}
}

// captureFast captures a packet of the fast path.
func captureFast(captures capture.Rings, p *fastpath.Captured) {
	id, why := capture.NewID(), fastDrop(p.Why)
	inner := func(where capture.Point) {
		captures.Snapped(where, p.Inner(), p.Length-len(p.Outer)+len(p.Inner()), id, why, p.At)
	}
	outer := func(where capture.Point) {
		p.AsReceived(func(outer []byte) { captures.Snapped(where, outer, p.Length, id, why, p.At) })
	}
	switch {
	case p.Outbound:
		inner(capture.InnerOut)
		outer(capture.OuterOut)
	case why != drop.None:
		outer(capture.OuterIn)
	default:
		outer(capture.OuterIn)
		inner(capture.InnerIn)
	}
}

// fastDrop returns why the fast path has dropped a packet; drop.None if it has not.
func fastDrop(why fastpath.Why) drop.Reason {
	switch why {
	case fastpath.ReversePath:
		return drop.ReversePath
	case fastpath.NotInAcceptFrom:
		return drop.NotInAcceptFrom
	case fastpath.NotInAcceptTo:
		return drop.NotInAcceptTo
	case fastpath.SendFailed:
		return drop.SendFailed
	}
	return drop.None
}
