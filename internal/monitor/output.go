package monitor

import (
	"encoding/json"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"ipipd/internal/drop"
	"ipipd/internal/tunnel"
)

// line is the value that Model.JSON marshals. docs/monitor.md has its members.
type line struct {
	Time      time.Time    `json:"time"`
	Tunnels   []tunnelLine `json:"tunnels"`
	StrayRate float64      `json:"process-drops-per-second"`
	StrayTop  string       `json:"top-process-drop,omitzero"`
	UndoAt    time.Time    `json:"undo-at,omitzero"`
	Problems  []string     `json:"problems,omitzero"`
}

// tunnelLine is a tunnel of a line. Its keys are the names of print, and of RouterOS's monitor-traffic.
type tunnelLine struct {
	Name           string           `json:"name"`
	Interface      string           `json:"interface"`
	Comment        string           `json:"comment,omitzero"`
	State          State            `json:"state"`
	WaitingFor     string           `json:"waiting-for,omitzero"`
	Warnings       []tunnel.Warning `json:"warnings,omitzero"`
	Local          string           `json:"current-local-address,omitzero"`
	Remote         string           `json:"current-remote-address,omitzero"`
	Remotes        *tunnel.Remotes  `json:"remotes,omitzero"`
	MTU            int              `json:"actual-mtu,omitzero"`
	PathMTU        int              `json:"path-mtu,omitzero"`
	FastPath       bool             `json:"fast-path-active"`
	IPsec          *bool            `json:"ipsec-established,omitzero"`
	KeepaliveState string           `json:"keepalive-state,omitzero"`
	LastHeard      time.Time        `json:"last-heard,omitzero"`
	RoundTrip      float64          `json:"round-trip-seconds,omitzero"`
	RxPacket       uint64           `json:"rx-packet"`
	RxByte         uint64           `json:"rx-byte"`
	TxPacket       uint64           `json:"tx-packet"`
	TxByte         uint64           `json:"tx-byte"`
	Drops          drop.Counts      `json:"drops"`
	*rateLine
}

// rateLine are the rates of a tunnelLine, if there are any.
type rateLine struct {
	RxBits       float64 `json:"rx-bits-per-second"`
	TxBits       float64 `json:"tx-bits-per-second"`
	RxPackets    float64 `json:"rx-packets-per-second"`
	TxPackets    float64 `json:"tx-packets-per-second"`
	Drops        float64 `json:"drops-per-second"`
	RxBits10s    float64 `json:"rx-bits-per-second-10s"`
	TxBits10s    float64 `json:"tx-bits-per-second-10s"`
	RxPackets10s float64 `json:"rx-packets-per-second-10s"`
	TxPackets10s float64 `json:"tx-packets-per-second-10s"`
	Drops10s     float64 `json:"drops-per-second-10s"`
	TopDrop      string  `json:"top-drop-10s,omitzero"`
}

