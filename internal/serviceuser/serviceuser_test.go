package serviceuser

import "testing"

// number returns -1, which no file has as its owner, for root's 0 and for what is no ID.
func TestNumber(t *testing.T) {
	for text, want := range map[string]int{
		"1": 1, "998": 998, "4294967294": 4294967294,
		"0": -1, "": -1, "-1": -1, "-2": -1, "x": -1, "4294967295": -1, "4294967296": -1, "18446744073709551615": -1,
	} {
		if n := number(text); n != want {
			t.Errorf("%q is %d, want %d", text, n, want)
		}
	}
}
