package confine

import (
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// kept are the capabilities that a tunnel needs after its start: routes, interfaces
// and programs on them follow the underlay (NET_ADMIN, BPF); sockets are opened anew for
// another local address (NET_RAW, and NET_BIND_SERVICE for UDP 500 of IKE).
//
// PERFMON is not among them: without it the verifier guards the fast path's programs
// against speculation, if they are loaded only later, and takes them all the same.
var kept = []cap.Value{cap.NET_ADMIN, cap.NET_RAW, cap.NET_BIND_SERVICE, cap.BPF}

// Process gives up every capability but those that a tunnel needs, and with
// PR_SET_NO_NEW_PRIVS the means to get others by executing a file. What the process has
// not got, as an unprivileged one or in a container, is not missed: there is no error
// for it. The bounding set needs CAP_SETPCAP, and stays as it is without.
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
		if slices.Contains(kept, v) {
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
	// Nothing is inheritable, and with that nothing is ambient.
	return os.NewSyscallError("capset", want.SetProc())
}
