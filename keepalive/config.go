package keepalive

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// Default is RouterOS's default: a probe every 10 s, 10 retries.
var Default = Config{Interval: 10 * time.Second, Retries: 10}

// Syntax describes what Parse accepts, for error messages and help.
const Syntax = "off, INTERVAL or INTERVAL,RETRIES with an interval of 1s..4294967295s as 10s, 1m30s, 10 or 00:00:10, and retries 1..4294967295"

// maxSeconds and maxRetries are RouterOS's limits: both numbers have 32 bits.
const (
	maxSeconds = math.MaxUint32
	maxRetries = math.MaxUint32
)

// Config is the probe interval and the hold time in intervals. The zero value is off.
type Config struct {
	// Interval between two probes, in whole seconds; 0 is off.
	Interval time.Duration
	// Retries is how many intervals may pass without a packet of the peer before the tunnel stops
	// running; at least 1 unless off. With 1 the round-trip time must not grow from one probe to
	// the next, so any jitter brings the tunnel down: use 2 or more.
	Retries int
}

// HoldTime is how long the tunnel stays running without a packet of the peer: Interval times
// Retries, capped at the largest Duration.
func (c Config) HoldTime() time.Duration {
	if c.Interval > 0 && c.Retries > int(math.MaxInt64/c.Interval) {
		return math.MaxInt64
	}
	return c.Interval * time.Duration(c.Retries)
}

// String returns RouterOS's notation, such as "10s,10" or "1m30s,5", or "off". Parse accepts it.
func (c Config) String() string {
	if c.Interval <= 0 {
		return "off"
	}
	return FormatTime(c.Interval) + "," + strconv.Itoa(c.Retries)
}

// FormatTime returns d in RouterOS's notation, such as "1d30m", truncated to seconds. ParseTime
// accepts it.
func FormatTime(d time.Duration) string {
	var s strings.Builder
	rest := int64(d / time.Second)
	for _, u := range units {
		if n := rest / u.seconds; n > 0 {
			fmt.Fprintf(&s, "%d%c", n, u.letter)
			rest -= n * u.seconds
		}
	}
	return s.String()
}

// ParseTime parses a RouterOS time of 1s..4294967295s: "10" (seconds), "1w2d3h4m5s", "00:00:10"
// or "1d00:00:10".
func ParseTime(s string) (d time.Duration, ok bool) {
	seconds, ok := parseSeconds(s)
	return time.Duration(seconds) * time.Second, ok
}

// Parse parses a keepalive as RouterOS takes it: "10s,10", "10,10", "00:00:10,10", "1m30s,5", the
// interval alone ("10s", with Default's retries), or "off". The error contains Syntax.
func Parse(s string) (Config, error) {
	if s == "off" {
		return Config{}, nil
	}
	interval, retries, both := strings.Cut(s, ",")
	seconds, ok := parseSeconds(interval)
	c := Config{Interval: time.Duration(seconds) * time.Second, Retries: Default.Retries}
	if both && ok {
		var n int64
		n, ok = parseNumber(retries, maxRetries)
		ok = ok && n >= 1
		c.Retries = int(n)
	}
	if !ok {
		return Config{}, fmt.Errorf("%q is not accepted: want %s", s, Syntax)
	}
	return c, nil
}

// units are the units of a RouterOS time, in the order in which they must appear.
var units = []struct {
	letter  byte
	seconds int64
}{
	{'w', 7 * 24 * 3600}, {'d', 24 * 3600}, {'h', 3600}, {'m', 60}, {'s', 1},
}

// parseSeconds is ParseTime in seconds.
func parseSeconds(s string) (total int64, ok bool) {
	if n, ok := parseNumber(s, maxSeconds); ok {
		return n, n > 0
	}
	for _, u := range units {
		i := strings.IndexByte(s, u.letter)
		if i < 0 {
			continue
		}
		n, ok := parseNumber(s[:i], maxSeconds)
		if !ok {
			return 0, false
		}
		total += n * u.seconds // at most 2^32 weeks for each unit: no overflow
		s = s[i+1:]
	}
	if s != "" {
		clock := strings.Split(s, ":")
		if len(clock) != 3 {
			return 0, false
		}
		for i, limit := range []int64{maxSeconds, 59, 59} {
			n, ok := parseNumber(clock[i], limit)
			if !ok {
				return 0, false
			}
			total += n * []int64{3600, 60, 1}[i]
		}
	}
	return total, total > 0 && total <= maxSeconds
}

// parseNumber parses 0..limit in decimal digits, without sign, space or underscore.
func parseNumber(s string, limit int64) (int64, bool) {
	n, err := strconv.ParseUint(s, 10, 32)
	return int64(n), err == nil && int64(n) <= limit
}

// Form is the packet format of a probe, which decides which peers answer it.
type Form uint8

const (
	// FormReflect is the format of RouterOS and Cisco: an inner header from the peer to us, which
	// the peer forwards back. A Linux peer drops it unless its tunnel has accept_local=1,
	// rp_filter 0 or 2, and ip_forward=1.
	FormReflect Form = iota
	// FormEmpty is an outer header without payload, as in EoIP. It keeps the peer's keepalive up,
	// and is never answered.
	FormEmpty
	// FormEcho is an ICMP echo request to an address behind the tunnel, which any host answers.
	FormEcho
)

// Forms are the names of the Forms, indexed by Form.
var Forms = []string{"reflect", "empty", "echo"}

// String returns the name that ParseForm accepts.
func (f Form) String() string {
	if int(f) < len(Forms) {
		return Forms[f]
	}
	return "Form(" + strconv.Itoa(int(f)) + ")"
}

// ParseForm parses the name of a Form. The error lists the names.
func ParseForm(s string) (Form, error) {
	for i, name := range Forms {
		if s == name {
			return Form(i), nil
		}
	}
	return 0, fmt.Errorf("%q is not accepted: want reflect, empty or echo", s)
}
