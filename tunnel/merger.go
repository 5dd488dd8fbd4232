package tunnel

import (
	"sync"

	"ipipd/fastpath"
	"ipipd/internal/rtnl"
)

// startMerging has TCP segments that the fast path receives put together, or sees that
// they still are.
func (t *Tunnel) startMerging() error {
	t.mu.Lock()
	near := t.fast.merger
	t.mu.Unlock()
	if near != 0 && t.host.mergerWorks(near) {
		return nil
	}
	t.stopMerging()
	near, err := t.host.holdMerger()
	if err != nil {
		return err
	}
	t.setMerger(near)
	t.log.Debug("TCP segments that the fast path receives are put together")
	return nil
}

// stopMerging ends that.
func (t *Tunnel) stopMerging() {
	if t.setMerger(0) {
		t.host.releaseMerger()
		t.log.Debug("TCP segments that the fast path receives are not put together any more")
	}
}

// setMerger has the fast path use the merger with that near end, or none, and reports
// whether it used another.
func (t *Tunnel) setMerger(near int) (another bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.fast.merger == near {
		return false
	}
	another = t.fast.merger != 0
	t.fast.merger = near
	t.followFast()
	return another
}

// merger is the process's, for all tunnels.
type merger struct {
	mu    sync.Mutex
	pair  *rtnl.Merger // nil while nobody uses it
	users int
	lost  uint64 // in pairs of earlier
}

// holdMerger is the near end of the merger, which is made for its first user.
func (h *Host) holdMerger() (near int, err error) {
	f, err := h.fastPath()
	if err != nil {
		return 0, err
	}
	m := &h.merger
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.pair != nil && !m.pair.Works() {
		h.closeMerger(f)
	}
	if m.pair == nil {
		pair, err := h.network.OpenMerger()
		if err != nil {
			return 0, err
		}
		if err := f.OpenMerger(fastpath.Merger{Near: pair.Near, Far: pair.Far, InFar: pair.InFar}); err != nil {
			_ = pair.Close()
			return 0, err
		}
		m.pair = pair
	}
	m.users++
	return m.pair.Near, nil
}

// mergerWorks reports whether the merger is still the one with that near end, and
// nobody took it away.
func (h *Host) mergerWorks(near int) bool {
	m := &h.merger
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.pair != nil && m.pair.Near == near && m.pair.Works()
}

// releaseMerger takes the merger away when its last user has gone.
func (h *Host) releaseMerger() {
	f, _ := h.fastPath() // without an error, or nobody had one
	m := &h.merger
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.users--; m.users == 0 {
		h.closeMerger(f)
	}
}

// closeMerger is for a caller who holds the merger's mu. Where one had to be replaced,
// and could not be, there is none.
func (h *Host) closeMerger(f *fastpath.FastPath) {
	m := &h.merger
	if m.pair == nil {
		return
	}
	if lost, err := m.pair.Drops(); err == nil {
		m.lost += lost
	}
	_ = f.CloseMerger() // both may fail if it has gone before
	_ = m.pair.Close()
	m.pair = nil
}

// mergeOverflows counts the packets that the mergers had no room for.
func (h *Host) mergeOverflows() uint64 {
	m := &h.merger
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.pair == nil {
		return m.lost
	}
	lost, _ := m.pair.Drops()
	return m.lost + lost
}
