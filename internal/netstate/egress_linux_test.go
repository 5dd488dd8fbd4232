package netstate

import (
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ipipd/test/netlab"
)

func TestEgressHooks(t *testing.T) {
	const all = " protocol ip u32 match u32 0 0"
	for _, c := range []struct {
		name     string
		commands string
		want     string // a part of the reason; "" is none
	}{
		{"nothing but the kernel's own queueing disciplines", "true", ""},
		{"noqueue", "tc qdisc add dev tun0 root pfifo; tc qdisc replace dev tun0 root noqueue", ""},
		{"clsact without a filter", "tc qdisc add dev tun0 clsact", ""},
		{"ingress without a filter", "tc qdisc add dev tun0 ingress", ""},
		{"a filter on ingress", "tc qdisc add dev tun0 clsact; tc filter add dev tun0 ingress" + all, ""},
		{"a filter of an ingress qdisc", "tc qdisc add dev tun0 ingress; tc filter add dev tun0 parent ffff:" + all, ""},
		{"a filter on egress", "tc qdisc add dev tun0 clsact; tc filter add dev tun0 egress" + all, "tc has filters on the egress"},
		{"a filter on a shared block", "tc qdisc add dev tun0 egress_block 9 clsact; tc filter add block 9" + all, "tc has filters on the egress"},
		{"tbf", "tc qdisc add dev tun0 root tbf rate 5mbit burst 20k latency 100ms", "queueing discipline tbf"},
		{"the kind that is there by default", "tc qdisc add dev tun0 root fq_codel", "queueing discipline fq_codel"},
		{"a handle by hand", "tc qdisc add dev tun0 root handle 1: prio", "queueing discipline prio"},
		{"one that was taken away", "tc qdisc add dev tun0 root pfifo; tc qdisc del dev tun0 root", ""},
		{"another interface's", "tc qdisc add dev lo root pfifo; tc qdisc add dev lo clsact; tc filter add dev lo egress" + all, ""},
		{"promiscuous mode", "ip link set tun0 promisc on", "promiscuous"},
		{"promiscuous mode that was left", "ip link set tun0 promisc on; ip link set tun0 promisc off", ""},
		{"promiscuous mode of another interface", "ip link set lo promisc on", ""},
	} {
		for _, queues := range []string{"", " multi_queue"} {
			t.Run(c.name+queues, func(t *testing.T) {
				ns := netlab.New(t)
				ns.Run("sh", "-ec", "ip tuntap add tun0 mode tun"+queues+"; ip link set tun0 up")
				if out, err := ns.Try("sh", "-ec", c.commands); err != nil {
					t.Skipf("this system cannot %s: %s", c.commands, strings.TrimSpace(out))
				}
				device := index(t, ns, "tun0")
				ns.Do(func() {
					if got := EgressHooks(device); c.want == "" && got != "" || !strings.Contains(got, c.want) || strings.Contains(got, "\n") {
						t.Errorf("%q, want %q", got, c.want)
					}
				})
			})
		}
	}
	t.Run("no such interface", func(t *testing.T) {
		netlab.New(t).Do(func() {
			if got := EgressHooks(9999); !strings.Contains(got, "cannot tell") {
				t.Errorf("%q", got)
			}
		})
	})
}

func TestEgressTaps(t *testing.T) {
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
			if got := EgressTaps(device); (got != "") != c.want || c.want && !strings.Contains(got, "packet socket") {
				t.Errorf("%s: %q", c.name, got)
			}
		})
	}
	ns.Do(func() {
		if got := EgressTaps(device); got != "" {
			t.Errorf("all of them closed: %q", got)
		}
	})
}

func TestIsTapped(t *testing.T) {
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
		if got, err := isTapped([]byte(c.file), 7); err != nil || got != c.want {
			t.Errorf("%v, %v of\n%s", got, err, c.file)
		}
	}
	if _, err := isTapped([]byte(head+"of another kernel\n"), 7); err == nil {
		t.Error("what cannot be read is taken for nothing")
	}
}
