package tunnel

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"ipipd/internal/ipsec"
	"ipipd/internal/warning"
)

// What is shown and logged about the SAs of a tunnel with many remotes: bounded, however many remotes there are.

// RemoteIPsec are the SAs with one of many remotes, or why there are none.
type RemoteIPsec struct {
	Remote string `json:"remote-address"`
	// IPsec and SPI are as State.IPsec and IPsecSPI.
	IPsec string `json:"ipsec"`
	SPI   string `json:"ipsec-spi,omitzero"`
}

// remoteStatus is the ipsec.Status of one of many remotes.
type remoteStatus struct {
	remote netip.Addr
	ipsec.Status
}

// statuses returns the status of each session, by remote address: at most maxProtected. It is safe for concurrent use.
func (r *ipsecRemotes) statuses() []remoteStatus {
	var all []remoteStatus
	for g, route := range r.tunnel.many.routes.Load().all {
		if p := route.remote.ipsec.protected.Load(); p != nil {
			all = append(all, remoteStatus{address(g), p.status()})
		}
	}
	slices.SortFunc(all, func(a, b remoteStatus) int { return a.remote.Compare(b.remote) })
	return all
}

// count returns how many remotes have an SA.
func (r *ipsecRemotes) count() *int {
	n := 0
	for _, route := range r.tunnel.many.routes.Load().all {
		if p := route.remote.ipsec.protected.Load(); p != nil && p.established() {
			n++
		}
	}
	return &n
}

// spiText is State.IPsecSPI.
func spiText(s *ipsec.Status) string {
	if !s.Established {
		return ""
	}
	return fmt.Sprintf("0x%08x/0x%08x", s.InboundSPI, s.OutboundSPI)
}

// describeRemotes is State.IPsec and IPsecRemotes of a tunnel with many.
func describeRemotes(all []remoteStatus, now time.Time) (text string, each []RemoteIPsec) {
	n := 0
	var without []string
	for i := range all {
		s := &all[i]
		each = append(each, RemoteIPsec{s.remote.String(), s.Describe(now), spiText(&s.Status)})
		if s.Established {
			n++
		} else {
			without = append(without, s.remote.String()+" "+s.Describe(now))
		}
	}
	switch {
	case len(all) == 0:
		return "no SA: the first packet to a remote has one negotiated", nil
	case len(without) == 0:
		return fmt.Sprintf("SAs with %d remotes", n), each
	}
	return fmt.Sprintf("SAs with %d of %d remotes: %s", n, len(all), someOf(without)), each
}

// named is how many remotes a text names.
const named = 3

// someOf joins the first named of texts, and says how many more there are.
func someOf(texts []string) string {
	more := ""
	if len(texts) > named {
		texts, more = texts[:named], fmt.Sprintf(", and %d more", len(texts)-named)
	}
	return strings.Join(texts, ", ") + more
}

// warnRemotesIPsec raises and clears the warnings of warnIPsec that depend on the remote.
func (c *control) warnRemotesIPsec() {
	about := map[warning.Code][]string{}
	for _, s := range c.ipsecPolicy.remotes.statuses() {
		note := func(code warning.Code, detail string) {
			about[code] = append(about[code], strings.TrimSuffix(s.remote.String()+" "+detail, " "))
		}
		if !s.Established && s.Problem != "" {
			note(warning.IPsecNotEstablished, s.Problem)
		}
		if s.NoESP {
			note(warning.ESPFiltered, "")
		}
		if s.Weak != "" {
			note(warning.WeakAlgorithms, s.Weak)
		}
	}
	for _, code := range []warning.Code{warning.IPsecNotEstablished, warning.ESPFiltered, warning.WeakAlgorithms} {
		c.warnIf(len(about[code]) > 0, code, "%s", someOf(about[code]))
	}
}

// logEvent logs what has happened to the SAs with a remote. With many remotes SAs come and go: that is debug only.
func (r *ipsecRemotes) logEvent(remote netip.Addr, e ipsec.Event) {
	switch e.Kind {
	case ipsec.EventUp, ipsec.EventDown, ipsec.EventESPReceived:
		r.tunnel.log.Debug(e.String(), "remote-address", remote)
	default:
		r.warn(remote, e.String())
	}
}

// warn logs a warning about one remote: at level debug if there were maxLines in this minute.
func (r *ipsecRemotes) warn(remote netip.Addr, text string) {
	switch n := r.lines.next(time.Now()); {
	case n <= maxLines:
		r.tunnel.log.Warn(text, "remote-address", remote)
	case n == maxLines+1:
		r.tunnel.log.Warn("there are more remotes with such a problem: they are in print, and logged at level debug")
	default:
		r.tunnel.log.Debug(text, "remote-address", remote)
	}
}

// maxLines is how many lines a minute are logged about the SAs of many remotes.
const maxLines = 10

// lineLimiter counts the lines of a minute.
type lineLimiter struct {
	mu    sync.Mutex
	since time.Time
	n     int
}

// next counts one more line, and returns how many this minute has.
func (l *lineLimiter) next(now time.Time) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	if now.Sub(l.since) >= time.Minute {
		l.since, l.n = now, 0
	}
	l.n++
	return l.n
}
