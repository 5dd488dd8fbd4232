package tunnel

import (
	"testing"
	"time"

	"ipipd/fastpath"
)

func TestALoadIsToldByWhatCame(t *testing.T) {
	const between = 100 * time.Millisecond
	then := time.Now()
	before := fastpath.Stats{RxPackets: 5000, RxBytes: 5000 * 1480, Single: 70, Merged: then}
	after := func(packets, size, single uint64, merged time.Duration) fastpath.Stats {
		return fastpath.Stats{RxPackets: before.RxPackets + packets, RxBytes: before.RxBytes + packets*size,
			Single: before.Single + single, Merged: then.Add(merged)}
	}
	for _, tt := range []struct {
		name    string
		now     fastpath.Stats
		between time.Duration
		want    load
	}{
		{"segments", after(9000, 1480, 9000, 0), between, single},
		{"segments and some acknowledgements", after(9000, 1400, 8000, 0), between, single},
		{"small datagrams", after(9000, 92, 0, 0), between, other},
		{"segments in a longer time", after(9000, 1480, 9000, 0), time.Second, light},
		{"superpackets", after(9000, 1480, 100, 1), between, superpackets},
		{"superpackets, and as many segments", after(9000, 1480, 5000, 1), between, superpackets},
		{"superpackets, and many small datagrams", after(9000, 100, 0, 1), between, other},
		{"few superpackets", after(90, 1480, 0, 1), between, light},
		{"acknowledgements", after(9000, 52, 0, 0), between, other},
		{"acknowledgements and some data", after(9000, 52, 500, 0), between, other},
		{"some acknowledgements", after(900, 52, 0, 0), between, light},
		{"nothing", before, between, light},
		{"a link that has just begun to count", fastpath.Stats{RxPackets: 3000, RxBytes: 3000 * 1480, Single: 3000}, between, light},
	} {
		if got := weighLoad(before, tt.now, tt.between, 1480); got != tt.want {
			t.Errorf("%s: %v, not %v", tt.name, got, tt.want)
		}
	}
}

func TestCareIsTakenWhileItIsWorthIt(t *testing.T) {
	none, spread, merge := care{}, care{spread: true}, care{merge: true}
	for _, tt := range []struct {
		before   care
		load     load
		idle     time.Duration
		canMerge bool
		want     care
	}{
		{none, single, 0, true, merge},
		{spread, single, 0, true, merge},
		{none, single, 0, false, spread},
		{none, superpackets, 0, true, spread},
		{merge, superpackets, 0, true, spread},
		{merge, light, lull, true, merge},
		{merge, light, lull + 1, true, none},
		{spread, light, lull, true, spread},
		{spread, light, lull + 1, true, none},
		{none, other, 0, true, none},
		{spread, other, lull, true, none},
		{merge, other, lull, true, merge},
		{merge, other, lull + 1, true, none},
	} {
		if got := tt.before.after(tt.load, tt.idle, tt.canMerge); got != tt.want {
			t.Errorf("%+v after load %d, idle %v, can merge %v: %+v, not %+v", tt.before, tt.load, tt.idle, tt.canMerge, got, tt.want)
		}
	}
}
