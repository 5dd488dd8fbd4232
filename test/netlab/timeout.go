package netlab

import (
	"crypto/sha256"
	"flag"
	"fmt"
	"math"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"testing"
	"time"
)

// Timeout returns the timeout for an event that a test expects: generous, as only a failing
// test waits so long.
func Timeout() time.Duration { return Scale(time.Minute) }

// Scale scales d, a duration for an idle machine, to the speed of this one.
//
// Use it for fixed times only: a key lifetime, how long no packet must come. To wait for an
// event use Eventually, Await and the like.
func Scale(d time.Duration) time.Duration { return time.Duration(float64(d) * slowdown()) }

// Seconds returns d in seconds, rounded up, for options such as ping's -W.
func Seconds(d time.Duration) string { return fmt.Sprint(math.Ceil(d.Seconds())) }

// Main is the TestMain of a package whose tests mostly wait: it runs perProcessor parallel
// tests for each processor, unless -test.parallel is given.
func Main(m *testing.M, perProcessor int) {
	slowdown() // before the tests themselves load the machine
	flag.Parse()
	given := false
	flag.Visit(func(f *flag.Flag) { given = given || f.Name == "test.parallel" })
	if !given {
		if err := flag.Set("test.parallel", fmt.Sprint(perProcessor*runtime.GOMAXPROCS(0))); err != nil {
			panic(err)
		}
	}
	os.Exit(m.Run())
}

// slowdown is how many times slower this machine is than an idle one of 2026, from 1 to 10.
// It is measured once, in a tenth of a second on an idle machine.
var slowdown = sync.OnceValue(func() float64 {
	const (
		rounds     = 20
		namespaces = 60 * time.Millisecond
		hashes     = 25 * time.Millisecond
		most       = 10
	)
	start, expected := time.Now(), hashes
	data := make([]byte, 1<<20)
	for range rounds {
		sha256.Sum256(data)
	}
	for range rounds {
		cmd := exec.Command("ip", "link", "set", "lo", "up")
		inNewNetns(cmd)
		if cmd.Run() != nil {
			break // no CAP_SYS_ADMIN, or no iproute2
		}
		expected += namespaces / rounds
	}
	factor := max(1, float64(time.Since(start))/float64(expected))
	if raceDetector {
		factor *= 3
	}
	return min(factor, most)
})
