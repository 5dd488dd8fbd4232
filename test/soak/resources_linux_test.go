//go:build linux && soak

package soak

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// resources are what a process and its end have when all is calm.
type resources struct {
	goroutines, threads, descriptors int
	kinds                            map[string]int // descriptors by what they are
	resident, heap                   int            // bytes
	surroundings                     string
}

// sample has the resources of a process in one round.
type sample struct {
	end, pid, round int
	resources
}

func (e *end) resources() (r resources, err error) {
	pid := e.pid()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return r, err
	}
	field := func(name string) int {
		n, _ := strconv.Atoi(strings.TrimSpace(regexp.MustCompile(name + `:\s*(\d+)`).FindStringSubmatch(string(status) + name + ":0")[1]))
		return n
	}
	r.threads, r.resident = field("Threads"), field("VmRSS")*1024
	r.kinds = map[string]int{}
	links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	for _, name := range links {
		if to, err := os.Readlink(name); err == nil {
			r.kinds[regexp.MustCompile(`[:\d\[\]]+$`).ReplaceAllString(to, "")]++
			r.descriptors++
		}
	}
	body, err := e.scrape()
	if err != nil {
		return r, err
	}
	value := func(name string) int {
		m := regexp.MustCompile(`(?m)^` + name + ` (\S+)$`).FindStringSubmatch(body)
		if m == nil {
			return -1
		}
		f, _ := strconv.ParseFloat(m[1], 64)
		return int(f)
	}
	r.goroutines, r.heap = value("go_goroutines"), value("go_memstats_heap_alloc_bytes")
	r.surroundings = e.surroundings()
	return r, nil
}

// scrape returns the metrics.
func (e *end) scrape() (string, error) {
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", e.metrics())
	}}}
	response, err := client.Get("http://localhost/metrics")
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("metrics: %s", response.Status)
	}
	return string(body), err
}

// surroundings returns interfaces, addresses, routes, rules and eBPF programs of the end, in text.
func (e *end) surroundings() string {
	var all []string
	for _, line := range strings.Split(e.try("ip -o -br link")+"\n"+e.try("ip -o -br address"), "\n") {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		// Not the state, which may lag, the MAC address and the flags.
		addresses := fields[2:]
		if strings.ContainsAny(strings.Join(addresses, ""), "<") {
			addresses = nil
		}
		slices.Sort(addresses)
		all = append(all, strings.TrimSpace(fields[0]+" "+strings.Join(addresses, " ")))
	}
	routes := strings.Split(e.try("ip route show table all"), "\n")
	for _, line := range append(routes, strings.Split(e.try("ip rule"), "\n")...) {
		all = append(all, strings.TrimSpace(strings.ReplaceAll(line, " linkdown", "")))
	}
	e.ns.Do(func() {
		ifi, err := net.InterfaceByName("eth0")
		if err != nil {
			return
		}
		for _, attach := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
			if programs, err := link.QueryPrograms(link.QueryOptions{Target: ifi.Index, Attach: attach}); err == nil && len(programs.Programs) > 0 {
				all = append(all, fmt.Sprintf("%v: %d", attach, len(programs.Programs)))
			}
		}
	})
	for _, t := range e.tunnels {
		if !t.fastPath { // once there, the program stays, and does nothing: docs/fast-path.md
			continue
		}
		if n := strings.Count(e.try("tc filter show dev "+t.name+" egress"), "direct-action"); n > 0 {
			all = append(all, fmt.Sprintf("%s has %d programs", t.name, n))
		}
	}
	slices.Sort(all)
	return strings.Join(slices.Compact(all), "\n")
}

// checkResources compares the resources with those at the first calm time of the same process.
func (e *end) checkResources(round int) {
	var now resources
	e.s.eventually("end "+e.name+" has no goroutine, descriptor, route, program or interface too many", func() (err error) {
		if now, err = e.resources(); err != nil {
			return err
		}
		pid := e.pid()
		first, ok := e.first[pid]
		if !ok {
			// A scrape counts its own goroutines, whose number varies: keep the highest.
			for range 20 {
				again, err := e.resources()
				if err != nil {
					return err
				}
				now.goroutines = max(now.goroutines, again.goroutines)
			}
			e.first[pid] = now
			return nil
		}
		if now.goroutines > first.goroutines || now.descriptors > first.descriptors {
			return fmt.Errorf("%d goroutines, %d before; %d descriptors %v, %d before %v", now.goroutines, first.goroutines, now.descriptors, now.kinds, first.descriptors, first.kinds)
		}
		if now.surroundings != first.surroundings {
			return fmt.Errorf("around it there is\n%s\nand before\n%s", now.surroundings, first.surroundings)
		}
		return nil
	})
	e.s.logf("end %s: process %d, %d goroutines, %d threads, %d descriptors, %.1f MiB resident, %.1f MiB of heap", e.name, e.pid(), now.goroutines, now.threads, now.descriptors,
		float64(now.resident)/(1<<20), float64(now.heap)/(1<<20))
	e.s.samples = append(e.s.samples, sample{e.index, e.pid(), round, now})
}

// leastSamples is how many calm times a process must have lived for slope to look at its memory.
const leastSamples = 6

// slope compares the memory of each process with leastSamples: the first calm times, after those in
// which its buffers are made, with the last.
func (s *soak) slope() {
	const warm = 2
	for _, e := range s.ends {
		byPID := map[int][]sample{}
		for _, one := range s.samples {
			if one.end == e.index {
				byPID[one.pid] = append(byPID[one.pid], one)
			}
		}
		judged := false
		for pid, all := range byPID {
			if len(all) < leastSamples {
				continue
			}
			judged = true
			all = all[warm:]
			third := max(1, len(all)/3)
			early, late := lowest(all[:third]), lowest(all[len(all)-third:])
			s.logf("end %s: process %d: %.1f MiB resident, and after %d rounds %.1f MiB", e.name, pid, float64(early)/(1<<20), len(all), float64(late)/(1<<20))
			if late > early+early/4+(8<<20) {
				s.failf("end %s: the memory of process %d grows", e.name, pid)
			}
		}
		if !judged {
			s.failf("end %s: no process was there for %d calm times: nothing can be said about its memory", e.name, leastSamples)
		}
	}
}

func lowest(all []sample) int {
	return slices.MinFunc(all, func(a, b sample) int { return a.resident - b.resident }).resident
}
