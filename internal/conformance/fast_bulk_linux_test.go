package conformance

import (
	"fmt"
	"io"
	"net"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/internal/netlab"
)

// bulkSize is what a transfer takes some tenths of a second for.
const bulkSize = 64 << 20

// What the log says, at level debug, when a merger is complete, when it has gone, and
// where there can be none.
const (
	isMerged     = `are put together"`
	mergedNoMore = `are not put together any more"`
	notMerged    = `are not put together"`
)

// mergerName is what an interface that puts segments together is called.
var mergerName = regexp.MustCompile(`ipipgro[a-z0-9]{8}`)

// mergers are the names of the interfaces of ns that put segments together.
func mergers(ns *netlab.NS) []string {
	return mergerName.FindAllString(ns.Run("ip", "-brief", "link", "show", "type", "veth"), -1)
}

// segmenting is two hosts whose wire carries each segment by itself, and the fast path
// over it.
func segmenting(t *testing.T) (a, b *netlab.NS, da, db *netlab.Daemon) {
	t.Helper()
	if runtime.NumCPU() == 1 {
		t.Skip("needs two processors")
	}
	a, b = hosts(t)
	netlab.Segment(a, "veth0")
	netlab.Segment(b, "veth0")
	da, db = fast.upA(t, a, "--log-level", "debug"), fast.upB(t, b, "--log-level", "debug")
	isFast(t, da, db)
	return a, b, da, db
}

// busily transfers from a to b until done, and skips the test where that is no great
// load: what is tested begins at 20,000 packets a second.
func busily(t *testing.T, a, b *netlab.NS, what string, done func() bool) {
	t.Helper()
	fastest := 0.0
	for end := time.Now().Add(socketPatience); !done(); {
		start := time.Now()
		transfer(t, a, b, innerB, bulkSize)
		fastest = max(fastest, bulkSize/1448/time.Since(start).Seconds())
		switch {
		case time.Now().Before(end):
		case fastest < 2*20_000:
			t.Skipf("needs a faster machine, or a less busy one: %.0f packets a second are too few", fastest)
		default:
			t.Fatalf("%.0f packets a second, and it did not come true that %s", fastest, what)
		}
	}
}

// untilMerged transfers from a to b until b's daemon has made a merger, its last part
// included: that it is set up.
func untilMerged(t *testing.T, a, b *netlab.NS, db *netlab.Daemon) (name string) {
	t.Helper()
	busily(t, a, b, "the receiver puts segments together", func() bool {
		log := db.Log()
		if strings.Contains(log, notMerged) {
			t.Skipf("needs CAP_SYS_ADMIN and veth:\n%s", log)
		}
		if names := mergers(b); len(names) == 1 && strings.LastIndex(log, isMerged) > strings.LastIndex(log, mergedNoMore) {
			name = names[0]
		}
		return name != ""
	})
	return name
}

// What the fast path receives as bulk data in single segments comes to the host's TCP
// in superpackets, its bytes unchanged, and everything else as ever.
func TestTheFastPathPutsSegmentsTogether(t *testing.T) {
	t.Parallel()
	a, b, da, db := segmenting(t)
	untilMerged(t, a, b, db)
	large := netlab.Capture(t, b, "t0", func(f netlab.Frame) bool { return !f.Outgoing && len(f.Packet) > 2000 })
	transfer(t, a, b, innerB, bulkSize)
	large.Await()
	if names := mergers(a); len(names) > 0 {
		t.Errorf("so does the sender, which receives acknowledgements only: %v", names)
	}

	before := db.Status()
	ping(t, a, innerB)
	echoed(t, a, b, []int{0, 1, 100, 1400, 1452, 1452, 5000}, 0)
	transfer(t, b, a, innerA, 1<<20)
	if after := db.Status(); after.RxPacket <= before.RxPacket || after.FastPath != "active" {
		t.Errorf("fast-path is %q, rx-packet was %d and is %d", after.FastPath, before.RxPacket, after.RxPacket)
	}
	isFast(t, da, db)

	db.Stop(unix.SIGTERM)
	if names := mergers(b); len(names) > 0 {
		t.Errorf("left behind: %v", names)
	}
}

// Nobody counts a packet twice, or not at all, because it was put together with others.
func TestSegmentsThatArePutTogetherAreCountedAsTheyCame(t *testing.T) {
	t.Parallel()
	a, b, da, db := segmenting(t)
	both := ends{da, db}
	both.settled(t, func() { transfer(t, a, b, innerB, 1<<16) })
	n := throughMerger(t, a, b, db, func() {
		before := both.quiet(t)
		transfer(t, a, b, innerB, 1<<20) // which no queue is too short for
		both.same(t, before)
	})
	if n < 1<<20/1500 {
		t.Errorf("%d packets of 1 MiB were put together", n)
	}
}

func TestSegmentsAreNoLongerPutTogetherAfterALull(t *testing.T) {
	t.Parallel()
	a, b, _, db := segmenting(t)
	untilMerged(t, a, b, db)
	netlab.Eventually(t, "the merger goes", func() bool { return len(mergers(b)) == 0 })
	transfer(t, a, b, innerB, 1<<20)
}

