package tunnel

import "errors"

// CloseTunnels closes tunnels together, so that the kernel waits once for all of their
// interfaces and not for each, and returns when no goroutine uses them any more. For those that are
// closed already, or by another call, it only waits.
func (e *Engine) CloseTunnels(tunnels ...*Tunnel) error {
	var closing []*Tunnel
	for _, t := range tunnels {
		if !t.closing.Swap(true) {
			closing = append(closing, t)
		}
	}
	// Unregister first, so that no receiver finds the tunnels. Control ends before the
	// interface, which it would report as gone.
	_ = e.register(nil, nil)
	for _, t := range closing {
		if t.others.Load() != nil {
			e.enterOthers(t, nil)
		}
	}
	e.updateReception(closing...)
	for _, t := range closing {
		t.cancel()
	}
	for _, t := range closing {
		t.loops.Wait()
		for _, stop := range t.stop { // before the file descriptors are closed
			stop()
		}
	}
	e.removeInterfaces(closing)
	var errs []error
	for _, t := range closing {
		t.dropDevice()
		errs = append(errs, t.device.Close())
		t.dropCounters()
		e.forget(t)
		e.sysctls.release(t) // once the interface does not have the address any more
		close(t.done)
	}
	for _, t := range tunnels {
		<-t.done
	}
	return errors.Join(errs...)
}

// forget removes a tunnel that is closed from those that Close waits for.
func (e *Engine) forget(t *Tunnel) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.live, t)
}

// removeInterfaces removes those interfaces of several tunnels that are in the network
// namespace of the Engine. Any others are removed by closing their devices, which has the
// kernel wait for each.
func (e *Engine) removeInterfaces(tunnels []*Tunnel) {
	if e.leaving.Load() {
		return
	}
	var devices []int
	for _, t := range tunnels {
		// Before Linux 5.2 State knows an interface by its name alone. One with another index
		// may be someone else's.
		if s, err := t.device.State(); err == nil && s.Index == t.madeIndex {
			devices = append(devices, s.Index)
		}
	}
	if len(devices) == 0 || len(devices) == 1 && e.manager == nil { // a manager has the fd, too: Close does not remove it
		return
	}
	if err := e.network.Remove(devices); err != nil {
		e.log.Debug("the interfaces are removed one by one", "err", err)
	}
}