// JSON returns what is known of the tunnels as a line of JSON, without the newline.
func (m *Model) JSON(now time.Time) ([]byte, error) {
	l := line{
		Time: now, Tunnels: make([]tunnelLine, 0, len(m.Tunnels)),
		StrayRate: rounded(m.StrayRate), UndoAt: m.UndoAt, Problems: m.Problems,
	}
	if m.StrayTop != drop.None {
		l.StrayTop = m.StrayTop.String()
	}
	for _, t := range m.Tunnels {
		o := tunnelLine{
			Name: t.Name, Interface: t.Interface, Comment: t.Comment, State: t.State, WaitingFor: t.WaitingFor,
			Local: t.LocalAddress, Remote: t.RemoteAddress, Remotes: t.Remotes, MTU: t.MTU, PathMTU: t.PathMTU, FastPath: t.FastPath,
			KeepaliveState: t.KeepaliveState, LastHeard: t.LastHeard, RoundTrip: t.RoundTrip.Seconds(),
			RxPacket: t.RxPackets, RxByte: t.RxBytes, TxPacket: t.TxPackets, TxByte: t.TxBytes, Drops: t.Drops,
		}
		if t.Fresh {
			o.Warnings = t.Warnings
		}
		if t.Encrypted {
			o.IPsec = &t.Established
		}
		if t.hasRates {
			o.rateLine = &rateLine{
				RxBits: math.Round(8 * t.rate1s.RxBytes), TxBits: math.Round(8 * t.rate1s.TxBytes),
				RxPackets: rounded(t.rate1s.RxPackets), TxPackets: rounded(t.rate1s.TxPackets), Drops: rounded(t.rate1s.Drops),
				RxBits10s: math.Round(8 * t.rate10s.RxBytes), TxBits10s: math.Round(8 * t.rate10s.TxBytes),
				RxPackets10s: rounded(t.rate10s.RxPackets), TxPackets10s: rounded(t.rate10s.TxPackets), Drops10s: rounded(t.rate10s.Drops),
			}
			if t.top != drop.None {
				o.TopDrop = t.top.String()
			}
		}
		l.Tunnels = append(l.Tunnels, o)
	}
	return json.Marshal(l)
}

// Text returns what is known of the tunnels, a line for each with its newline: key=value, as the log has
// it. Without tunnels it is a line that says so: only a write tells that the reader is gone.
func (m *Model) Text(now time.Time) string {
	if len(m.Tunnels) == 0 {
		return "time=" + now.Format(time.RFC3339) + " tunnels=0\n"
	}
	var b strings.Builder
	for _, t := range m.Tunnels {
		fmt.Fprintf(&b, "time=%s name=%s state=%s", now.Format(time.RFC3339), quoted(t.Name), t.State)
		if t.State == StateWaiting {
			fmt.Fprintf(&b, " waiting-for=%s", quoted(t.WaitingFor))
		}
		if t.Fresh && len(t.Warnings) > 0 {
			var codes []string
			for i := range t.Warnings {
				codes = append(codes, t.Warnings[i].Code)
			}
			fmt.Fprintf(&b, " warnings=%s", quoted(strings.Join(codes, ",")))
		}
		if t.hasRates {
			fmt.Fprintf(&b, " rx=%sbit/s rx-10s=%sbit/s tx=%sbit/s tx-10s=%sbit/s rx-packets=%s/s tx-packets=%s/s drops=%s/s",
				si(8*t.rate1s.RxBytes), si(8*t.rate10s.RxBytes), si(8*t.rate1s.TxBytes), si(8*t.rate10s.TxBytes),
				few(t.rate1s.RxPackets), few(t.rate1s.TxPackets), few(t.rate10s.Drops))
			if t.top != drop.None {
				b.WriteString(" top-drop=" + t.top.String())
			}
		}
		if d, ok := t.heard(now); ok {
			fmt.Fprintf(&b, " heard=%s", Age(d))
		}
		if t.Fresh && t.RoundTrip > 0 {
			fmt.Fprintf(&b, " round-trip=%s", short(t.RoundTrip))
		}
		if t.Fresh && t.PathMTU > 0 {
			fmt.Fprintf(&b, " path-mtu=%d", t.PathMTU)
		}
		if t.Fresh && t.Started {
			fmt.Fprintf(&b, " fast-path=%s", yes(t.FastPath))
		}
		if t.Fresh && t.Encrypted {
			fmt.Fprintf(&b, " ipsec=%s", yes(t.Established))
		}
		if t.Comment != "" {
			fmt.Fprintf(&b, " comment=%s", quoted(t.Comment))
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// quoted returns a value of Text: in quotes, and with escapes, unless it is a plain word.
func quoted(s string) string {
	if q := strconv.QuoteToGraphic(s); len(q) != len(s)+2 || s == "" || strings.ContainsAny(s, " =") {
		return q
	}
	return s
}
