package tunnel

import (
	"fmt"
	"strings"
	"testing"

	"ipipd/test/memory"
)

// Diff returns what Apply would do, and changes nothing.
func TestEngineDiff(t *testing.T) {
	const secret = " allow-fast-path=no ipsec-secret="
	sockets, _ := memory.NewSocketPair()
	e, m := newModel(t, sockets)
	const lineC = "name=c remote-address=198.51.100.3"
	apply(t, e, lineA, lineB, lineC)
	before, calls := state(e, m), m.calls
	for _, tt := range []struct {
		lines []string
		want  string
	}{
		{[]string{lineA, lineB, lineC}, "a: nothing []\nb: nothing []\nc: nothing []"},
		{[]string{lineB + " dscp=46 route=10.40.0.0/16", lineA}, "b: in place [dscp route]\na: nothing []\nc: remove []"},
		{[]string{lineA + " dscp=46 tun-queues=1", lineB + secret + "mellon", "name=d remote-address=198.51.100.4"},
			"a: again [tun-queues dscp] by tun-queues\nb: again [ipsec-secret allow-fast-path] by ipsec-secret\nd: add []\nc: remove []"},
		{[]string{"name=a remote-address=any local-address=192.0.2.1 address=10.255.0.1/30 peers=10.20.0.0/16=198.51.100.1", "name=c remote-address=198.51.100.9 tun-queues=1", lineB},
			"a: again [remote-address local-address route peers] by remote-address\nc: again [tun-queues remote-address] by tun-queues\nb: nothing []"},
	} {
		differences, err := e.Diff(configs(t, tt.lines...))
		if err != nil {
			t.Fatal(err)
		}
		var lines []string
		for _, d := range differences {
			var names []string
			for _, p := range d.Properties {
				names = append(names, p.Name)
			}
			line := fmt.Sprintf("%s: %v %v", d.Name, d.Action, names)
			if d.Remade > 0 {
				line += " by " + strings.Join(names[:d.Remade], " ")
			}
			lines = append(lines, line)
		}
		if got := strings.Join(lines, "\n"); got != tt.want {
			t.Errorf("got\n%s\nwant\n%s", got, tt.want)
		}
	}
	if state(e, m) != before || m.calls != calls {
		t.Error("it has changed something")
	}
	if _, err := e.Diff(configs(t, "name=a remote-address=198.51.100.1 ipsec-secret-file=/nonexistent allow-fast-path=no")); err == nil {
		t.Error("no error for a secret that cannot be read")
	}
}
