package tunnel

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"ipipd/internal/drop"
	"ipipd/internal/ipsec"
	"ipipd/internal/netstate"
	"ipipd/internal/warning"
	"ipipd/keepalive"
)

// Warning is an active warning of a tunnel.
type Warning struct {
	// Code is the name of a warning.Code.
	Code     string           `json:"code"`
	Severity warning.Severity `json:"severity"`
	// Text says what is wrong and why it matters, Detail what is known of it now.
	Text   string    `json:"text"`
	Detail string    `json:"detail,omitzero"`
	Remedy string    `json:"remedy"`
	Since  time.Time `json:"since"`
}

// warningLimit is the least time between two log lines of a warning that is warning.Limited.
const warningLimit = time.Minute

// activeWarnings returns the active warnings in the order in which they have begun. They are immutable.
func (t *Tunnel) activeWarnings() []Warning {
	if active := t.warnings.Load(); active != nil {
		return *active
	}
	return nil
}

// warning returns the index of a warning in activeWarnings; -1 if it is not active.
func (t *Tunnel) warning(code warning.Code) int {
	return slices.IndexFunc(t.activeWarnings(), func(w Warning) bool { return w.Code == code.String() })
}

// warned reports whether a warning is active.
func (t *Tunnel) warned(code warning.Code) bool { return t.warning(code) >= 0 }

// raise makes a warning active; remedy takes the place of the code's unless it is "". If the warning is active
// already, its detail and remedy are updated, and nothing is logged.
func (c *control) raise(code warning.Code, detail, remedy string) {
	active, at, text := c.activeWarnings(), c.warning(code), code.Text()
	if at >= 0 && active[at].Detail == detail {
		return
	}
	remote := addressText(c.route.Load().path.Remote)
	w := Warning{Code: text.Name, Severity: text.Severity, Text: text.Sentence(), Detail: detail, Since: time.Now()}
	w.Remedy = cmp.Or(remedy, strings.NewReplacer("NAME", cmp.Or(c.ifname.get(), "NAME"), "REMOTE", cmp.Or(remote, "REMOTE")).Replace(text.Remedy))
	next := slices.Clone(active)
	if at >= 0 {
		w.Since = active[at].Since
		next[at] = w
	} else {
		next = append(next, w)
		c.logWarning(code, &w)
	}
	c.warnings.Store(&next)
}

// logWarning logs the beginning of a warning.
func (c *control) logWarning(code warning.Code, w *Warning) {
	switch code.Text().By {
	case warning.Elsewhere:
		return
	case warning.Limited:
		if w.Since.Sub(c.warnedAt[code]) < warningLimit {
			return
		}
		c.warnedAt[code] = w.Since
	}
	level := slog.LevelWarn
	if w.Severity == warning.Note {
		level = slog.LevelInfo
	}
	attrs := []any{"warning", w.Code}
	if w.Detail != "" {
		attrs = append(attrs, "detail", w.Detail)
	}
	c.log.Log(c.ctx, level, w.Text, append(attrs, "remedy", w.Remedy)...)
}

// clear ends a warning, if it is active.
func (c *control) clear(code warning.Code) {
	at := c.warning(code)
	if at < 0 {
		return
	}
	if text := code.Text(); text.Cleared != "" {
		c.log.Info(text.Cleared, "warning", text.Name)
	}
	active := slices.Delete(slices.Clone(c.activeWarnings()), at, at+1)
	c.warnings.Store(&active)
}

// warnIf raises a warning, or clears it.
func (c *control) warnIf(active bool, code warning.Code, format string, args ...any) {
	if active {
		c.raise(code, fmt.Sprintf(format, args...), "")
	} else {
		c.clear(code)
	}
}

// warnErr is warnIf with an error.
func (c *control) warnErr(code warning.Code, err error) { c.warnIf(err != nil, code, "%v", err) }

// warnOfState brings the warnings that follow from the tunnel's state in line with it.
func (c *control) warnOfState(now time.Time) {
	route := c.route.Load()
	local, remote := address(route.path.Local), address(route.path.Remote)
	c.warnIf(c.iface.Load().Moved, warning.InterfaceMoved, "")
	c.warnLeftAlone()
	c.warnIf(c.failures > 0 && c.remote.IsValid() && !c.held, warning.NameNotRefreshed, "%v", c.lookupErr)
	c.warnOtherAddress()
	c.warnIf(route.txDrop == drop.NoLocalAddress && !route.receiveOnly, warning.NoLocalAddress, "%v", local)
	c.warnIf(c.mtuDecreases.n > mtuSteps && c.wantedMTU() < c.appliedMTU, warning.MTUFeedback, "actual-mtu %d, by %s", c.appliedMTU, c.narrowestText())
	c.warnIf(c.pathMTU.Get() != 0, warning.PathMTULowered, "path-mtu %d, says %v", c.pathMTU.Effective(c.underlay.MTU), address(c.pathMTUFrom))
	c.warnPeer()
	c.warnEcho(!route.suspended && c.noPath == nil && !c.probeAnswered.Load() && ReflectsBehindNAT(c.cfg, local, remote), warning.KeepaliveBehindNAT, "%v to %v", local, remote)
	c.warnFragments(route, now)
	c.warnSeen(&c.looped, warning.RouteLoop, c.loopDetail(), loopHolds, now)
	c.warnPeerMTU(now)
	c.warnIPsec()
	c.warnRealServer(now)
}

