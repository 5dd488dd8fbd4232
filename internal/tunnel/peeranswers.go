package tunnel

import (
	"fmt"
	"time"

	"ipipd/internal/drop"
	"ipipd/internal/warning"
	"ipipd/keepalive"
)

// A peer that is heard keeps the tunnel running, as with RouterOS, whether it answers probes or not. So a loss in the
// direction to it changes nothing of the keepalive, and shows only in that answers do not come: control looks for the
// answer to a probe when it sends the next one, which takes no timer.

const (
	// fewProbes in a row are significant: a single one is lost now and then, or not answered by a peer that restarts.
	fewProbes = 3
	// manyProbes unanswered in a row are significant, however many retries the keepalive has.
	manyProbes = 10
)

// peerAnswers are what control knows of the answers to the keepalive's probes.
type peerAnswers struct {
	due     bool // the last probe was sent, in a form that is answered
	inARow  int  // answered probes
	regular bool // fewProbes in a row were answered. The peer's own empty probes look alike, but are rare, or never end
	// unanswered counts the probes in a row without an answer though the peer was heard then; since is when the first of
	// them was sent, nanoseconds after Tunnel.epoch. A probe to a peer that is not heard, as it restarts, does not count.
	unanswered int
	since      int64
}

// note takes in whether the last probe was answered, when the next one is due: sent is when it was sent, 0 if it was
// answered, and heard when the peer was last heard; both in nanoseconds after Tunnel.epoch.
func (a *peerAnswers) note(sent, heard int64) {
	switch {
	case !a.due:
	case sent == 0:
		a.inARow, a.unanswered = a.inARow+1, 0
		a.regular = a.regular || a.inARow >= fewProbes
	case heard > sent:
		if a.unanswered == 0 {
			a.since = sent
		}
		a.unanswered++
		fallthrough
	default:
		a.inARow = 0
	}
}

// resetCounts forgets the counts, but not regular, which is a property of the peer.
func (a *peerAnswers) resetCounts() { *a = peerAnswers{regular: a.regular} }

// noteAnswers counts the last probe as answered or not, before the next one is sent.
func (c *control) noteAnswers() {
	if keepalive.State(c.state.Load()) != keepalive.Up {
		c.peerAnswers.resetCounts()
	}
	c.peerAnswers.note(c.probes.sentAt.Load(), c.lastReceivedNs.Load())
}

// noteProbeDue notes whether an answer is due to the probe that is about to be sent: not if it cannot be sent.
func (c *control) noteProbeDue() {
	if c.peerAnswers.due = c.cfg.KeepaliveProbe != keepalive.FormEmpty && c.route.Load().txDrop == drop.None && c.noPath == nil; !c.peerAnswers.due {
		c.peerAnswers.resetCounts()
	}
}

// unanswered reports whether the peer is heard, and does not answer as many probes as the keepalive has retries.
func (c *control) unanswered() bool {
	return keepalive.State(c.state.Load()) == keepalive.Up && c.probes.sentAt.Load() != 0 && // else the answer has come since
		c.peerAnswers.unanswered >= min(max(fewProbes, c.cfg.keepalive().Retries), manyProbes)
}

// warnUnanswered warns of a peer that is heard and answers no probe: of one that has never done so unless its own
// probes, which are enough, keep the tunnel running, and of one that has, since what is sent to it may be lost.
func (c *control) warnUnanswered() {
	unanswered, stopped := c.unanswered(), c.peerAnswers.regular
	never := unanswered && !stopped && !c.probeAnswered.Load()
	c.warnPeerBehindNAT(never)
	echo := c.cfg.KeepaliveProbe == keepalive.FormEcho
	switch {
	case unanswered && stopped:
		since := c.epoch.Add(time.Duration(c.peerAnswers.since)).Local().Format(time.DateTime)
		c.raise(warning.KeepaliveUnanswered, fmt.Sprintf("it has answered none since %s: what is sent to it seems to be lost, or filtered, on the way", since), c.lossRemedy())
	case never && echo && !c.peerProbes.Load():
		c.raise(warning.KeepaliveUnanswered, "", fmt.Sprintf("see whether %v answers pings through the tunnel, or ipipd set %s keepalive=off", c.cfg.KeepaliveTarget, c.ifname.get()))
	default:
		c.warnEcho(never && !c.peerProbes.Load(), warning.KeepaliveUnanswered, "")
	}
}

// lossRemedy is the advice to the operator when what is sent to the peer does not arrive.
func (c *control) lossRemedy() string {
	what, filter := "protocol 4", "ip proto 4"
	if c.ipsecPolicy != nil {
		what, filter = "ESP", "ip proto 50 or udp port 4500"
	}
	path := &c.route.Load().path
	remedy := fmt.Sprintf("tcpdump -ni any '%s' at both ends, and let %s from %v to %v in where it is lost", filter, what, address(path.Local), address(path.Remote))
	if c.cfg.KeepaliveProbe == keepalive.FormEcho {
		return remedy + fmt.Sprintf("; see whether %v answers pings at all", c.cfg.KeepaliveTarget)
	}
	return remedy + "; if another system is there by now: " + c.cfg.EchoRemedy(c.ifname.get())
}
