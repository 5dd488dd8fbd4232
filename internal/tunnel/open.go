package tunnel

import (
	"errors"

	"ipipd/internal/ipsec"
	"ipipd/tun"
)

// All that a tunnel needs for its life is opened when it starts, so that it goes on on a host
// without a descriptor left, and in a process that may open nothing. NewEngine opens what all
// tunnels share: the sockets of packages underlay and netstate, and the workers. Apply opens the
// rest: openShared below, the TUN device, the UDP ports of IKE and the links of the fast path, which need
// the route. Where a change needs others later, there is a spare, or it goes on with less;
// docs/security.md lists these.

// openShared opens what cfg asks for of the process, unless an earlier tunnel has: the eBPF programs,
// and the manager of IKE and ESP.
func (e *Engine) openShared(t *Tunnel, cfg *Config) (manager *ipsec.Manager) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if cfg.FastPathAllowed() {
		if e.fastPath == nil && e.fastPathErr == nil {
			e.fastPath, e.fastPathErr = e.openFastPath()
		}
		if t.fast.programs == nil { // else poll may be reading it
			t.fast.programs, t.fast.programsErr = e.fastPath, e.fastPathErr
		}
	}
	if cfg.IPsec.Wanted() && e.ipsec == nil {
		e.openIPsec()
	}
	return e.ipsec
}

// errConfined is why a tunnel has no fast path in a confined process that was started without the eBPF programs.
var errConfined = errors.New("no tunnel could have it when ipipd was started, so that the sandbox lets this process load no eBPF programs: start ipipd again")

// hasFastPath reports whether the programs are loaded.
func (e *Engine) hasFastPath() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.fastPath != nil
}

// confineOnce calls Confine, unless it was called.
func (e *Engine) confineOnce() {
	confine := e.confine
	if confine == nil {
		return
	}
	e.confine = nil
	tun.LoadQueueSelector() // for later tunnels
	ebpf := confine(e.hasFastPath())
	e.mu.Lock()
	defer e.mu.Unlock()
	if !ebpf && e.fastPath == nil && e.fastPathErr == nil {
		e.fastPathErr = errConfined
	}
}
