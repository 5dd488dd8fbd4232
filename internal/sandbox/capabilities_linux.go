package sandbox

import (
	"cmp"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// needed are the capabilities that a process keeps, and what for. Without a broker, which would do it for the
// process, it needs them for all that may change while it runs.
//
// The fast path's programs load without PERFMON, too: the verifier then adds mitigations
// against speculative execution.
var needed = []struct {
	cap.Value
	why string
	by  func(p *Policy) bool
}{
	{cap.NET_BIND_SERVICE, "UDP port 500 (IKE) of a tunnel or local address that is new", alone},
	{cap.NET_ADMIN, "interfaces, addresses and routes; packet filters and IPsec policies, which the fast path and the link layer must not bypass", alone},
	{cap.NET_ADMIN, "the mark of each packet (fwmark), which takes it before Linux 5.17", func(p *Policy) bool { return p.Brokered && p.Marks && !rawMarks() }},
	{cap.NET_ADMIN, "sysctls (manage-sysctls), which only root sets without it", func(p *Policy) bool { return p.Brokered && p.Sysctls && os.Geteuid() != 0 }},
	{cap.NET_RAW, "raw sockets of a local address that is new", alone},
	{cap.NET_RAW, "the mark of each packet (fwmark)", func(p *Policy) bool { return p.Brokered && p.Marks }},
	{cap.BPF, "the fast path's programs, on an underlay device that is new", func(p *Policy) bool { return alone(p) && (p.EBPF || p.Mode == Off) }},
}

// alone reports whether the process does everything itself, without a broker.
func alone(p *Policy) bool { return !p.Brokered }

// rawMarks reports whether NET_RAW is enough to mark packets, as from Linux 5.17 on, and NET_ADMIN is not needed.
func rawMarks() bool {
	var uname unix.Utsname
	var major, minor int
	if unix.Uname(&uname) != nil {
		return false
	}
	if _, err := fmt.Sscanf(unix.ByteSliceToString(uname.Release[:]), "%d.%d", &major, &minor); err != nil {
		return false
	}
	return major > 5 || major == 5 && minor >= 17
}

// keeps returns what a process of p keeps v for, if it has it; "" if it drops v.
func keeps(p *Policy, v cap.Value) (why string) {
	for _, n := range needed {
		if n.Value == v && n.by(p) {
			return n.why
		}
	}
	return ""
}

// setNoNewPrivs makes execve(2) grant no privileges.
func setNoNewPrivs() error {
	_, err := cap.Prctlw(unix.PR_SET_NO_NEW_PRIVS, 1)
	return os.NewSyscallError("prctl PR_SET_NO_NEW_PRIVS", err)
}

// dropCapabilities drops all that p does not keep. One that is kept and that the process lacks,
// unprivileged or in a container, is no error. Without CAP_SETPCAP the bounding set stays as it is.
func dropCapabilities(p Policy) error {
	have, want := cap.GetProc(), cap.NewSet()
	has := func(flag cap.Flag, v cap.Value) bool {
		set, err := have.GetFlag(flag, v)
		return err == nil && set
	}
	for v := range cap.MaxBits() {
		if keeps(&p, v) != "" {
			for _, flag := range []cap.Flag{cap.Permitted, cap.Effective} {
				if err := want.SetFlag(flag, has(flag, v), v); err != nil {
					return fmt.Errorf("%v: %w", v, err)
				}
			}
		} else if has(cap.Effective, cap.SETPCAP) {
			if err := cap.DropBound(v); err != nil {
				return os.NewSyscallError("prctl PR_CAPBSET_DROP", err)
			}
		}
	}
	// An empty inheritable set empties the ambient set.
	return os.NewSyscallError("capset", want.SetProc())
}

// capabilitiesLeft returns the capabilities that the process has now, and what for.
func capabilitiesLeft(p Policy) []Capability {
	left, have := []Capability{}, cap.GetProc()
	for v := range cap.MaxBits() {
		if set, err := have.GetFlag(cap.Permitted, v); err != nil || !set {
			continue
		}
		why := cmp.Or(keeps(&p, v), "it could not be dropped")
		left = append(left, Capability{strings.ToUpper(v.String()), why})
	}
	return left
}
