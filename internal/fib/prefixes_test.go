package fib

import (
	"net/netip"
	"testing"
)

// Prefixes counts those of a gateway; those that lead nowhere are no gateway's, and not Routed.
func TestTable_Prefixes(t *testing.T) {
	a, b := [4]byte{198, 51, 100, 7}, [4]byte{198, 51, 100, 8}
	e := new(Table).Edit()
	for prefix, r := range map[string]Route{
		"10.1.0.0/16": {Hops: []Hop{{Gateway: a}}},
		"10.1.2.0/24": {Hops: []Hop{{Gateway: a}, {Gateway: b}, {Gateway: a}}},
		"10.2.0.0/16": {Hops: []Hop{{}}},
		"10.0.0.0/8":  {Unreachable: true},
		"10.9.0.0/16": {Hops: []Hop{{Unusable: true}}},
		"0.0.0.0/0":   {Hops: []Hop{{Gateway: b}}},
	} {
		e.Set(netip.MustParsePrefix(prefix), []Route{r})
	}
	table, _, _ := e.Commit()
	if got := [...]int{table.Prefixes(a), table.Prefixes(b), table.Prefixes([4]byte{192, 0, 2, 1}), table.Routed(), table.Len()}; got != [...]int{2, 2, 0, 4, 6} {
		t.Error(got)
	}
}
