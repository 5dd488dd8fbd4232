package ipsec

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"ipipd/internal/drop"
	"ipipd/internal/handover"
	"ipipd/internal/ipsec/ike"
	"ipipd/internal/packet"
)

// Config configures the protection of one tunnel.
type Config struct {
	ike.Config
	// Mark is the fwmark of IKE packets (SO_MARK); 0 is none.
	Mark uint32
	// Device is the index of the interface that IKE is bound to; 0 is none.
	Device int
	// Changed, if not nil, is called when Status or MaxInner of the Session may have changed, except by
	// a rekey. It must not block.
	Changed func()
	// Event, if not nil, is called for each event; a problem that persists is reported
	// once. It must not block.
	Event func(Event)
	// Dropped is called with received packets that an SA of the Session refused. It must
	// not block.
	Dropped func(why drop.Reason, n int)
	// Tap, if not nil, captures the ESP packets received for an SA of the Session.
	Tap Tap
	// SAs, if not nil, counts the pairs of ESP SAs that are established.
	SAs *atomic.Uint64
}

// Options of a Manager. With the zero value nothing is received.
type Options struct {
	// Serve starts reading from a Receiver, until stop, which returns when no Read is under way. It
	// is called for the raw socket of protocol 50 and for UDP port 4500 of each local address.
	// Neither may wait for a goroutine that calls the Manager. If Serve fails, so does Protect.
	Serve func(Receiver) (stop func(), err error)
	// Dropped is called with each received ESP packet of no Session. It must not block, nor keep p.
	Dropped func(why drop.Reason, p []byte)
	// State keeps the SAs for the next process, and has those of the process before; nil keeps nothing.
	State *handover.State
	// Opened is called with each receiving socket, for the next process to adopt, and Closed before one is
	// closed, but not after Leave. Adopt are the sockets of the process before, in any order; the Manager
	// owns them.
	Opened, Closed func(fd int)
	Adopt          []int
	// Held: nothing is received before Begin, so that each SA of the process before has its Session by then.
	Held bool
}

// Tap is a capture. Its methods are called by several goroutines, and must not block.
type Tap interface {
	// Wants reports whether Received is to be called.
	Wants() bool
	// Received gets an ESP packet as it was received, and why it is dropped: drop.None if it is not. It
	// returns the Buffer's CaptureID. p is valid until it returns.
	Received(p []byte, why drop.Reason) (id uint32)
}

// Receiver receives ESP packets, and authenticates and decrypts them. One goroutine at a time
// reads.
type Receiver interface {
	// Watch calls opened with each file descriptor that is readable when there are packets: the
	// present one, and later ones that replace it. opened must not block. If it fails, so does
	// the change of the descriptor.
	Watch(opened func(fd int) error) error
	// Read takes what has been received, without waiting, and fills batch[:n] with decrypted outer
	// IPv4 packets of protocol 4. It may reorder the Buffers of batch. Invalid packets are
	// reported to Dropped. After Close of the Manager, or of the last Session that uses the
	// socket, it returns os.ErrClosed.
	Read(batch []*packet.Buffer) (n int, err error)
}

// Manager holds the Sessions of a process, and the sockets of IKE and ESP. Its methods
// may be called concurrently.
type Manager struct {
	serve func(Receiver) (stop func(), err error)
	table atomic.Pointer[saTable] // written under mu
	// Options.Dropped, State, Opened and Closed.
	dropped      func(why drop.Reason, p []byte)
	state        *handover.State
	opened       func(fd int)
	closedSocket func(fd int)
	leaving      atomic.Bool // Leave was called

	// socketsMu serializes opening and closing sockets. Closing a socket waits for a Read of its
	// Receiver, which may wait for mu, so mu must not be held meanwhile.
	socketsMu     sync.Mutex
	spares        spares     // guarded by socketsMu
	adopted       adopted    // guarded by socketsMu
	held          bool       // Begin is still to come; written with both mutexes held
	mu            sync.Mutex // guards the rest; taken after socketsMu
	closed        bool
	raw           espSocket
	stopRaw       func() // ends serving raw's Receiver
	ports         map[portsKey]*ports
	negotiators   map[tunnelKey]*negotiator
	listeners     atomic.Pointer[listeners]
	firstMessages map[tunnelKey]datagram // first IKE messages, kept by a Listener for Protect
	saved         map[tunnelKey][]byte   // records of the process before, for Protect
	begin         []func() error         // called by Begin
}

// espSocket receives ESP that is not encapsulated in UDP.
type espSocket interface {
	io.Closer
	// restrict makes the kernel deliver only the packets of this tunnel; nil is all packets.
	restrict(only *negotiator) error
}

// portsKey is what both UDP sockets of a local address are bound to.
type portsKey struct {
	local  netip.Addr
	mark   uint32
	device int
}

type tunnelKey struct {
	local, remote netip.Addr
}

// String returns the key of the tunnel's record in State.
func (k tunnelKey) String() string { return k.local.String() + " " + k.remote.String() }

