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

// Patience is how long a test waits for what has to come: long for any machine, as
// only a test that fails waits so long.
func Patience() time.Duration { return Slower(time.Minute) }

// Slower is d, which is enough on a machine that does nothing else, as long as it
// must be here.
//
// It is for times that cannot be left out: the lifetime of a key that is to be
// replaced in time, how long nothing must come. What has to come is waited for with
// Eventually, Await and the like.
func Slower(d time.Duration) time.Duration { return time.Duration(float64(d) * slowness()) }

// Seconds is d in whole seconds, for options such as ping's -W.
func Seconds(d time.Duration) string { return fmt.Sprint(math.Ceil(d.Seconds())) }

// Main is TestMain of a package whose tests wait more than they work: with t.Parallel,
// so many of them are run for each processor, unless the command line says how many.
func Main(m *testing.M, perProcessor int) {
	slowness() // before the tests themselves slow the machine
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

// slowness is how many times slower than an idle machine of 2026 this one is, never
// less than 1, nor more than 10: a test that fails is to end some day. It is measured
// once, which takes a tenth of a second there.
var slowness = sync.OnceValue(func() float64 {
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
			break // no privilege, or no iproute2
		}
		expected += namespaces / rounds
	}
	factor := max(1, float64(time.Since(start))/float64(expected))
	if raceDetector {
		factor *= 3
	}
	return min(factor, most)
})
