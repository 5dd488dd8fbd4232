package tunnel

import (
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strings"
	"time"

	"ipipd/internal/fastpath"
	"ipipd/internal/handover"
	"ipipd/internal/ipsec"
	"ipipd/tun"
)

// What outlives the process is given to EngineOptions.Manager as soon as it is made: the queues of
// each interface, under a name derived from the tunnel's, the sockets that receive, and what the fast
// path goes on with (fastpath.Options). The next Engine takes them from EngineOptions.Kept: an interface when
// it would make one for the tunnel of that name, so that all else is as at any start, but that addresses and
// routes are there already. Until takeOverFastPath the kernel carries packets by the programs and maps of the
// process before.

const (
	keptQueues = "tun-"     // then the interface's name, or = and a hash
	keptSocket = "receive-" // then the socket's cookie
	keptIPsec  = "ipsec-"   // then the socket's cookie
	keptState  = "sas"      // the memory in which package ipsec saves SAs
)

// keptLength is how many packets each queue of an interface holds while no process reads it: those of one
// second at 2,000 a second.
const keptLength = 2000

// KeptName returns the name under which the Manager has the TUN queues of a tunnel with that Config.Name.
func KeptName(name string) string {
	plain := func(r rune) bool {
		return r < 0x7f && (r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-_.", r))
	}
	if link := InterfaceName(name); strings.IndexFunc(link, func(r rune) bool { return !plain(r) }) < 0 {
		return keptQueues + link
	}
	sum := sha256.Sum256([]byte(name))
	return keptQueues + "=" + hex.EncodeToString(sum[:8]) // no link has that name
}

// takeKeptSockets returns the sockets of the process before that are kept under names with a prefix.
func takeKeptSockets(kept handover.Kept, prefix string) (fds []int) {
	for _, name := range kept.Names() {
		if strings.HasPrefix(name, prefix) {
			fds = append(fds, kept.Take(name)...)
		}
	}
	return fds
}

// keepSocket and dropSocket are underlay.SocketOptions.Opened and Closed.
func (e *Engine) keepSocket(fd int) { e.keep(socketName(keptSocket, fd), fd) }

func (e *Engine) dropSocket(fd int) { e.drop(socketName(keptSocket, fd)) }

func (e *Engine) keep(name string, fd int) {
	if err := e.manager.Store(name, fd); err != nil {
		e.notKept("a socket", err)
	}
}

func (e *Engine) drop(name string) {
	if err := e.manager.Remove(name); err != nil {
		e.log.Warn("a socket stays open at the service manager for now", "err", err)
	}
}

// openIPsec makes the ipsec.Manager, with the sockets and the SAs of the process before.
func (e *Engine) openIPsec() {
	o := ipsec.Options{Serve: e.serveESP, Dropped: e.dropPacket}
	if e.manager != nil {
		e.state = e.openState()
		o.State, o.Adopt, o.Held = e.state, takeKeptSockets(e.kept, keptIPsec), e.leaving.Load()
		o.Opened = func(fd int) { e.keep(socketName(keptIPsec, fd), fd) }
		o.Closed = func(fd int) {
			e.drop(socketName(keptIPsec, fd))
			_ = e.manager.Sync(time.Second) // else its port is still taken
		}
	}
	e.ipsec = ipsec.NewManager(o)
}

// openState takes over the memory with the SAs of the process before, or makes an empty one; nil if both fail.
func (e *Engine) openState() *handover.State {
	fds := e.kept.Take(keptState)
	if len(fds) == 1 {
		state, err := handover.AdoptState(fds[0])
		if err == nil {
			if state.Damaged > 0 {
				e.log.Warn("SAs of the process before are not used, as what is kept of them is damaged", "tunnels", state.Damaged)
			}
			return state
		}
		e.log.Warn("the SAs of the process before are not used, and new ones are negotiated", "err", err)
	}
	if len(fds) > 0 {
		_ = e.manager.Discard(handover.Kept{keptState: fds})
	}
	state, err := handover.NewState()
	if err == nil {
		err = e.manager.Store(keptState, state.FD())
	}
	if err != nil {
		e.log.Warn("SAs do not outlive this process: a restart negotiates anew", "err", err)
	}
	return state
}

// beginIPsec has package ipsec begin to receive, and warns of SAs of the process before that are of no tunnel.
func (e *Engine) beginIPsec() error {
	e.mu.Lock()
	manager := e.ipsec
	e.mu.Unlock()
	if manager == nil {
		return nil
	}
	unused, err := manager.Begin()
	for _, pair := range unused {
		e.log.Warn("the SAs of the process before are not used: no tunnel with a secret has their addresses", "between", pair)
	}
	return err
}

// closeState closes the memory of the SAs. The last thread has ended.
func (e *Engine) closeState() error {
	if e.state == nil {
		return nil
	}
	if !e.leaving.Load() {
		_ = e.manager.Remove(keptState)
	}
	return e.state.Close()
}

func (e *Engine) notKept(what string, err error) {
	e.log.Warn(what+" does not outlive this process: a restart interrupts it", "err", err)
}

// adoptOrOpen takes over the interface of the process before, or makes one.
func (c *control) adoptOrOpen(o tun.Options) (device tun.Device, err error) {
	e, name := c.engine, KeptName(c.cfg.Name)
	c.adopted = false
	if fds := e.kept.Take(name); len(fds) > 0 {
		adopt := o
		if c.cfg.MTU == 0 { // the MTU stays until control's first round: its value depends on the SAs
			adopt.MTU = 0
		}
		if device, err = tun.Adopt(fds, adopt); err == nil {
			c.adopted = true
			return device, nil
		}
		c.log.Warn("the interface is made anew", "err", err)
		if programs := e.programs(); programs != nil { // else the old ones redirect packets to an interface that is gone
			programs.Switch()
		}
		_ = e.manager.Discard(handover.Kept{name: fds})
		_ = e.manager.Sync(time.Second) // else its name is still taken
	}
	if e.manager != nil {
		o.QueueLength = keptLength
	}
	if device, err = e.openDevice(o); err != nil || e.manager == nil {
		return device, err
	}
	var fds []int
	for _, q := range device.Queues() {
		fds = append(fds, q.FD())
	}
	if err := e.manager.Store(name, fds...); err != nil {
		e.notKept(device.Name(), err)
	}
	return device, nil
}

// adoptCarrier sets the carrier of an interface of the process before, once it is known whether there are SAs: without
// a carrier for a moment the kernel would drop what waits in its queues.
func (c *control) adoptCarrier() {
	if c.adopted {
		c.carrier = !c.running() // how that process left it is not known: set it in any case
		c.updateCarrier()
	}
}

// routesWithin limits how long awaitRoutes waits.
const routesWithin = 2 * time.Second

// awaitRoutes waits until the routes out of interfaces of the process before are known: packets that wait in
// their queues and in the sockets are sent, or refused, by them. Then it restores the SAs with the remotes.
func awaitRoutes(tunnels []*control) {
	late := time.After(routesWithin)
	for _, c := range tunnels {
		if c.many == nil || !c.adopted {
			continue
		}
		select {
		case <-c.many.present():
			c.restoreRemotes(time.Now())
		case <-late:
			return
		}
	}
}

// dropDevice has the service manager close its descriptors of a device that is to be closed.
func (t *Tunnel) dropDevice() {
	if t.engine.leaving.Load() {
		return
	}
	if err := t.engine.manager.Remove(KeptName(t.config.Load().Name)); err != nil {
		t.log.Warn("the interface stays at the service manager", "err", err)
	}
}

// programs returns the loaded eBPF programs of the fast path; nil if there are none.
func (e *Engine) programs() *fastpath.FastPath {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.fastPath
}

// loadFastPath is fastpath.Open, with what the process before has left.
func (e *Engine) loadFastPath() (*fastpath.FastPath, error) {
	return fastpath.Open(fastpath.Options{Manager: e.manager, Kept: e.kept, Anew: e.ledger != nil && e.ledger.anew, Cold: func(what string, err error) {
		e.log.Warn("the fast path begins anew", "with", what, "err", err)
	}})
}

// takeOverFastPath has the programs of this process carry packets in the place of those of the process before,
// once the maps of this process are filled, after routesWithin at the latest.
func (e *Engine) takeOverFastPath(tunnels []*control) {
	programs := e.programs()
	if programs == nil {
		return
	}
	var adopted []*control
	wait := true
	for _, c := range tunnels {
		if c.adopted && c.fast.programs != nil {
			adopted = append(adopted, c)
		}
		wait = wait && c.config.Load().FastPathAllowed() // else the old programs carry what must not be any more
	}
	for late := time.Now().Add(routesWithin); wait && time.Now().Before(late); time.Sleep(time.Millisecond) {
		// The answers about many remotes come one by one.
		wait = slices.ContainsFunc(adopted, func(c *control) bool { return c.many != nil && !c.fast.active() })
	}
	programs.Switch()
	for _, c := range adopted {
		done := make(chan struct{})
		take := func(c *control) {
			defer close(done)
			if c.interfacePresent() && c.cfg.FastPathAllowed() { // even if something blocks the fast path now
				if err := c.attachEncap(); err != nil {
					c.log.Debug("the eBPF program of the process before is not replaced", "err", err)
				}
			}
			c.syncFastPath()
		}
		select {
		case c.events <- take:
		case <-c.done:
			continue
		}
		select {
		case <-done:
		case <-c.done:
		}
	}
}

// Leave is Close, but leaves interfaces, sockets, SAs and the fast path to the next process, as far as the
// Manager has them.
func (e *Engine) Leave() error {
	e.leaving.Store(true)
	if programs := e.programs(); programs != nil {
		programs.Leave()
	}
	return e.Close()
}
