package netstate

import (
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ipipd/test/netlab"
)

// egressTaps returns Taps.On of an interface.
func egressTaps(t *testing.T, device int) string {
	t.Helper()
	taps, err := fresh.EgressTaps()
	if err != nil {
		t.Error(err)
	}
	return taps.On(device)
}

func TestTaps(t *testing.T) {
	ns := netlab.New(t)
	ns.Run("ip", "tuntap", "add", "tun0", "mode", "tun")
	device := index(t, ns, "tun0")
	for _, c := range []struct {
		name             string
		protocol, device int
		want             bool
	}{
		{"all protocols", unix.ETH_P_ALL, device, true},
		{"all protocols, of every interface", unix.ETH_P_ALL, 0, true},
		{"all protocols of another", unix.ETH_P_ALL, 1, false},
		{"IPv4, which is what is received", unix.ETH_P_IP, device, false},
		{"none, to send by", 0, 0, false},
	} {
		ns.Do(func() {
			fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Skipf("needs root (CAP_NET_RAW): %v", err)
			}
			defer unix.Close(fd)
			if c.protocol != 0 {
				big := uint16(c.protocol)<<8 | uint16(c.protocol)>>8
				if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: big, Ifindex: c.device}); err != nil {
					t.Fatal(err)
				}
			}
			if got := egressTaps(t, device); (got != "") != c.want || c.want && !strings.Contains(got, "packet socket") {
				t.Errorf("%s: %q", c.name, got)
			}
		})
	}
	ns.Do(func() {
		if got := egressTaps(t, device); got != "" {
			t.Errorf("all of them closed: %q", got)
		}
	})
}

func TestParseTaps(t *testing.T) {
	const head = "sk               RefCnt Type Proto  Iface R Rmem   User   Inode\n"
	line := func(protocol string, device int) string {
		return fmt.Sprintf("00000000b2ba5a3c 3      3    %s   %-5d 1 0      0      17393 \n", protocol, device)
	}
	for _, c := range []struct {
		file string
		want bool
	}{
		{"", false},
		{head, false},
		{head + line("0003", 7), true},
		{head + line("0800", 7) + line("0003", 77) + line("0003", 0), true},
		{head + line("0800", 7) + line("0003", 77) + line("88cc", 0), false},
	} {
		if got, err := parseTaps([]byte(c.file)); err != nil || (got.On(7) != "") != c.want {
			t.Errorf("%v, %v of\n%s", got, err, c.file)
		}
	}
	for _, bad := range []string{"of another kernel\n", "0 3 3 0003 tun0\n"} {
		if _, err := parseTaps([]byte(head + bad)); err == nil {
			t.Errorf("what cannot be read is taken for nothing: %s", bad)
		}
	}
}
