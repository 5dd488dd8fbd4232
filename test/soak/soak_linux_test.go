//go:build linux && soak

package soak

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/test/netlab"
)

var (
	soakBinary = flag.String("ipipd", "../../ipipd", "the program")
	soakFor    = flag.Duration("for", 10*time.Minute, "how long the soak takes, calm times included")
	soakSeed   = flag.Uint64("seed", 0, "seed of all that is random; 0 takes one by chance")
	soakRate   = flag.Int("hostile", 20000, "hostile packets a second, at most, while events go on")
	soakRound  = flag.Duration("round", 20*time.Second, "how long events go on between two calm times")
	soakOnly   = flag.String("only", "", "events to choose from, separated by commas; all without it")
	logSize    = int64(16 << 20)
	soakSteady = flag.Int("steady", leastSamples, "rounds without a restart, at least: below the default nothing can be said about memory")
)

// soak is one run.
type soak struct {
	t       *testing.T
	ctx     context.Context
	began   time.Time
	seed    uint64
	ends    [2]*end
	flows   []flow
	logs    *os.File // a file system of logSize
	ledger  atomic.Uint32
	streams atomic.Bool // whether the streams of the conversations run

	conversations []*conversation
	background    sync.WaitGroup // of the goroutines of events
	events        map[string]int
	hostile       [kinds]atomic.Int64
	hostileOn     atomic.Bool
	injected      atomic.Int64 // system calls that have failed
	samples       []sample

	lock     sync.Mutex
	failures []string
}

// logf prints a line of the schedule.
func (s *soak) logf(format string, args ...any) {
	s.lock.Lock()
	defer s.lock.Unlock()
	line := fmt.Sprintf(format, args...)
	fmt.Printf("%7.1fs %s\n", time.Since(s.began).Seconds(), strings.ReplaceAll(line, "\n", "\n         "))
}

// failf notes a failure: the run goes on to the end of the round.
func (s *soak) failf(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	s.lock.Lock()
	s.failures = append(s.failures, text)
	s.lock.Unlock()
	s.logf("FAIL %s", text)
}

func (s *soak) failed() bool {
	s.lock.Lock()
	defer s.lock.Unlock()
	return len(s.failures) > 0
}

// random returns a random source of the seed for the purpose of: other purposes do not disturb it.
func (s *soak) random(of ...uint64) *rand.Rand {
	second := uint64(0)
	for _, n := range of {
		second = second*1000003 + n + 1
	}
	return rand.New(rand.NewPCG(s.seed, second))
}

func TestSoak(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: network namespaces, /dev/net/tun and raw sockets")
	}
	s := &soak{t: t, began: time.Now(), seed: *soakSeed, events: map[string]int{}}
	if s.seed == 0 {
		s.seed = rand.Uint64N(1e9) + 1
	}
	var cancel context.CancelFunc
	s.ctx, cancel = signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer cancel()
	s.logf("seed %d, %v: make soak SOAK=%v SEED=%d", s.seed, *soakFor, *soakFor, s.seed)
	s.makeLogs()
	if _, err := os.Stat(*soakBinary); err != nil {
		t.Fatalf("-ipipd: %v: make soak builds it", err)
	}
	for _, program := range []string{"strace", "nft", "tc", "unshare"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Fatalf("%v: make soak installs it on Debian", err)
		}
	}
	var tunnels [2][]tunnel
	tunnels, s.flows = topology()
	before := [2]string{}
	for i, name := range []string{"a", "b"} {
		s.ends[i] = s.newEnd(i, name, tunnels[i])
		before[i] = s.ends[i].surroundings()
	}
	s.ends[endA].port.peer, s.ends[endB].port.peer = s.ends[endB].port, s.ends[endA].port
	for _, e := range s.ends {
		go e.port.carry()
	}
	for i, f := range s.flows {
		s.conversations = append(s.conversations, s.open(f, firstPort+uint16(i)))
	}
	stop := make(chan struct{})
	var running sync.WaitGroup
	running.Go(func() { s.stream(stop) })
	running.Go(func() { s.flood(stop) })
	defer func() {
		for _, e := range s.ends {
			e.stop(unix.SIGTERM)
		}
		if s.failed() {
			for _, e := range s.ends {
				t.Logf("log of end %s:\n%s", e.name, e.tail())
			}
			t.Errorf("to repeat it: make soak SOAK=%v SEED=%d\n%s", *soakFor, s.seed, strings.Join(s.failures, "\n"))
		}
	}()
	for _, e := range s.ends {
		e.start(s.random(uint64(e.index)).IntN(2) == 0, 0)
	}
	s.calm(0)
	steady := 0 // rounds
	for round := 1; !s.failed() && s.ctx.Err() == nil && (time.Since(s.began) < *soakFor || steady < *soakSteady); round++ {
		restarts := time.Since(s.began) < *soakFor*2/5
		if !restarts {
			if steady++; steady == 1 {
				s.settle()
			}
		}
		s.chaos(round, restarts)
		s.calm(round)
	}
	close(stop)
	running.Wait()
	if !s.failed() && s.ctx.Err() == nil && *soakSteady >= leastSamples {
		s.slope()
	}
	for i, e := range s.ends {
		e.stop(unix.SIGTERM)
		if after := e.surroundings(); after != before[i] {
			s.failf("end %s: it was\n%s\nand after the end of ipipd it is\n%s", e.name, before[i], after)
		}
	}
	s.summary()
}

