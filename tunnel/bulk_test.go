package tunnel

import (
	"testing"
	"time"

	"ipipd/fastpath"
)

func TestBulkDataIsToldFromOtherLoad(t *testing.T) {
	then := time.Now()
	before := fastpath.Stats{RxPackets: 5000, RxBytes: 5000 * 1480, Merged: then}
	after := func(packets, size uint64, merged time.Time) fastpath.Stats {
		return fastpath.Stats{RxPackets: before.RxPackets + packets, RxBytes: before.RxBytes + packets*size, Merged: merged}
	}
	for _, tt := range []struct {
		name    string
		now     fastpath.Stats
		between time.Duration
		want    load
	}{
		{"segments", after(9000, 1480, then), 100 * time.Millisecond, segments},
		{"segments and some acknowledgements", after(9000, 1400, then), 100 * time.Millisecond, segments},
		{"segments in a longer time", after(9000, 1480, then), time.Second, light},
		{"superpackets", after(9000, 1480, then.Add(time.Second)), 100 * time.Millisecond, superpackets},
		{"superpackets at no rate", after(90, 1480, then.Add(time.Second)), 100 * time.Millisecond, light},
		{"acknowledgements", after(9000, 52, then), 100 * time.Millisecond, small},
		{"small datagrams", after(90000, 92, then), 100 * time.Millisecond, small},
		{"some acknowledgements", after(900, 52, then), 100 * time.Millisecond, light},
		{"nothing", before, 100 * time.Millisecond, light},
		{"a link that has just begun to count", fastpath.Stats{RxPackets: 3000, RxBytes: 3000 * 1480}, 100 * time.Millisecond, light},
	} {
		if got := weighLoad(before, tt.now, tt.between, 1480); got != tt.want {
			t.Errorf("%s: %v, not %v", tt.name, got, tt.want)
		}
	}
}

func TestCareIsTakenOfBulkDataWhileThereIsSome(t *testing.T) {
	none, both, spread, merge := care{}, care{true, true}, care{spread: true}, care{merge: true}
	for _, tt := range []struct {
		before care
		load   load
		idle   time.Duration
		want   care
	}{
		{none, segments, 0, both},
		{spread, segments, 0, both},
		{none, superpackets, 0, spread},
		{both, superpackets, 0, spread},
		{none, light, 0, none},
		{both, light, lull, both},
		{both, light, lull + 1, none},
		{none, small, 0, none},
		{both, small, lull, merge},
		{both, small, lull + 1, none},
	} {
		if got := tt.before.after(tt.load, tt.idle); got != tt.want {
			t.Errorf("%+v after load %d, idle %v: %+v, not %+v", tt.before, tt.load, tt.idle, got, tt.want)
		}
	}
}