// NewManager makes a Manager. Sockets are opened by the first Protect.
func NewManager(o Options) *Manager {
	m := &Manager{serve: o.Serve, dropped: o.Dropped, state: o.State, opened: o.Opened, closedSocket: o.Closed, held: o.Held, ports: map[portsKey]*ports{}, negotiators: map[tunnelKey]*negotiator{}, firstMessages: map[tunnelKey]datagram{}}
	m.listeners.Store(&listeners{})
	if m.serve == nil {
		m.serve = func(Receiver) (func(), error) { return func() {}, nil }
	}
	if m.dropped == nil {
		m.dropped = func(drop.Reason, []byte) {}
	}
	m.table.Store(&saTable{})
	m.adopt(o.Adopt)
	m.readSaved()
	return m
}

// Begin begins to receive, and discards the SAs of the process before that no Session adopted; unused has their addresses.
func (m *Manager) Begin() (unused []string, err error) {
	m.socketsMu.Lock()
	defer m.socketsMu.Unlock()
	m.mu.Lock()
	m.held = false
	if m.raw != nil {
		err = m.restrictESPLocked()
	}
	begin := m.begin
	m.begin = nil
	for key := range m.saved {
		unused = append(unused, key.local.String()+" and "+key.remote.String())
		m.state.Delete(key.String())
	}
	m.saved = nil
	m.mu.Unlock()
	m.closeAdopted()
	for _, f := range begin {
		err = errors.Join(err, f())
	}
	slices.Sort(unused)
	return unused, err
}

// Leave makes a later Close leave the SAs, the sockets and State to the next process.
func (m *Manager) Leave() { m.leaving.Store(true) }

// receiveByLocked calls begin at once or, if held, at Begin; stop ends it or cancels it. Both mutexes are held.
func (m *Manager) receiveByLocked(begin func() (stop func(), err error)) (stop func(), err error) {
	if !m.held {
		return begin()
	}
	ended := false // socketsMu guards it, and stop
	m.begin = append(m.begin, func() (err error) {
		if !ended {
			stop, err = begin()
		}
		return err
	})
	return func() {
		if ended = true; stop != nil {
			stop()
		}
	}, nil
}

// Protect starts negotiating for a tunnel. The Session drops everything until there is an
// SA. Sockets are opened in the network namespace of the calling thread. It fails if
// another IKE daemon has the UDP ports.
//
// Besides the sockets that are used it opens a spare of each, so that a later Protect, for a
// tunnel whose local address has changed, need not open any: it takes the spares, or the
// sockets of an address that a stopped Session still has (Session.Stop).
func (m *Manager) Protect(cfg Config) (*Session, error) {
	key := tunnelKey{cfg.Local.Unmap(), cfg.Remote.Unmap()}
	cfg.Local, cfg.Remote = key.local, key.remote
	peer, err := ike.NewPeer(cfg.Config, time.Now())
	if err != nil {
		return nil, err
	}
	m.stopOnDemand(key, cfg.OnDemand)
	ctx, cancel := context.WithCancel(context.Background())
	n := &negotiator{
		manager: m, peer: peer, onDemand: cfg.OnDemand, settings: settingsOf(&cfg),
		local: key.local, remote: key.remote, changed: cfg.Changed, event: cfg.Event, sas: cfg.SAs,
		inbox: make(chan datagram, inboxSize), demand: make(chan struct{}, 1), cancel: cancel, done: make(chan struct{}),
		inbound: map[uint32]*inboundSA{}, lastPackets: map[uint32]uint64{},
	}
	if err := m.register(n, &cfg); err != nil {
		cancel()
		return nil, err
	}
	n.restore(cfg.Config)
	go n.run(ctx)
	return n.session, nil
}

// register opens the sockets of a negotiator, and makes its Session.
func (m *Manager) register(n *negotiator, cfg *Config) (err error) {
	key := n.tunnelKey()
	m.socketsMu.Lock()
	defer m.socketsMu.Unlock()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.negotiators[key] != nil {
		return fmt.Errorf("another tunnel from %s to %s is protected already", key.local, key.remote)
	}
	if n.ports, err = m.acquireLocked(portsKey{key.local, cfg.Mark, cfg.Device}); err != nil {
		return err
	}
	n.session = &Session{negotiator: n, dropped: cfg.Dropped, tap: cfg.Tap}
	if n.session.dropped == nil {
		n.session.dropped = func(drop.Reason, int) {}
	}
	first := worstCaseFormat(cfg.Config)
	n.session.espFormat.Store(&first)
	m.negotiators[key] = n
	_ = m.restrictESPLocked() // an optimization: on an error the socket keeps receiving all ESP
	_ = m.spares.fill()       // after an error bind opens them
	if first, ok := m.firstMessages[key]; ok {
		delete(m.firstMessages, key)
		n.receive(first)
	}
	n.saved = m.saved[key]
	delete(m.saved, key)
	return nil
}

