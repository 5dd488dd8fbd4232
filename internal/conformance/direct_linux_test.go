package conformance

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ipipd/internal/netlab"
)

// What the log says, at level debug, when the frames of a flood go to the underlay
// device's driver by themselves, and when they do not.
const (
	isDirect  = `frames go to the underlay device's driver directly"`
	notDirect = `frames do not go to the underlay device's driver directly" `
)

// flooding is two hosts with a tunnel in userspace, of which a sends so much that its
// frames go directly.
func flooding(t *testing.T) (a, b *netlab.NS, da, db *netlab.Daemon) {
	t.Helper()
	a, b = hosts(t)
	da, db = carriers[0].upA(t, a, "--log-level", "debug"), carriers[0].upB(t, b)
	untilDirect(t, a, b, da)
	return a, b, da, db
}

// untilDirect transfers from a to b until frames go directly.
func untilDirect(t *testing.T, a, b *netlab.NS, da *netlab.Daemon) {
	t.Helper()
	busily(t, a, b, "frames go directly", func() bool {
		if log := da.Log(); strings.Contains(log, unix.EAFNOSUPPORT.Error()) {
			t.Skip("needs AF_XDP in the kernel (CONFIG_XDP_SOCKETS)")
		}
		return isOn(da)
	})
}

// isOn reports whether frames went directly when it was last said.
func isOn(d *netlab.Daemon) bool {
	log := d.Log()
	return strings.LastIndex(log, isDirect) > strings.LastIndex(log, notDirect)
}

// untilNot transfers from a to b until frames do not go directly, because of something.
func untilNot(t *testing.T, a, b *netlab.NS, da *netlab.Daemon, because string) {
	t.Helper()
	busily(t, a, b, because+" ends it", func() bool {
		log := da.Log()
		return !isOn(da) && strings.Contains(log[strings.LastIndex(log, notDirect):], because)
	})
}

// Both ends count every packet, and the bytes are the same: that is transfer's to see.
func TestAFloodThatIsSentDirectlyIsCounted(t *testing.T) {
	t.Parallel()
	a, b, da, db := flooding(t)
	both := ends{da, db}
	before := both.quiet(t)
	transfer(t, a, b, innerB, bulkSize)
	both.same(t, before)
	if !isOn(da) {
		t.Error("it ended meanwhile")
	}
	ping(t, a, innerB)
	transfer(t, b, a, innerA, 1<<20)
}

// Whoever looks at what the underlay device sends sees all of it.
func TestAFloodThatSomebodyLooksAtIsNotSentDirectly(t *testing.T) {
	t.Parallel()
	a, b, da, _ := flooding(t)
	t.Run("seen", func(t *testing.T) {
		seen := netlab.Capture(t, a, "veth0", func(f netlab.Frame) bool { return f.Outgoing && f.Packet[9] == unix.IPPROTO_IPIP })
		untilNot(t, a, b, da, "a packet socket")
		before := len(seen.Frames())
		transfer(t, a, b, innerB, 1<<20)
		const least = 1 << 20 / 1448
		netlab.Eventually(t, fmt.Sprintf("%d packets were seen", least), func() bool { return len(seen.Frames())-before >= least })
	})
	untilDirect(t, a, b, da) // when nobody does any more
}

var sentBytes = regexp.MustCompile(`Sent (\d+) bytes`)

// The queueing discipline that an operator gives the underlay device has every packet.
func TestAFloodPassesTheQueueingDiscipline(t *testing.T) {
	t.Parallel()
	a, b, da, _ := flooding(t)
	if out, err := a.Try("tc", "qdisc", "add", "dev", "veth0", "root", "pfifo", "limit", "10000"); err != nil {
		t.Skipf("needs pfifo: %s", out)
	}
	sent := func() (n int) {
		if m := sentBytes.FindStringSubmatch(a.Run("tc", "-s", "qdisc", "show", "dev", "veth0")); m != nil {
			n, _ = strconv.Atoi(m[1])
		}
		return n
	}
	untilNot(t, a, b, da, "queueing discipline pfifo")
	before := sent()
	transfer(t, a, b, innerB, 1<<20)
	if n := sent() - before; n < 1<<20 {
		t.Errorf("of 1 MiB, %d bytes passed it", n)
	}
	a.Run("tc", "qdisc", "delete", "dev", "veth0", "root")
	untilDirect(t, a, b, da)
}

func TestAFloodOutlivesItsInterfaceGoingDown(t *testing.T) {
	t.Parallel()
	a, b, da, _ := flooding(t)
	a.Run("ip", "link", "set", "veth0", "down")
	a.Run("ip", "link", "set", "veth0", "up")
	transfer(t, a, b, innerB, 1<<20)
	untilDirect(t, a, b, da)
	transfer(t, a, b, innerB, 1<<20)
}