// warnPeer warns of a peer that is not heard, or does not answer.
func (c *control) warnPeer() {
	silence := c.cfg.keepalive().HoldTime()
	switch state := keepalive.State(c.state.Load()); {
	case c.warned(warning.PeerNotHeard) && !state.Running():
	case state == keepalive.NeverHeard:
		c.raise(warning.PeerNotHeard, fmt.Sprintf("never within %v", silence), c.remedy())
	case state == keepalive.Lost:
		c.raise(warning.PeerNotHeard, fmt.Sprintf("silent for %v", silence), c.remedy())
	default:
		c.clear(warning.PeerNotHeard)
	}
	c.warnUnanswered()
}

// warnPeerMTU warns of packets that were longer than the MTU, unless that has grown since.
func (c *control) warnPeerMTU(now time.Time) {
	s, mtu := &c.oversize, c.mtu.Load()
	if n := s.n.Load(); n != 0 && n <= mtu {
		s.n.Store(0)
	}
	if s.last != 0 && s.last <= mtu {
		c.forget(s, warning.PeerMTU)
	}
	c.warnSeen(s, warning.PeerMTU, "%d bytes", peerHolds, now)
}

func (c *control) warnIPsec() {
	p := c.ipsecPolicy
	if p == nil {
		return
	}
	c.warnIf(len(p.secret()) < ipsec.WeakSecret, warning.WeakSecret, "")
	if p.remotes != nil {
		c.warnRemotesIPsec()
		return
	}
	var s ipsec.Status
	session := p.session.Load()
	if session != nil {
		s = session.Status()
	}
	lost := session != nil && !s.Established && (s.Problem != "" || p.sas.Load() > 0) // else it is being negotiated
	c.warnIf(lost, warning.IPsecNotEstablished, "%s", s.Problem)
	c.warnIf(s.NoESP, warning.ESPFiltered, "")
	c.warnIf(s.Weak != "", warning.WeakAlgorithms, "%s", s.Weak)
}

// pathWarnings are the warnings of which a pathError raises one: NoPath if none of the others fits.
var pathWarnings = []warning.Code{warning.NameNotResolved, warning.NoRoute, warning.NoPath, warning.SamePair}

// warnPath warns of a pathError, nil for none, unless it means a DNS name before its first look-up.
func (c *control) warnPath(err error) {
	var unresolved *unresolvedError
	var noRoute *netstate.NoRouteError
	var noDevice *netstate.NoDeviceError
	code, remedy := warning.NoPath, ""
	switch {
	case errors.As(err, &unresolved):
		code = warning.NameNotResolved
		if unresolved.err == nil {
			err = nil
		}
	case errors.As(err, &noRoute):
		code, remedy = warning.NoRoute, noRoute.Fault().Do
	case errors.As(err, &noDevice):
		code, remedy = warning.NoRoute, noDevice.Fault().Do
	case c.pairTaken.Load():
		code = warning.SamePair
	}
	for _, other := range pathWarnings {
		if err == nil || other != code {
			c.clear(other)
		}
	}
	if err != nil {
		c.raise(code, waitingText(err), remedy)
	}
}

// How long a warning that packets cause stays active after the last of them: for a loop, where the next one comes
// soon, and for what only some packets of the peer show.
const (
	loopHolds = time.Minute
	peerHolds = 10 * time.Minute
)

// sighting is something that a packet has shown and control makes a warning of. It costs the data path one load per packet.
type sighting struct {
	n atomic.Int32 // what was seen since control has looked, such as a length; 0 is nothing
	// Used by control only.
	last  int32     // n, when the warning was last raised
	until time.Time // when the warning is to be cleared; zero if it is not active
}

// note stores n, which must not be 0, unless there is one that control has not seen: then it returns false. After true
// the caller wakes control.
func (s *sighting) note(n int) bool { return s.n.Load() == 0 && s.n.CompareAndSwap(0, int32(n)) }

// warnSeen raises the warning of a sighting, and clears it when nothing was seen for holds. format is the detail, in
// which a verb, if there is one, stands for sighting.n.
func (c *control) warnSeen(s *sighting, code warning.Code, format string, holds time.Duration, now time.Time) {
	switch n := s.n.Load(); {
	case now.Before(s.until):
	case n != 0:
		s.n.Store(0)
		if s.last, s.until = n, now.Add(holds); strings.Contains(format, "%") {
			format = fmt.Sprintf(format, n)
		}
		c.raise(code, format, "")
	case !s.until.IsZero():
		c.forget(s, code)
	}
}

// forget clears the warning of a sighting, and what was seen: it does not hold any more.
func (c *control) forget(s *sighting, code warning.Code) {
	s.n.Store(0)
	s.last, s.until = 0, time.Time{}
	c.clear(code)
}
