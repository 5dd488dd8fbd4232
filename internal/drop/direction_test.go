package drop_test

import (
	"testing"

	"ipipd/internal/drop"
)

// A reason's name and group say which way its packets went.
func TestReason_Direction(t *testing.T) {
	want := map[string]drop.Direction{"Outbound": drop.Transmit, "Inbound": drop.Receive, "ICMP": ""}
	transmitted := map[drop.Reason]bool{drop.ESPNoSA: true, drop.ESPExhausted: true, drop.ESPNoRoom: true}
	for _, g := range drop.Groups() {
		for r := range g.Reasons {
			expected := want[g.Name]
			if g.Name == "ESP" {
				expected = drop.Receive
				if transmitted[r] {
					expected = drop.Transmit
				}
			}
			if got := r.Direction(); got != expected {
				t.Errorf("%v: %q, want %q", r, got, expected)
			}
			if (g.Name == "ESP") != r.ByESP() {
				t.Errorf("%v of %s: ByESP is %v", r, g.Name, r.ByESP())
			}
			if r.ByProcess() && r.Direction() == drop.Transmit {
				t.Errorf("%v: sent by a tunnel, and by none", r)
			}
		}
	}
	if drop.None.Direction() != "" {
		t.Error("None has a direction")
	}
}