// settle starts end a under keep and end b without, for the rounds in which no process is restarted.
func (s *soak) settle() {
	for i, e := range s.ends {
		if kept := i == endA; e.kept != kept {
			e.stop(unix.SIGTERM)
			e.start(kept, 0)
		}
		s.eventually("end "+e.name+" has started", func() error {
			if !e.ready() {
				return errors.New("it lists no tunnel")
			}
			return nil
		})
	}
}

// makeLogs makes a file system for the logs, which is mounted nowhere.
func (s *soak) makeLogs() {
	context, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err == nil {
		defer unix.Close(context)
		err = unix.FsconfigSetString(context, "size", fmt.Sprint(logSize))
	}
	if err == nil {
		err = unix.FsconfigCreate(context)
	}
	var fd int
	if err == nil {
		fd, err = unix.Fsmount(context, unix.FSMOUNT_CLOEXEC, 0)
	}
	if err != nil {
		s.t.Fatalf("make a file system for the logs: %v", err)
	}
	s.logs = os.NewFile(uintptr(fd), "logs")
	s.t.Cleanup(func() { s.logs.Close() })
}

func (s *soak) logFile(name string) string {
	return fmt.Sprintf("/proc/self/fd/%d/%s", s.logs.Fd(), name)
}

func (s *soak) newEnd(index int, name string, tunnels []tunnel) *end {
	e := &end{s: s, index: index, name: name, tunnels: tunnels, ns: netlab.New(s.t), first: map[int]resources{}}
	var err error
	if e.dir, err = os.MkdirTemp("", "soak"); err != nil { // short: a socket's name has 107 bytes
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { os.RemoveAll(e.dir) })
	e.file = filepath.Join(e.dir, "ipipd.yaml")
	if err := os.Mkdir(e.runtime(), 0o700); err != nil {
		s.t.Fatal(err)
	}
	if e.log, err = os.OpenFile(s.logFile(name), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { e.log.Close() })
	e.ns.Sysctl("net.ipv4.ipfrag_time", "1") // else ICMP errors about lost fragments come 30 s later, between others
	e.port = newPort(e.ns, s.random(100, uint64(index)))
	netlab.Veth(s.t, e.ns, e.ns, netlab.End{Name: "other0"}, netlab.End{Name: "other1"}) // where addresses move to
	e.ns.Run("ip", "address", "add", fmt.Sprintf("192.0.2.%d/24", 1+index), "dev", "eth0")
	for _, local := range e.locals() {
		e.ns.Run("ip", "address", "add", local+"/32", "dev", "eth0")
	}
	e.write(tunnels, "")
	return e
}

// chaos makes the events of one round happen.
func (s *soak) chaos(round int, restarts bool) {
	random := s.random(200, uint64(round))
	s.logf("round %d: restarts %v", round, restarts)
	s.streams.Store(true)
	s.hostileOn.Store(true)
	for end := time.Now().Add(*soakRound); time.Now().Before(end) && !s.failed() && s.ctx.Err() == nil; {
		which := events[random.IntN(len(events))]
		e, own := s.ends[random.IntN(2)], s.random(random.Uint64())
		if which.restarts && !restarts || *soakOnly != "" && !slices.Contains(strings.Split(*soakOnly, ","), which.name) {
			continue
		}
		s.events[which.name]++
		s.logf("%s %s %s", e.name, which.name, which.do(e, own))
		time.Sleep(time.Duration(100+random.IntN(1500)) * time.Millisecond)
	}
	s.background.Wait()
	s.hostileOn.Store(false)
	s.streams.Store(false)
}