// acquireLocked opens the ESP socket and the UDP sockets of a local address, unless they are open. It makes the former
// receive all ESP. Both mutexes are held; the caller releases the ports.
func (m *Manager) acquireLocked(key portsKey) (p *ports, err error) {
	if m.closed {
		return nil, errors.New("ipsec: closed")
	}
	if m.raw == nil {
		raw, receiver, err := openESP(m)
		if err != nil {
			return nil, err
		}
		if m.stopRaw, err = m.receiveByLocked(func() (func(), error) { return m.serve(receiver) }); err != nil {
			_ = raw.Close()
			return nil, err
		}
		m.raw = raw
	}
	if !m.held { // else Begin does it: the socket of the process before stays as it is until then
		if err := m.raw.restrict(nil); err != nil {
			return nil, err
		}
	}
	if p = m.ports[key]; p == nil {
		if p, err = openPorts(m, key); err != nil {
			_ = m.restrictESPLocked() // as it was; an optimization, as in Protect
			return nil, err
		}
		if p.stop, err = m.receiveByLocked(func() (func(), error) { go p.readIKE(); return m.serve(p.receiver) }); err != nil {
			_ = p.Close()
			_ = m.restrictESPLocked()
			return nil, err
		}
		m.ports[key] = p
	}
	p.refs++
	return p, nil
}

// stopOnDemand stops the on-demand Session of one of many remotes, in favour of a tunnel with that remote alone.
func (m *Manager) stopOnDemand(key tunnelKey, onDemand bool) {
	m.mu.Lock()
	n := m.negotiators[key]
	m.mu.Unlock()
	if n != nil && n.onDemand && !onDemand {
		n.session.Stop()
	}
}

// Stop stops sending for good, and sends the peer a Delete for the SAs before it returns. The
// UDP sockets stay open until Close, for another Session of that local address.
func (s *Session) Stop() {
	s.outbound.Store(nil)
	n := s.negotiator
	n.cancel()
	<-n.done
	n.manager.stopped(n)
}

// stopped frees the tunnel's addresses for another Protect.
func (m *Manager) stopped(n *negotiator) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if key := n.tunnelKey(); m.negotiators[key] == n {
		delete(m.negotiators, key)
	}
	_ = m.restrictESPLocked() // an optimization, as in Protect
}

// Close is Stop, and closes the UDP sockets if no other Session uses them.
func (s *Session) Close() {
	s.Stop()
	if n := s.negotiator; !s.closed.Swap(true) {
		n.manager.release(n.ports)
	}
}

// release closes UDP sockets once no Session or Listener uses them.
func (m *Manager) release(p *ports) {
	m.socketsMu.Lock()
	defer m.socketsMu.Unlock()
	m.mu.Lock()
	p.refs--
	last := p.refs == 0
	if last {
		delete(m.ports, p.key)
	}
	m.mu.Unlock()
	if last {
		_ = p.Close()
	}
}

// restrictESPLocked has the ESP socket receive from the only tunnel, or from all if there are
// several, or a Listener. Without a tunnel it changes nothing.
func (m *Manager) restrictESPLocked() error {
	if m.held {
		return nil
	}
	var only *negotiator
	for _, n := range m.negotiators {
		only = n
	}
	switch n := len(m.negotiators); {
	case n > 1, len(*m.listeners.Load()) > 0:
		return m.raw.restrict(nil)
	case n == 1:
		return m.raw.restrict(only)
	}
	return nil
}

// Close closes all Sessions and sockets. Protect fails afterwards.
func (m *Manager) Close() error {
	m.mu.Lock()
	m.closed = true
	all := make([]*negotiator, 0, len(m.negotiators))
	for _, n := range m.negotiators {
		all = append(all, n)
	}
	m.mu.Unlock()
	for _, n := range all {
		n.session.Close()
	}
	m.socketsMu.Lock()
	defer m.socketsMu.Unlock()
	m.mu.Lock()
	left := slices.Collect(maps.Values(m.ports)) // of Sessions that are stopped
	m.mu.Unlock()
	for _, p := range left {
		_ = p.Close()
	}
	m.spares.close()
	m.closeAdopted()
	if m.raw != nil {
		m.stopRaw()
		return m.raw.Close()
	}
	return nil
}

// deliver queues a copy of an IKE message for the tunnel between these addresses. port is
// the local one. Messages from unknown peers are ignored, but see Listen.
func (m *Manager) deliver(local netip.Addr, port uint16, from netip.AddrPort, payload []byte) {
	from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
	m.mu.Lock()
	key := tunnelKey{local, from.Addr()}
	n := m.negotiators[key]
	m.mu.Unlock()
	if n == nil {
		m.keepFirst(key, datagram{port, from, payload})
		return
	}
	n.receive(datagram{port, from, append([]byte(nil), payload...)})
}

// receive queues a message, unless the inbox is full.
func (n *negotiator) receive(d datagram) {
	select {
	case n.inbox <- d:
	default:
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
	old := *m.table.Load()
	next := make(saTable, len(old)+1)
	for k, v := range old {
		next[k] = v
	}
	change(next)
	m.table.Store(&next)
}
