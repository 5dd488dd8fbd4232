package main

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"ipipd/internal/config"
	"ipipd/internal/sandbox"
	"ipipd/internal/serviceuser"
	"ipipd/internal/tunnel"
)

// configFolder is readable, if it is there, whatever the configuration: later ones name files in it.
const configFolder = "/etc/ipipd"

// confine confines the process to what tunnels of configs may need from now on, and reports whether that is
// eBPF. fastPath says whether the programs of the fast path are loaded.
func (p *process) confine(configs []tunnel.Config, fastPath bool) (ebpf bool) {
	_, _ = serviceuser.UID(), serviceuser.GID() // they are read now: files of later configurations may be the group's
	state := sandbox.Enter(p.sandboxPolicy(configs, fastPath))
	p.sandbox.Store(state)
	for _, missing := range state.Missing {
		p.log.Warn("the sandbox is not whole", "missing", missing)
	}
	p.log.Debug("the sandbox is entered", "sandbox", state)
	return state.EBPF
}

func (p *process) sandboxPolicy(configs []tunnel.Config, fastPath bool) sandbox.Policy {
	o := p.options
	s := sandbox.Policy{
		Mode: o.Sandbox, RuntimeDir: o.RuntimeDir, Sysctls: o.ManageSysctls,
		EBPF:            fastPath || slices.ContainsFunc(configs, func(c tunnel.Config) bool { return c.Disabled && c.FastPathAllowed() }),
		AbstractSockets: p.notify.abstract(),
	}
	if info, err := os.Stat(configFolder); err == nil && info.IsDir() {
		s.Read = append(s.Read, configFolder)
	}
	if file, ok := strings.CutPrefix(o.MetricsAddress, "unix:"); ok {
		s.Remove = append(s.Remove, filepath.Dir(file))
	}
	for _, path := range o.Paths {
		if path != config.Stdin {
			s.Read = append(s.Read, path)
		}
	}
	for i := range configs {
		c := &configs[i]
		if c.IPsec.SecretFile != "" {
			s.Read = append(s.Read, c.IPsec.SecretFile)
		}
		_, err := netip.ParseAddr(c.RemoteAddress)
		s.Names = s.Names || err != nil && c.RemoteAddress != tunnel.AnyRemote
	}
	return s
}
