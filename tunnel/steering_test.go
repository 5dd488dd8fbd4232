package tunnel

import (
	"testing"
	"time"

	"ipipd/fastpath"
)

func TestOnlyDataInSingleSegmentsIsSpread(t *testing.T) {
	then := time.Now()
	before := fastpath.Stats{RxPackets: 5000, RxBytes: 5000 * 1480, Merged: then}
	after := func(packets, size uint64, merged time.Time) fastpath.Stats {
		return fastpath.Stats{RxPackets: before.RxPackets + packets, RxBytes: before.RxBytes + packets*size, Merged: merged}
	}
	for _, tt := range []struct {
		name    string
		steered bool
		now     fastpath.Stats
		want    bool
	}{
		{"segments", false, after(9000, 1480, then), true},
		{"segments still", true, after(9000, 1400, then), true},
		{"superpackets", true, after(9000, 1480, then.Add(time.Second)), false},
		{"acknowledgements", true, after(9000, 52, then), false},
		{"small datagrams", false, after(90000, 92, then), false},
		{"hardly anything, and it was spread", true, after(9, 52, then), true},
		{"hardly anything, and it was not", false, after(9, 1480, then), false},
		{"a link that has just begun to count", true, fastpath.Stats{RxPackets: 3000, RxBytes: 3000 * 1480}, false},
	} {
		if got := steers(tt.steered, before, tt.now, 1480); got != tt.want {
			t.Errorf("%s: %v", tt.name, got)
		}
	}
}
