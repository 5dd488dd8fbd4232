package ipsec

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"ipipd/internal/ipsec/esp"
	"ipipd/internal/ipsec/ike"
	"ipipd/internal/packet"
)

// Config is what protects one tunnel.
type Config struct {
	ike.Config
	// Mark is put on IKE packets for policy routing (SO_MARK); 0 is none.
	Mark uint32
	// Device is the index of the only interface that IKE uses; 0 leaves it to
	// the routes.
	Device int
	// Changed, if not nil, is called after the gate has opened or closed, or
	// MaxInner may have changed. It must not block.
	Changed func()
	// Event, if not nil, is told what an operator should know: once, not at every
	// try. It must not block.
	Event func(Event)
}

// Options are what a Manager needs to know. The zero value is for one that nobody
// receives from.
type Options struct {
	// Serve is called for each way that ESP comes in: the socket of protocol 50,
	// and UDP port 4500 of each local address. It has to have some goroutine
	// read it until that returns os.ErrClosed, and must not block.
	Serve func(Receiver)
}

// Receiver takes ESP packets from the network and opens them. One goroutine uses
// a Receiver.
type Receiver interface {
	// Read waits for at least one packet that opens, takes what else is there
	// without waiting, and fills batch[:n] with whole outer IPv4 packets of
	// protocol 4 as the peer sealed them. Buffers of batch may change places.
	// After Close of the Manager it returns os.ErrClosed.
	Read(batch []*packet.Buffer) (n int, err error)
}

// Manager holds the gates of all tunnels of a process, and the sockets that IKE
// and ESP need.
type Manager struct {
	serve func(Receiver)
	table atomic.Pointer[saTable]
	// drops counts ESP packets that belong to no tunnel.
	drops [esp.NumDrops]atomic.Uint64

	// socketsMu is held by who opens or closes sockets. A Receiver may wait for mu, and
	// closing a socket for its Receiver: so not both under mu.
	socketsMu   sync.Mutex
	mu          sync.Mutex // guards the rest; taken after life
	closed      bool
	raw         espSocket
	ports       map[portsKey]*ports
	negotiators map[tunnelKey]*negotiator
}

// Closer closes something, and unblocks who reads from it.
type Closer interface{ Close() error }

// espSocket is where ESP comes in that is not in UDP.
type espSocket interface {
	Closer
	// restrict has the kernel copy only the packets of that exchange to this process; nil
	// stands for all.
	restrict(only *negotiator) error
}

// portsKey is what a pair of UDP sockets is bound to.
type portsKey struct {
	local  netip.Addr
	mark   uint32
	device int
}

type tunnelKey struct {
	local, remote netip.Addr
}

// NewManager makes a Manager. It opens no socket before the first Protect.
func NewManager(o Options) *Manager {
	m := &Manager{serve: o.Serve, ports: map[portsKey]*ports{}, negotiators: map[tunnelKey]*negotiator{}}
	if m.serve == nil {
		m.serve = func(Receiver) {}
	}
	m.table.Store(&saTable{})
	return m
}

// Protect begins to negotiate for a tunnel. The gate that it returns is closed
// until there is an SA. It fails where another IKE daemon has the UDP ports.
func (m *Manager) Protect(cfg Config) (*Session, error) {
	key := tunnelKey{cfg.Local.Unmap(), cfg.Remote.Unmap()}
	cfg.Local, cfg.Remote = key.local, key.remote
	peer, err := ike.NewPeer(cfg.Config, time.Now())
	if err != nil {
		return nil, err
	}
	m.socketsMu.Lock()
	defer m.socketsMu.Unlock()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil, errors.New("ipsec: closed")
	}
	if m.negotiators[key] != nil {
		return nil, fmt.Errorf("another tunnel from %s to %s is protected already", key.local, key.remote)
	}
	if m.raw == nil {
		raw, receiver, err := openESP(m)
		if err != nil {
			return nil, err
		}
		m.raw = raw
		m.serve(receiver)
	}
	if err := m.raw.restrict(nil); err != nil {
		return nil, err
	}
	pk := portsKey{key.local, cfg.Mark, cfg.Device}
	p := m.ports[pk]
	if p == nil {
		if p, err = openPorts(m, pk); err != nil {
			return nil, err
		}
		m.ports[pk] = p
		m.serve(p.receiver)
	}
	p.refs++
	ctx, cancel := context.WithCancel(context.Background())
	x := &negotiator{
		manager: m, ports: p, peer: peer,
		local: key.local, remote: key.remote, changed: cfg.Changed, event: cfg.Event,
		inbox: make(chan datagram, inboxSize), cancel: cancel, done: make(chan struct{}),
		inbound: map[uint32]*inboundSA{}, lastPackets: map[uint32]uint64{},
	}
	x.session = &Session{negotiator: x}
	first := worstCaseFormat(cfg.Config)
	x.session.espFormat.Store(&first)
	m.negotiators[key] = x
	_ = m.restrictESP() // or it goes on receiving more than it has to
	go x.run(ctx)
	return x.session, nil
}

