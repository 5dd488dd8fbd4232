package confine

import (
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// keptCaps are the capabilities that a tunnel needs after its start: NET_ADMIN and BPF for
// routes, interfaces and eBPF programs when the underlay changes; NET_RAW, and
// NET_BIND_SERVICE for UDP port 500 (IKE), for new sockets when the local address changes.
//
// The fast path's programs load without PERFMON, too: the verifier then adds mitigations
// against speculative execution.
var keptCaps = []cap.Value{cap.NET_ADMIN, cap.NET_RAW, cap.NET_BIND_SERVICE, cap.BPF}

// Process drops all capabilities but keptCaps, and sets PR_SET_NO_NEW_PRIVS so that execve
// cannot regain them. A kept capability that the process lacks, unprivileged or in a
// container, is no error. Without CAP_SETPCAP the bounding set stays as it is.
func Process() error {
	if _, err := cap.Prctlw(unix.PR_SET_NO_NEW_PRIVS, 1); err != nil {
		return os.NewSyscallError("prctl PR_SET_NO_NEW_PRIVS", err)
	}
	have, want := cap.GetProc(), cap.NewSet()
	has := func(flag cap.Flag, v cap.Value) bool {
		set, err := have.GetFlag(flag, v)
		return err == nil && set
	}
	for v := range cap.MaxBits() {
		if slices.Contains(keptCaps, v) {
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
