package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// setting has the parameters of a row.
type setting struct {
	Tunnels   int
	FastPath  bool
	Keepalive string
	// Idle is how long the tunnels are watched doing nothing.
	Idle time.Duration
}

// result has the figures of a row.
type result struct {
	// Start is the time until all tunnels carry packets, on the fast path if they may have it. Change
	// is the time to apply the same configurations with one property of one changed.
	Start, Change, Close time.Duration
	// Resident is memory in bytes, Threads of the process, once all tunnels run.
	Resident, Threads int
	// Processor is the share of one processor that idle tunnels take, Wakes how often in
	// a second a thread of the process goes on after waiting.
	Processor, Wakes float64
}

func main() {
	if len(os.Args) > 2 {
		switch os.Args[1] {
		case "row":
			exit(row(os.Args[2]))
		case "hub":
			exit(hub(os.Args[2]))
		case "far":
			exit(far(os.Args[2], os.Args[3]))
		case "seen":
			exit(seeingHub(os.Args[2]))
		case "seenfar":
			exit(seeingFar(os.Args[2], os.Args[3], os.Args[4]))
		}
	}
	tunnels := flag.String("tunnels", "1,10,100,1000", "numbers of tunnels")
	paths := flag.String("paths", "userspace,fast", "data paths")
	keepalives := flag.String("keepalive", "off;10s,10", "keepalives, separated by semicolons")
	idle := flag.Duration("idle", 10*time.Second, "how long idle tunnels are watched")
	var s manySetting
	flag.StringVar(&s.Binary, "many", "", "measure an interface with many remotes instead, with this ipipd")
	flag.IntVar(&s.Prefixes, "prefixes", 10000, "prefixes, with -many")
	flag.IntVar(&s.Remotes, "remotes", 1000, "remotes, with -many")
	flag.BoolVar(&s.Fast, "fast", false, "by the fast path, with -many")
	flag.IntVar(&s.Rounds, "rounds", 5, "rounds, with -many and -seeing")
	flag.DurationVar(&s.For, "for", 2*time.Second, "how long each figure is measured, with -many and -seeing")
	var seen seeingSetting
	flag.StringVar(&seen.Binary, "seeing", "", "measure what a capture, a monitor and a scrape cost a tunnel instead, with this ipipd")
	flag.StringVar(&seen.Capture, "capture", "", "flags of ipipd capture, with -seeing")
	flag.BoolVar(&seen.Monitor, "monitor", true, "monitor and scrape, with -seeing")
	flag.Parse()
	if seen.Binary != "" {
		seen.Rounds, seen.For = s.Rounds, s.For
		exit(seeing(seen))
	}
	if s.Binary != "" {
		exit(many(s))
	}
	exit(table(strings.Split(*tunnels, ","), strings.Split(*paths, ","), strings.Split(*keepalives, ";"), *idle))
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "scale:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// table prints a row for each combination.
func table(tunnels, paths, keepalives []string, idle time.Duration) error {
	fmt.Println("| tunnels | path | keepalive | start, s | change one, s | close, s | resident, MiB | threads | idle, % of a processor | wake-ups a second |")
	fmt.Println("| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
	for _, n := range tunnels {
		count, err := strconv.Atoi(n)
		if err != nil || count < 1 {
			return fmt.Errorf("-tunnels: %q is not a number of tunnels", n)
		}
		for _, path := range paths {
			if path != "userspace" && path != "fast" {
				return fmt.Errorf("-paths: %q is neither userspace nor fast", path)
			}
			for _, keepalive := range keepalives {
				r, err := run(setting{count, path == "fast", keepalive, idle})
				if err != nil {
					return fmt.Errorf("%s tunnels, %s, keepalive %s: %w", n, path, keepalive, err)
				}
				fmt.Printf("| %d | %s | %s | %.2f | %.3f | %.2f | %.0f | %d | %.2f | %.1f |\n", count, path, keepalive,
					r.Start.Seconds(), r.Change.Seconds(), r.Close.Seconds(), float64(r.Resident)/(1<<20), r.Threads, 100*r.Processor, r.Wakes)
			}
		}
	}
	return nil
}

// run measures a row in a process with a network namespace of its own.
func run(s setting) (r result, err error) {
	text, err := json.Marshal(s)
	if err != nil {
		return r, err
	}
	self, err := os.Executable()
	if err != nil {
		return r, err
	}
	cmd := exec.Command(self, "row", string(text))
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.Output()
	if errors.Is(err, syscall.EPERM) {
		return r, fmt.Errorf("cannot make a network namespace: %w: run it as root", err)
	}
	if err != nil {
		return r, err
	}
	return r, json.Unmarshal(out, &r)
}

// usage is what /proc knows of this process.
type usage struct {
	resident, threads int
	processor         time.Duration
	wakes             uint64 // voluntary context switches of its threads
}

func measure() (u usage, err error) {
	status, err := fields("/proc/self/status")
	if err != nil {
		return u, err
	}
	if u.resident, err = strconv.Atoi(strings.TrimSuffix(status["VmRSS"], " kB")); err != nil {
		return u, err
	}
	u.resident *= 1024
	if u.threads, err = strconv.Atoi(status["Threads"]); err != nil {
		return u, err
	}
	var times syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &times); err != nil {
		return u, err
	}
	u.processor = time.Duration(times.Utime.Nano() + times.Stime.Nano())
	u.wakes = uint64(times.Nvcsw)
	return u, nil
}

// fields reads a file of lines "name: value".
func fields(name string) (map[string]string, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	values := map[string]string{}
	for lines := bufio.NewScanner(f); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), ":")
		values[name] = strings.TrimSpace(value)
	}
	return values, nil
}