// Bulk data is spread over the processors, superpackets as well, but those are not put
// together. The daemon of a test has the /sys of another namespace, and says that it
// would have spread them.
func TestSuperpacketsAreSpreadAndNotPutTogether(t *testing.T) {
	t.Parallel()
	if runtime.NumCPU() == 1 {
		t.Skip("needs two processors")
	}
	const spread = "not spread over the processors"
	a, b := hosts(t)
	da, db := fast.upA(t, a, "--log-level", "debug"), fast.upB(t, b, "--log-level", "debug")
	isFast(t, da, db)
	busily(t, a, b, "the receiver's are spread", func() bool { return strings.Contains(db.Log(), spread) })
	if strings.Contains(da.Log(), spread) {
		t.Error("so are the sender's, which receives acknowledgements only")
	}
	if log := da.Log() + db.Log(); strings.Contains(log, "put together") {
		t.Errorf("they are put together:\n%s", log)
	}
}

// An operator who takes the merger away loses what is in it, and no more.
func TestTrafficOutlivesItsMerger(t *testing.T) {
	t.Parallel()
	for _, lose := range [][]string{{"ip", "link", "delete"}, {"ip", "link", "set", "down", "dev"}} {
		t.Run(strings.Join(lose, " "), func(t *testing.T) {
			t.Parallel()
			a, b, _, db := segmenting(t)
			name := untilMerged(t, a, b, db)
			b.Run(lose[0], append(lose[1:], name)...)
			transfer(t, a, b, innerB, bulkSize)
			busily(t, a, b, "there is another", func() bool {
				names := mergers(b)
				return len(names) == 1 && names[0] != name
			})
		})
	}
}

// It may go before it is complete, too.
func TestAMergerThatIsTakenAwayAtOnceIsMadeAgain(t *testing.T) {
	t.Parallel()
	a, b, _, _ := segmenting(t)
	remove, commands := io.Pipe()
	ip := exec.Command("ip", "-force", "-batch", "-") // which has started by then
	ip.Stdin = remove
	b.Start(ip)
	taken := make(chan struct{})
	go b.Do(func() {
		defer close(taken)
		defer commands.Close()
		seen := make(map[string]bool)
		for len(seen) < 2 && t.Context().Err() == nil {
			all, err := net.Interfaces()
			if err != nil {
				continue // one of them went meanwhile
			}
			for _, i := range all {
				if mergerName.MatchString(i.Name) && !seen[i.Name] {
					seen[i.Name] = true
					fmt.Fprintln(commands, "link delete", i.Name)
				}
			}
		}
	})
	busily(t, a, b, "there is a third", func() bool {
		select {
		case <-taken:
			return len(mergers(b)) == 1
		default:
			return false
		}
	})
}

// The kernel removes what a killed process has made.
func TestAKilledDaemonLeavesNoMerger(t *testing.T) {
	t.Parallel()
	a, b, _, db := segmenting(t)
	untilMerged(t, a, b, db)
	db.Stop(unix.SIGKILL)
	netlab.Eventually(t, "the merger goes", func() bool { return len(mergers(b)) == 0 })
}

// Datagrams, which nothing puts together, go past it and keep their order.
func TestDatagramsGoPastTheMerger(t *testing.T) {
	t.Parallel()
	a, b, _, db := segmenting(t)
	n := throughMerger(t, a, b, db, func() { numbered(t, a, b) })
	if n > 100 { // numbered sends 4,000
		t.Errorf("%d packets went through it", n)
	}
}

// throughMerger is how many packets go through b's merger during traffic, which is
// called again if the merger goes meanwhile: a slow machine takes longer for it than the
// lull after which that is right.
func throughMerger(t *testing.T, a, b *netlab.NS, db *netlab.Daemon, traffic func()) int {
	t.Helper()
	for end := time.Now().Add(socketPatience); time.Now().Before(end); {
		merger := untilMerged(t, a, b, db)
		if before, ok := sentBy(t, b, merger); ok {
			traffic()
			if after, ok := sentBy(t, b, merger); ok {
				return after - before
			}
		}
	}
	t.Fatal("the merger goes each time")
	return 0
}

// sentBy is how many packets an interface has sent, if there is one.
func sentBy(t *testing.T, ns *netlab.NS, ifname string) (packets int, ok bool) {
	t.Helper()
	out, err := ns.Try("ip", "-s", "link", "show", "dev", ifname)
	if err != nil {
		return 0, false
	}
	_, sent, _ := strings.Cut(out, "TX:")
	_, sent, _ = strings.Cut(sent, "\n")
	var bytes int
	if _, err := fmt.Sscan(sent, &bytes, &packets); err != nil {
		t.Fatalf("statistics of %s: %v: %s", ifname, err, out)
	}
	return packets, true
}

// Without the privilege for a namespace the fast path carries segment by segment.
func TestWithoutANamespaceSegmentsAreNotPutTogether(t *testing.T) {
	t.Parallel()
	if runtime.NumCPU() == 1 {
		t.Skip("needs two processors")
	}
	runtime.LockOSThread() // for good, of this thread and what it starts
	a, b := hosts(t)
	netlab.Segment(a, "veth0")
	fast.upA(t, a)
	if err := unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_SYS_ADMIN, 0, 0, 0); err != nil {
		t.Skipf("cannot do without a capability: %v", err)
	}
	db := fast.upB(t, b, "--log-level", "debug")
	busily(t, a, b, "the log says why not", func() bool {
		// It tries to spread them instead, in a /sys of another namespace.
		return strings.Contains(db.Log(), notMerged) && strings.Contains(db.Log(), "not spread")
	})
	if names := mergers(b); len(names) > 0 {
		t.Errorf("left behind: %v", names)
	}
	isFast(t, db)
}
