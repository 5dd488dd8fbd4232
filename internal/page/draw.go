package page

import (
	"math"
	"strconv"
)

// Heights and widths of the drawings, in their own units: a browser stretches them.
const (
	sparkHeight, sparkStep = 24, 2 // of 60 values: page.html has viewBox 0 0 120 24
	chartHeight, chartStep = 120, 5
)

// steps returns the SVG path of values in time as a line of steps, each step units wide; top is the value of the full
// height. It has a command only where the value changes, so that an idle tunnel's path is short.
func steps(values []float64, top float64, height, step int) string {
	if len(values) == 0 {
		return ""
	}
	b := make([]byte, 0, 16+8*len(values))
	y := level(values[0], top, height)
	b = append(b, "M0 "...)
	b = strconv.AppendInt(b, int64(y), 10)
	for i, v := range values[1:] {
		if next := level(v, top, height); next != y {
			b = append(b, 'H')
			b = strconv.AppendInt(b, int64((i+1)*step), 10)
			b = append(b, 'V')
			b = strconv.AppendInt(b, int64(next), 10)
			y = next
		}
	}
	b = append(b, 'H')
	b = strconv.AppendInt(b, int64(len(values)*step), 10)
	return string(b)
}

// area returns the path of steps, closed along the bottom; "" if all values are zero.
func area(values []float64, top float64, height, step int) string {
	if peak(values) == 0 {
		return ""
	}
	bottom := strconv.Itoa(height)
	return steps(values, top, height, step) + "V" + bottom + "H0Z"
}

// level returns the y coordinate of a value, which counts from the top. A value above zero is at least one unit high.
func level(v, top float64, height int) int {
	if !(v > 0) || !(top > 0) {
		return height
	}
	return height - max(1, int(math.Round(min(1, v/top)*float64(height))))
}

func peak(values []float64) (top float64) {
	for _, v := range values {
		top = max(top, v)
	}
	return top
}

// roundUp returns the least of 1, 2, 5, 10, 20 ... that is not less than v: the top of a chart, which
// should not change with each value. It returns 0 for 0.
func roundUp(v float64) float64 {
	if !(v > 0) || math.IsInf(v, 0) {
		return 0
	}
	unit := math.Pow(10, math.Floor(math.Log10(v)))
	for _, n := range []float64{1, 2, 5} {
		if v <= n*unit*(1+1e-9) {
			return n * unit
		}
	}
	return 10 * unit
}

// metric formats a value with three digits and the prefix of its unit: "12.3 M".
func metric(v float64) string {
	if !(v > 0) {
		return "0 "
	}
	prefixes := []string{" ", " k", " M", " G", " T", " P", " E"}
	i := 0
	for v >= 999.5 && i < len(prefixes)-1 {
		v /= 1000
		i++
	}
	digits := 0
	switch {
	case v < 0.00995:
		return "< 0.01 "
	case i == 0 && v == math.Trunc(v), v >= 99.95:
	case v >= 9.995:
		digits = 1
	default:
		digits = 2
	}
	return strconv.FormatFloat(v, 'f', digits, 64) + prefixes[i]
}
