package netstate

import (
	"strings"
	"testing"

	"ipipd/test/netlab"
)

func TestHost_egressBlocker(t *testing.T) {
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
		{"a filter on egress", "tc qdisc add dev tun0 clsact; tc filter add dev tun0 egress" + all, ""},
		{"a filter on a shared block", "tc qdisc add dev tun0 egress_block 9 clsact; tc filter add block 9" + all, ""},
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
				got := ask(t, ns, Query{Remote: far, Interface: index(t, ns, "tun0")}).Egress
				if c.want == "" && got != "" || !strings.Contains(got, c.want) || strings.Contains(got, "\n") {
					t.Errorf("%q, want %q", got, c.want)
				}
			})
		}
	}
	t.Run("no such interface", func(t *testing.T) {
		if got := ask(t, netlab.New(t), Query{Remote: far, Interface: 9999}).Egress; !strings.Contains(got, "cannot tell") {
			t.Errorf("%q", got)
		}
	})
}

// The kernel tells of the removal of a qdisc, but not of the qdiscs attached to its classes.
func TestWithoutQdisc(t *testing.T) {
	root := qdisc{handle: 0x10000, parent: 0xffffffff, kind: "htb"}
	child := qdisc{handle: 0x20000, parent: 0x10001, kind: "prio"}
	grandchild := qdisc{handle: 0x30000, parent: 0x20002, kind: "pfifo"}
	clsact := qdisc{handle: 0xffff0000, parent: 0xfffffff1, kind: "clsact"}
	all := []qdisc{root, child, grandchild, clsact}
	for _, c := range []struct {
		gone qdisc
		want []qdisc
	}{
		{root, []qdisc{clsact}},
		{child, []qdisc{root, clsact}},
		{grandchild, []qdisc{root, child, clsact}},
		{clsact, []qdisc{root, child, grandchild}},
		{qdisc{handle: 0x70000}, all},
	} {
		got := withoutQdisc(all, c.gone)
		if len(got) != len(c.want) {
			t.Errorf("without %v: %v", c.gone, got)
			continue
		}
		for i := range got {
			if got[i] != c.want[i] {
				t.Errorf("without %v: %v", c.gone, got)
			}
		}
	}
}
