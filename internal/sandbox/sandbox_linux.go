package sandbox

import (
	"fmt"
	"time"
)

// Enter confines the process to p, for good. It is called once.
func Enter(p Policy) *State {
	s := &State{Mode: p.Mode, EBPF: p.EBPF || p.Mode == Off, Brokered: p.Brokered}
	missing := func(what string, err error) {
		if err != nil {
			s.Missing = append(s.Missing, fmt.Sprintf("%s: %v", what, err))
		}
	}
	_, _ = time.Now().Zone() // reads /etc/localtime
	err := setNoNewPrivs()
	missing("no_new_privs", err)
	s.NoNewPrivs = err == nil
	// Capabilities are dropped before seccomp, which refuses capset, but after Landlock, which may need some to open a path.
	if p.Mode != Off {
		s.Landlock, s.Read, err = restrictFiles(p)
		missing("landlock", err)
	}
	missing("capabilities", dropCapabilities(p))
	s.Capabilities = capabilitiesLeft(p)
	if p.Mode != Off {
		err = restrictCalls(p)
		missing("seccomp", err)
		s.Seccomp = err == nil
	}
	return s
}
