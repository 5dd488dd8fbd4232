package page

import (
	"math"
	"testing"
)

func TestSteps(t *testing.T) {
	for _, c := range []struct {
		values []float64
		top    float64
		want   string
	}{
		{nil, 1, ""},
		{[]float64{0, 0, 0}, 0, "M0 24H6"},
		{[]float64{0, 0, 12, 12, 24, 0}, 24, "M0 24H4V12H8V0H10V24H12"},
		{[]float64{24, 0.001}, 24, "M0 0H2V23H4"}, // what is not zero is seen
		{[]float64{100, math.NaN(), -1, math.Inf(1)}, 24, "M0 0H2V24H6V0H8"},
	} {
		if got := steps(c.values, c.top, sparkHeight, sparkStep); got != c.want {
			t.Errorf("steps(%v) = %s, want %s", c.values, got, c.want)
		}
	}
}

func TestArea(t *testing.T) {
	if got := area([]float64{0, 0}, 0, sparkHeight, sparkStep); got != "" {
		t.Errorf("of zeros: %s", got)
	}
	if got := area([]float64{0, 12}, 24, sparkHeight, sparkStep); got != "M0 24H2V12H4V24H0Z" {
		t.Error(got)
	}
}

func TestRoundUp(t *testing.T) {
	for v, want := range map[float64]float64{0: 0, -1: 0, math.NaN(): 0, math.Inf(1): 0, 0.3: 0.5, 1: 1, 1.01: 2, 2: 2, 3: 5, 5: 5, 5.1: 10, 10: 10, 999: 1000, 1e9: 1e9, 12345678: 2e7} {
		if got := roundUp(v); math.Abs(got-want) > 1e-9*want {
			t.Errorf("roundUp(%v) = %v, want %v", v, got, want)
		}
	}
}

func TestMetric(t *testing.T) {
	for v, want := range map[float64]string{
		0: "0 ", -1: "0 ", math.NaN(): "0 ", 0.001: "< 0.01 ", 0.5: "0.50 ", 1: "1 ", 7: "7 ", 9.99: "9.99 ", 9.999: "10.0 ", 12.34: "12.3 ", 99.96: "100 ", 999: "999 ",
		999.6: "1.00 k", 1000: "1.00 k", 12345: "12.3 k", 999499: "999 k", 999500: "1.00 M", 1.5e9: "1.50 G", 2e21: "2000 E",
	} {
		if got := metric(v); got != want {
			t.Errorf("metric(%v) = %q, want %q", v, got, want)
		}
	}
}