// Close shuts the gate for good, tells the peer, and returns when that is done.
func (p *Session) Close() {
	p.outbound.Store(nil)
	x := p.negotiator
	x.cancel()
	<-x.done
	x.manager.remove(x)
}

func (m *Manager) remove(x *negotiator) {
	m.socketsMu.Lock()
	defer m.socketsMu.Unlock()
	if m.detach(x) {
		_ = x.ports.Close()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	_ = m.restrictESP() // or it goes on receiving more than it has to
}

// restrictESP has the ESP socket receive what the tunnels as they are need. With none it
// stays as it was. The caller holds mu.
func (m *Manager) restrictESP() error {
	var only *negotiator
	for _, x := range m.negotiators {
		only = x
	}
	switch len(m.negotiators) {
	case 0:
		return nil
	case 1:
		return m.raw.restrict(only)
	}
	return m.raw.restrict(nil)
}

// detach takes x out, and reports whether nobody else uses its ports.
func (m *Manager) detach(x *negotiator) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	key := tunnelKey{x.local, x.remote}
	if m.negotiators[key] != x {
		return false
	}
	delete(m.negotiators, key)
	if x.ports.refs--; x.ports.refs > 0 {
		return false
	}
	delete(m.ports, x.ports.key)
	return true
}

// Close closes every gate and the sockets.
func (m *Manager) Close() error {
	m.mu.Lock()
	m.closed = true
	all := make([]*negotiator, 0, len(m.negotiators))
	for _, x := range m.negotiators {
		all = append(all, x)
	}
	m.mu.Unlock()
	for _, x := range all {
		x.session.Close()
	}
	m.socketsMu.Lock()
	defer m.socketsMu.Unlock()
	if m.raw != nil {
		return m.raw.Close()
	}
	return nil
}

// Drops gives each reason and how many packets that belong to no tunnel it has cost.
func (m *Manager) Drops(yield func(esp.Drop, uint64) bool) {
	for d := range m.drops {
		if n := m.drops[d].Load(); n > 0 && !yield(esp.Drop(d), n) {
			return
		}
	}
}

// deliver hands an IKE message to the tunnel it is for. A stranger's goes no further.
func (m *Manager) deliver(local netip.Addr, port uint16, from netip.AddrPort, payload []byte) {
	from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
	m.mu.Lock()
	x := m.negotiators[tunnelKey{local, from.Addr()}]
	m.mu.Unlock()
	if x == nil {
		return
	}
	select {
	case x.inbox <- datagram{port, from, append([]byte(nil), payload...)}:
	default: // the peer, or who says so, sends faster than we compute
	}
}

func (m *Manager) addSA(key saKey, sa *inboundSA) {
	m.updateTable(func(t saTable) { t[key] = sa })
}

func (m *Manager) removeSA(key saKey, sa *inboundSA) {
	m.updateTable(func(t saTable) {
		if t[key] == sa {
			delete(t, key)
		}
	})
}

func (m *Manager) updateTable(change func(saTable)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := *m.table.Load()
	next := make(saTable, len(now)+1)
	for k, v := range now {
		next[k] = v
	}
	change(next)
	m.table.Store(&next)
}
