package ipsec

import (
	"fmt"
	"maps"
	"net/netip"
	"sync/atomic"

	"ipipd/internal/ipsec/ike"
)

// Listener keeps the sockets of a local address open for a tunnel with many remotes, whose Sessions begin when
// a remote is heard.
type Listener struct {
	manager *Manager
	local   netip.Addr
	ports   *ports
	wanted  func(remote netip.Addr, esp bool) bool
	closed  atomic.Bool
}

// listeners is copied on write: the data path reads it.
type listeners map[netip.Addr]*Listener

const (
	// maxFirst limits the length in bytes of a first IKE message that is kept until its Session
	// exists. Most have some hundred bytes.
	maxFirst = 4096
	// maxFirsts limits the number of messages that are kept.
	maxFirsts = 1024
)

// Listen opens the sockets of a local address, as Protect does. wanted is called with each remote without a
// Session that begins to negotiate or, if esp is set, sends ESP with an unknown SPI, most likely by an SA of the
// process before. Anybody can forge the remote's address. If wanted returns true, the caller is about to call
// Protect for the remote: its IKE message is kept for that. wanted must not block.
func (m *Manager) Listen(local netip.Addr, mark uint32, device int, wanted func(remote netip.Addr, esp bool) bool) (*Listener, error) {
	m.socketsMu.Lock()
	defer m.socketsMu.Unlock()
	m.mu.Lock()
	defer m.mu.Unlock()
	local = local.Unmap()
	old := *m.listeners.Load()
	if old[local] != nil {
		return nil, fmt.Errorf("another tunnel with many remotes is protected at %s already", local)
	}
	p, err := m.acquireLocked(portsKey{local, mark, device})
	if err != nil {
		return nil, err
	}
	l := &Listener{manager: m, local: local, ports: p, wanted: wanted}
	next := maps.Clone(old)
	next[local] = l
	m.listeners.Store(&next)
	_ = m.spares.fill() // after an error bind opens them
	return l, nil
}

// Close closes the sockets, unless a Session uses them.
func (l *Listener) Close() {
	if l.closed.Swap(true) {
		return
	}
	m := l.manager
	m.mu.Lock()
	next := maps.Clone(*m.listeners.Load())
	delete(next, l.local)
	m.listeners.Store(&next)
	maps.DeleteFunc(m.firstMessages, func(key tunnelKey, _ datagram) bool { return key.local == l.local })
	_ = m.restrictESPLocked() // an optimization, as in Protect
	m.mu.Unlock()
	m.release(l.ports)
}

// wants asks the Listener of a local address, if there is one, whether it wants a remote without a Session.
func (m *Manager) wants(key tunnelKey, esp bool) bool {
	l := (*m.listeners.Load())[key.local]
	return l != nil && l.wanted(key.remote, esp)
}

// keepFirst asks wants about the sender of a first IKE message, a copy of which is kept for Protect if it is wanted.
func (m *Manager) keepFirst(key tunnelKey, d datagram) {
	if len(d.payload) > maxFirst || !ike.IsFirstMessage(d.payload) || !m.wants(key, false) {
		return
	}
	d.payload = append([]byte(nil), d.payload...)
	m.mu.Lock()
	defer m.mu.Unlock()
	if n := m.negotiators[key]; n != nil {
		n.receive(d)
	} else if (*m.listeners.Load())[key.local] != nil {
		if _, kept := m.firstMessages[key]; !kept && len(m.firstMessages) >= maxFirsts {
			for other := range m.firstMessages { // forged sources are not to keep others out
				delete(m.firstMessages, other)
				break
			}
		}
		m.firstMessages[key] = d
	}
}

// Demand makes a Session with Config.OnDemand negotiate: there are packets to send and no SA. It does
// not block, and may be called for every such packet.
func (s *Session) Demand() {
	if s.demanded.Load() || s.demanded.Swap(true) {
		return
	}
	select {
	case s.negotiator.demand <- struct{}{}:
	default:
	}
}
