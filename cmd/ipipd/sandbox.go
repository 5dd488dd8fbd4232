package main

import (
	"fmt"
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

// configFolder stays readable, if it is there, whatever the configuration: a later one may name files in it.
const configFolder = "/etc/ipipd"

// confine confines the process to what tunnels of configs may need from now on, and reports whether that includes
// eBPF. fastPath says whether the programs of the fast path are loaded.
func (p *process) confine(configs []tunnel.Config, fastPath bool) (ebpf bool) {
	_, _ = serviceuser.UID(), serviceuser.GID() // they are read now: files of later configurations may be the group's
	policy := p.sandboxPolicy(configs, fastPath)
	policy.Brokered = policy.Mode != sandbox.Off && p.notify.useBroker()
	state := sandbox.Enter(policy)
	p.sandbox.Store(state)
	for _, missing := range state.Missing {
		p.log.Warn("the sandbox is not whole", "missing", missing)
	}
	p.log.Debug("the sandbox is entered", "sandbox", state)
	return state.EBPF
}

// checkMarks fails if a tunnel of configs marks packets and the process has given up the capability to do so.
func checkMarks(s *sandbox.State, configs []tunnel.Config) error {
	if s == nil || !s.Brokered || slices.ContainsFunc(s.Capabilities, func(c sandbox.Capability) bool { return c.Name == "CAP_NET_RAW" }) {
		return nil
	}
	for i := range configs {
		if c := &configs[i]; c.FwMark != 0 && !c.Disabled {
			return fmt.Errorf("%s: fwmark: no tunnel had one when ipipd was started, so that under ipipd keep the process has no capability to mark packets: start it again", c.Name)
		}
	}
	return nil
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
		s.Marks = s.Marks || c.FwMark != 0
		s.Names = s.Names || err != nil && c.RemoteAddress != tunnel.AnyRemote
	}
	return s
}
