package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"path"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"ipipd/internal/privileged"
	"ipipd/internal/tunnel"
	"ipipd/tun"
)

// tunDevice says why /dev/net/tun cannot be opened.
func (e *examination) tunDevice() {
	misc := e.file("proc/misc")
	loads := misc != "" && !strings.Contains(misc+"\n", " tun\n") // to open it would load the module, which is for up to do
	_, err := fs.Stat(e.Files, "dev/net/tun")
	switch {
	case errors.Is(err, fs.ErrNotExist):
		err = syscall.ENOENT
	case loads && (slices.ContainsFunc(e.tunnels, (*subject).running) || e.moduleExists("tun")):
		return
	default:
		err = e.OpenTUN()
	}
	if f := tun.Missing(e.Files, err); f != nil {
		e.fault(nil, f)
	} else if err != nil {
		e.skip(nil, "/dev/net/tun cannot be opened: %v", err)
	}
}

// moduleExists reports whether the kernel has a module to load, or built in.
func (e *examination) moduleExists(name string) bool {
	dir := path.Join("lib/modules", e.file("proc/sys/kernel/osrelease"))
	for _, list := range []string{"modules.dep", "modules.builtin"} {
		if strings.Contains(e.file(dir+"/"+list), "/"+name+".ko") {
			return true
		}
	}
	return false
}

// capabilities says which capabilities that up needs this process lacks.
func (e *examination) capabilities() {
	if len(e.tunnels) > 0 && !slices.ContainsFunc(e.tunnels, func(s *subject) bool { return !s.running() }) {
		return // the running tunnels have what they need
	}
	effective, err := strconv.ParseUint(keyOf(strings.ReplaceAll(e.file("proc/self/status"), ":\t", "="), "CapEff"), 16, 64)
	if err != nil {
		e.skip(nil, "the capabilities are not known: %v", err)
		return
	}
	has := func(bit int) bool { return effective&(1<<bit) != 0 }
	const netBindService, netAdmin, netRaw, sysAdmin, bpf = 10, 12, 13, 21, 39 // linux/capability.h
	var lacks []string
	lack := func(bit int, name string) {
		if !has(bit) {
			lacks = append(lacks, name)
		}
	}
	lack(netAdmin, "CAP_NET_ADMIN")
	lack(netRaw, "CAP_NET_RAW")
	if slices.ContainsFunc(e.tunnels, func(s *subject) bool { return s.encrypted }) {
		lack(netBindService, "CAP_NET_BIND_SERVICE")
	}
	if len(lacks) > 0 {
		e.found(NoCapabilities, nil, "this user lacks "+strings.Join(lacks, ", "), "ipipd up fails as this user", privileged.Remedy)
	} else if !has(bpf) && !has(sysAdmin) {
		e.found(NoFastPathCapability, nil, "this user lacks CAP_BPF", "there is no fast path without", privileged.Remedy)
	}
}

// clock says if the clock was set back, or is not synchronized.
func (e *examination) clock() {
	now := e.Now()
	const slack = 2 * time.Second // LastHeard is as of an answer
	for _, s := range e.tunnels {
		future := s.Started
		if s.running() && s.Status.LastHeard.After(future) {
			future = s.Status.LastHeard
		}
		if ahead := future.Sub(now); ahead > slack {
			e.found(ClockJump, s, fmt.Sprintf("the clock was set back since the tunnel has run: by %v or more", ahead.Round(time.Second)),
				"times in print and in the log are wrong; the tunnel itself does not depend on the clock", "timedatectl")
		}
	}
	ok, err := e.ClockSynchronized()
	if err != nil {
		e.skip(nil, "whether the clock is synchronized is not known: %v", err)
	} else if !ok {
		e.found(ClockNotSynchronized, nil, "the clock follows no other (NTP)", "times in logs of both ends cannot be compared", "timedatectl set-ntp true, or chronyc tracking")
	}
}

// What `up` takes, measured with test/scale's configuration, in bytes.
const memoryProcess, memoryThread, memoryTunnel = 16 << 20, 9 << 20, 50 << 10

// limits says if the limit of open files, or of memory, is too low for the tunnels that do not run.
func (e *examination) limits() {
	var configs []tunnel.Config
	for _, s := range e.tunnels {
		if !s.running() { // a running one has what it needs
			configs = append(configs, s.Config)
		}
	}
	n := len(configs)
	if n == 0 {
		return
	}
	if limit, err := e.MaxFiles(); err != nil {
		e.skip(nil, "the limit of open files is not known: %v", err)
	} else if f := tunnel.TooFewFiles(configs, e.Threads, limit); f != nil {
		e.fault(nil, f)
	}
	memory := uint64(memoryProcess + memoryThread*e.Threads + n*memoryTunnel)
	if limit := e.memoryLimit(); limit < memory {
		e.found(TooLittleMemory, nil, fmt.Sprintf("%d tunnels need some %d MiB, and the limit of this cgroup is %d MiB", n, memory>>20, limit>>20),
			"the kernel kills ipipd", fmt.Sprintf("MemoryMax=%dM in the unit, or the container's limit", 2*memory>>20))
	}
}

// memoryLimit returns the lowest limit, in bytes, of this process's cgroups and those above them, of version 1 or 2.
func (e *examination) memoryLimit() uint64 {
	least := uint64(math.MaxUint64)
	for line := range strings.Lines(e.file("proc/self/cgroup")) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) != 3 || f[1] != "" && !slices.Contains(strings.Split(f[1], ","), "memory") {
			continue
		}
		top, name := "sys/fs/cgroup", "memory.max"
		if f[1] != "" {
			top, name = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
		}
		for dir := path.Join(top, path.Clean("/"+f[2])); strings.HasPrefix(dir, top); dir = path.Dir(dir) {
			if n, err := strconv.ParseUint(e.file(dir+"/"+name), 10, 64); err == nil {
				least = min(least, n)
			}
		}
	}
	return least
}
