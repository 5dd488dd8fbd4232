package tunnel

import (
	"io"
	"strings"
	"testing"
	"time"

	"ipipd/internal/drop"
	"ipipd/internal/underlay"
	"ipipd/internal/warning"
	"ipipd/keepalive"
)

// probing is a control that sends a probe a second.
type probing struct {
	*control
	now time.Duration // after epoch
}

func newProbing(form keepalive.Form, retries int) *probing {
	p := &probing{control: warningControl(io.Discard), now: time.Second}
	p.epoch = time.Now()
	p.cfg.Keepalive, p.cfg.KeepaliveProbe = keepalive.Config{Interval: time.Second, Retries: retries}, form
	p.state.Store(uint32(keepalive.Up))
	return p
}

// intervals sends a probe for each letter of steps, which says what is received until the next one: a an answer, d data,
// p the peer's own probe, - nothing. It reports whether there is a warning after the last interval.
func (p *probing) intervals(steps string) bool {
	for _, step := range steps {
		p.noteAnswers()
		p.noteProbe(p.cfg.KeepaliveProbe, p.epoch.Add(p.now))
		p.noteProbeDue()
		at := p.epoch.Add(p.now + time.Second/2)
		switch step {
		case 'a':
			p.lastReceivedNs.Store(int64(at.Sub(p.epoch)))
			p.noteProbeAnswer(at)
		case 'p':
			p.noteReflect(outerB.As4(), outerB.As4())
			fallthrough
		case 'd':
			p.lastReceivedNs.Store(int64(at.Sub(p.epoch)))
		}
		p.now += time.Second
	}
	p.noteAnswers()
	p.warnUnanswered()
	return p.warned(warning.KeepaliveUnanswered)
}

// A peer that has answered regularly, and then is heard without answering, is warned of after as many probes as there are
// retries; not one that is silent for a time, nor one that rarely sends what looks like an answer.
func TestPeerAnswersNote(t *testing.T) {
	for _, x := range []struct {
		name    string
		form    keepalive.Form
		retries int
		steps   string
		want    bool
	}{
		{"data", keepalive.FormReflect, 4, "aaadddd", true},
		{"early", keepalive.FormReflect, 4, "aaaddd", false},
		{"own-probes", keepalive.FormReflect, 4, "aaapppp", true},
		{"own-probes-before", keepalive.FormReflect, 4, "papapaaapppp", true},
		{"echo", keepalive.FormEcho, 4, "aaapppp", true},
		{"empty", keepalive.FormEmpty, 4, "pppppppp", false},
		{"few-retries", keepalive.FormReflect, 1, "aaadd", false},
		{"few-retries-are-three", keepalive.FormReflect, 1, "aaaddd", true},
		{"many-retries", keepalive.FormReflect, 1000, "aaaddddddddd", false},
		{"many-retries-are-ten", keepalive.FormReflect, 1000, "aaadddddddddd", true},
		{"answers-between", keepalive.FormReflect, 3, "aaaddaddadd", false},
		{"silence-does-not-count", keepalive.FormReflect, 3, "aaa---d----d---", false},
		{"silence-does-not-clear", keepalive.FormReflect, 3, "aaa-d-d-d", true},
		{"restart-of-peer", keepalive.FormReflect, 3, "aaad--------p", false},
		{"never-answered", keepalive.FormReflect, 3, "ddd", true},
		{"never-answered-and-probes", keepalive.FormReflect, 3, "ppppppp", false},
		{"seldom", keepalive.FormReflect, 3, "addddddaddddddd", false},
	} {
		t.Run(x.name, func(t *testing.T) {
			if got := newProbing(x.form, x.retries).intervals(x.steps); got != x.want {
				t.Errorf("%s with %d retries: warned %v, want %v", x.steps, x.retries, got, x.want)
			}
		})
	}
}

// The warning says since when, and has a remedy. It ends with an answer, when the peer is heard no more, and when the
// keepalive is off. A probe that cannot be sent does not count as unanswered.
func TestControlWarnUnanswered(t *testing.T) {
	for form, remedy := range map[keepalive.Form]string{keepalive.FormReflect: "keepalive-probe=echo", keepalive.FormEcho: "answers pings"} {
		p := newProbing(form, 3)
		if !p.intervals("aaappp") {
			t.Fatalf("%v: there is no warning", form)
		}
		w := p.Tunnel.warns(warning.KeepaliveUnanswered)
		if since := p.epoch.Add(4 * time.Second).Local().Format(time.DateTime); !strings.Contains(w.Detail, since) || !strings.Contains(w.Remedy, remedy) || !strings.Contains(w.Remedy, "to "+outerB.String()) {
			t.Errorf("%v: %q, %q: want %s, %q and the remote", form, w.Detail, w.Remedy, since, remedy)
		}
		if p.intervals("ppp"); p.Tunnel.warns(warning.KeepaliveUnanswered) != w {
			t.Errorf("%v: it is another one as long as it lasts", form)
		}
		p.noteProbe(form, p.epoch.Add(p.now))
		p.noteProbeAnswer(p.epoch.Add(p.now))
		if p.warnUnanswered(); p.warned(warning.KeepaliveUnanswered) {
			t.Errorf("%v: an answer does not end it", form)
		}
		for _, state := range []keepalive.State{keepalive.Lost, keepalive.Off} {
			p = newProbing(form, 3)
			p.intervals("aaappp")
			p.state.Store(uint32(state))
			if p.warnUnanswered(); p.warned(warning.KeepaliveUnanswered) {
				t.Errorf("%v: it is warned of a peer that is %v", form, state)
			}
			p.noteAnswers()
			p.state.Store(uint32(keepalive.Up))
			if p.intervals("pp") || !p.intervals("p") {
				t.Errorf("%v: after %v it does not count anew", form, state)
			}
		}
		p = newProbing(form, 3)
		p.intervals("aaapp")
		p.route.Store(&route{path: underlay.Path{Remote: outerB.As4()}, txDrop: drop.NoPath})
		if p.intervals("ppppp") {
			t.Errorf("%v: what has no path is missed", form)
		}
		p.route.Store(&route{path: underlay.Path{Remote: outerB.As4()}})
		p.noPath = errNotKernel
		if p.intervals("ppppp") {
			t.Errorf("%v: what has no way is missed", form)
		}
	}
}
