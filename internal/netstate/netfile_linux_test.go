package netstate

import (
	"errors"
	"os"
	"strings"
	"testing"

	"ipipd/test/netlab"
)

// A file that is kept open is read anew each time, in the namespace it was opened in.
func TestNetFile(t *testing.T) {
	ns := netlab.New(t)
	var kept, other netFile
	defer kept.close()
	ns.Do(func() {
		if err := kept.open("dev"); err != nil {
			t.Fatal(err)
		}
	})
	file := kept.file
	for _, want := range []bool{false, true} {
		if want {
			ns.Run("ip", "tuntap", "add", "later0", "mode", "tun")
		}
		if content, err := kept.read("dev"); err != nil || strings.Contains(string(content), "later0") != want {
			t.Errorf("later0 is there: %v, but read %v, %s", want, err, content)
		}
	}
	if kept.file != file {
		t.Error("it was opened again")
	}
	if content, err := other.read("dev"); err != nil || !strings.Contains(string(content), "lo:") || other.file != nil {
		t.Errorf("without open: %v, %s; left open: %v", err, content, other.file)
	}
	if err := other.open("no-such-file"); err != nil {
		t.Errorf("open a file that there is not yet: %v", err)
	}
	if _, err := other.read("no-such-file"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("read a file that there is not yet: %v", err)
	}
}