// calm undoes the events of a round, and compares counters and resources.
func (s *soak) calm(round int) {
	for _, e := range s.ends {
		e.restore()
	}
	time.Sleep(3 * time.Second) // by then packets that wait for a fragment, or for a neighbour, are given up
	for _, e := range s.ends {
		s.eventually("end "+e.name+" has its configuration", e.reconfigure)
	}
	s.eventually("every tunnel runs", func() error {
		for _, e := range s.ends {
			if err := e.healthy(); err != nil {
				return fmt.Errorf("end %s: %w", e.name, err)
			}
		}
		return s.pass()
	})
	for _, e := range s.ends {
		e.readLog()
	}
	if s.failed() {
		return
	}
	s.balance(fmt.Sprintf("round %d, clean", round), impairment{}, 50)
	s.balance(fmt.Sprintf("round %d, impaired", round), impairment{loss: 0.03, double: 0.02, reorder: 0.05, damage: 0.05, dataOnly: true}, 100)
	s.forge(round)
	for _, e := range s.ends {
		e.checkResources(round)
	}
}

// eventually waits until f returns nil.
func (s *soak) eventually(what string, f func() error) {
	var err error
	began := time.Now()
	if !netlab.WaitFor(func() bool { err = f(); return err == nil || s.failed() || s.ctx.Err() != nil }) || err != nil {
		s.failf("it did not come true within %v that %s: %v", time.Since(began), what, err)
		return
	}
	s.logf("calm: %s, after %v", what, time.Since(began).Round(time.Millisecond))
}

// pass sends packets over each flow, and fails with the flows that did not let one through.
func (s *soak) pass() error {
	ledger := s.ledger.Add(1)
	for _, c := range s.conversations {
		c.received[0].Store(0)
		c.received[1].Store(0)
	}
	var missing []string
	for range 10 {
		missing = nil
		for _, c := range s.conversations {
			for from := range 2 {
				if c.received[1-from].Load() == 0 {
					missing = append(missing, fmt.Sprintf("%s of %s", c.tunnel[from], s.ends[from].name))
					c.send(from, ledger, 100)
				}
			}
		}
		if missing == nil {
			return nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	return fmt.Errorf("nothing arrives of what is sent into %s", strings.Join(missing, ", "))
}

// stream sends packets of all sizes over all flows while streams is set.
func (s *soak) stream(stop <-chan struct{}) {
	random := s.random(300)
	for tick := time.NewTicker(10 * time.Millisecond); ; {
		select {
		case <-stop:
			tick.Stop()
			return
		case <-tick.C:
		}
		if !s.streams.Load() {
			for _, e := range s.ends {
				e.port.release()
			}
			continue
		}
		for _, c := range s.conversations {
			size := 40 + random.IntN(1300)
			if random.IntN(20) == 0 {
				size = random.IntN(4000)
			}
			c.send(random.IntN(2), 0, size)
		}
		for _, e := range s.ends {
			e.port.release()
		}
	}
}

func (s *soak) summary() {
	frames, lost := 0, 0
	for _, e := range s.ends {
		e.port.lock.Lock()
		frames, lost = frames+e.port.frames, lost+e.port.lost
		e.port.lock.Unlock()
	}
	names := []string{}
	total := 0
	for name, n := range s.events {
		names = append(names, fmt.Sprintf("%s %d", name, n))
		total += n
	}
	slices.Sort(names)
	s.logf("%d events: %s", total, strings.Join(names, ", "))
	hostile := int64(0)
	for k := range kinds {
		hostile += s.hostile[k].Load()
	}
	if s.logf("%d system calls failed by strace", s.injected.Load()); s.events["fault"] > 10 && s.injected.Load() == 0 {
		s.failf("strace had no system call fail")
	}
	s.logf("%d frames sent by the ends, of which %d lost; %d hostile packets: protocol 4 %d, 50 %d, UDP 500 %d, UDP 4500 %d", frames, lost, hostile,
		s.hostile[ipip].Load(), s.hostile[espPacket].Load(), s.hostile[ike].Load(), s.hostile[natt].Load())
}
