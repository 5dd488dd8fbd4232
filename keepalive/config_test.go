package keepalive

import (
	"math"
	"strings"
	"testing"
	"time"
)

func TestParse(t *testing.T) {
	for _, c := range []struct {
		in     string
		want   Config
		String string
	}{
		{"10s,10", Config{10 * time.Second, 10}, "10s,10"},
		{"10,10", Config{10 * time.Second, 10}, "10s,10"},
		{"00:00:10,10", Config{10 * time.Second, 10}, "10s,10"},
		{"10s", Config{10 * time.Second, 10}, "10s,10"},
		{"7", Config{7 * time.Second, 10}, "7s,10"},
		{"1s,1", Config{time.Second, 1}, "1s,1"},
		{"1m30s,5", Config{90 * time.Second, 5}, "1m30s,5"},
		{"90,5", Config{90 * time.Second, 5}, "1m30s,5"},
		{"1d02:03:04,3", Config{26*time.Hour + 3*time.Minute + 4*time.Second, 3}, "1d2h3m4s,3"},
		{"1w2d3h4m5s,3", Config{(9*24+3)*time.Hour + 4*time.Minute + 5*time.Second, 3}, "1w2d3h4m5s,3"},
		{"4294967295,4294967295", Config{math.MaxUint32 * time.Second, math.MaxUint32}, "7101w3d6h28m15s,4294967295"},
		{"4294967295s", Config{math.MaxUint32 * time.Second, 10}, "7101w3d6h28m15s,10"},
		{"off", Config{}, "off"},
	} {
		got, err := Parse(c.in)
		if err != nil || got != c.want || got.String() != c.String {
			t.Errorf("Parse(%q) = %v, %v: want %v, written %q", c.in, got, err, c.want, c.String)
		}
	}
}

func TestParse_refused(t *testing.T) {
	for _, in := range []string{
		"", ",", "10s,", ",10", "0", "0s,10", "10s,0", "-1s", "+1s", "10s,-1", "10s,10,10", " 10s", "10s ", "10s, 10",
		"1_0", "1.5s", "500ms", "10x", "s", "s10", "10s5m", "00:10", "00:60:00", "0:0:60", "0:0:0", "1h00:00:10:00", "on", "no", "OFF",
		"4294967296", "4294967296s", "7102w", "4294967295w4294967295d", "10s,4294967296", "99999999999999999999", "10s,99999999999999999999",
	} {
		got, err := Parse(in)
		if err == nil {
			t.Errorf("Parse(%q) = %v", in, got)
		} else if s := err.Error(); strings.Contains(s, "\n") || !strings.Contains(s, Syntax) {
			t.Errorf("Parse(%q): %v", in, s)
		}
	}
}

func TestConfigHoldTime(t *testing.T) {
	for _, c := range []struct {
		Config
		want time.Duration
	}{
		{Config{10 * time.Second, 10}, 100 * time.Second},
		{Config{math.MaxUint32 * time.Second, math.MaxUint32}, math.MaxInt64},
		{Config{math.MaxUint32 * time.Second, 3}, math.MaxInt64},
		{Config{}, 0},
	} {
		if got := c.HoldTime(); got != c.want {
			t.Errorf("%v: %v, want %v", c.Config, got, c.want)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"10s,10", "10,10", "00:00:10,10", "1w2d3h4m5s,4294967295", "off", "1d00:00:01"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		c, err := Parse(s)
		if err != nil {
			return
		}
		if c != (Config{}) && (c.Interval < time.Second || c.Interval > math.MaxUint32*time.Second || c.Retries < 1 || c.Retries > math.MaxUint32) {
			t.Fatalf("Parse(%q) = %+v", s, c)
		}
		if again, err := Parse(c.String()); err != nil || again != c {
			t.Fatalf("%q was read as %v and then as %v: %v", s, c, again, err)
		}
	})
}

func TestParseForm(t *testing.T) {
	for _, f := range []Form{FormReflect, FormEmpty, FormEcho} {
		if got, err := ParseForm(f.String()); err != nil || got != f {
			t.Errorf("%v: %v, %v", f, got, err)
		}
	}
	if f, err := ParseForm("gre"); err == nil {
		t.Errorf("gre is %v", f)
	}
	if Form(0) != FormReflect {
		t.Error("the default is not reflect")
	}
}
