package doctor

import (
	"strings"

	"ipipd/internal/sandbox"
)

// sandbox says what the sandbox of each running process lacks, and which capabilities the process keeps.
func (e *examination) sandbox() {
	said := map[string]bool{}
	for _, s := range e.tunnels {
		if s.running() && s.Status.Sandbox != nil && !said[s.Status.Sandbox.String()] {
			said[s.Status.Sandbox.String()] = true
			e.sandboxOf(s.Status.Sandbox)
		}
	}
}

func (e *examination) sandboxOf(s *sandbox.State) {
	const why = "who takes it over by a packet has what the sandbox would keep from them"
	switch {
	case s.Mode == sandbox.Off:
		e.found(SandboxNotWhole, nil, "a process of ipipd runs without a sandbox", why, "start it again without --sandbox off")
	case len(s.Missing) > 0:
		e.found(SandboxNotWhole, nil, "the sandbox of a process of ipipd is not whole: "+strings.Join(s.Missing, "; "), why,
			"a kernel with Landlock and seccomp, and landlock in lsm= where that is given")
	}
	if len(s.Capabilities) > 0 {
		var uses []string
		for _, c := range s.Capabilities {
			uses = append(uses, c.Name+" for "+c.Why)
		}
		e.found(CapabilitiesLeft, nil, "of a process of ipipd "+s.CapabilityClause(), strings.Join(uses, "; ")+": no other process does that for it",
			"nothing, or have it started by `ipipd keep -- ipipd up`, which does that for it, or with fewer capabilities, and it goes on with less")
	}
}
