package tunnel

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"ipipd/encap"
	"ipipd/internal/capture"
	"ipipd/internal/drop"
	"ipipd/internal/fastpath"
	"ipipd/internal/handover"
	"ipipd/internal/ipsec"
	"ipipd/internal/netstate"
	"ipipd/internal/resolve"
	"ipipd/internal/sysctl"
	"ipipd/internal/underlay"
	"ipipd/tun"
)

// EngineOptions configure an Engine. Outside tests only Log is needed.
type EngineOptions struct {
	// Log is the operator's log; nil discards it.
	Log *slog.Logger
	// Socket is the underlay side; nil opens the kernel's sockets. The Engine closes it.
	Socket underlay.Socket
	// OpenDevice opens a tunnel's TUN device; nil is tun.Open.
	OpenDevice func(tun.Options) (tun.Device, error)
	// Threads is the number of threads that send, and of those that receive where the socket has
	// several Receivers; 0 derives it from the number of processors.
	Threads int
	// Network looks up routes and configures interfaces; nil is the kernel. The Engine closes it.
	Network Network
	// LookupName resolves a remote's DNS name; nil uses the system's resolver.
	LookupName func(ctx context.Context, name string) (resolve.Answer, error)
	// Manager keeps the descriptors of interfaces and sockets for the next process; nil keeps none. Kept are
	// those of the process before: the caller discards what the first Apply has not taken of them.
	Manager *handover.Manager
	Kept    handover.Kept
	// ManageSysctls has the Engine set the sysctls that a real server needs, and record their old values in
	// RuntimeDir. Without it the Engine sets back what a killed process has left recorded there.
	ManageSysctls bool
	RuntimeDir    string
	// Confine, if it is set, is called once, by the first Apply, when all that the tunnels need is open and no
	// packet has been read. fastPath says whether the programs of the fast path are loaded. It returns whether
	// eBPF programs can be loaded from then on.
	Confine func(fastPath bool) (ebpf bool)
	// FastPath loads the eBPF programs; nil is fastpath.Open, or an error if Socket,
	// OpenDevice or Network is set.
	FastPath func() (*fastpath.FastPath, error)
}

// Engine holds all tunnels of one process. They share one socket; a received packet finds
// its tunnel by outer source and destination in constant time, without a lock. Its methods
// are safe for concurrent use.
type Engine struct {
	log        *slog.Logger
	socket     underlay.Socket
	openDevice func(tun.Options) (tun.Device, error)
	network    Network
	lookupName func(ctx context.Context, name string) (resolve.Answer, error)
	threads    int
	workers    []*workers // as many pairs as threads says

	openFastPath func() (*fastpath.FastPath, error)

	sysctls *managedSysctls // nil if network is not the kernel's

	manager *handover.Manager
	kept    handover.Kept // used by Apply and remakeInterface only
	ledger  *ledger
	// leaving: interfaces and sockets that are closed stay open at manager, for the next process. With kept it
	// is set until the first Apply has succeeded, so that a start that fails can be tried again.
	leaving atomic.Bool

	confine   func(fastPath bool) (ebpf bool) // nil: it has been called, or there is none
	receiving bool                            // startReceiving was called

	table  atomic.Pointer[table]
	others atomic.Pointer[table] // looked up after table: the further remotes of tunnels, see otherRemote
	drops  drop.Counters         // of packets that belong to no tunnel

	captures atomic.Pointer[capture.Rings] // of all tunnels; nil without a capture. Written under mu

	partialChecksums partialDetector
	linkLayerFailed  atomic.Bool // a Receiver of the link layer has failed

	traffic      chan struct{} // wakes poll; capacity 1, see noteTraffic
	pollerAsleep atomic.Bool
	rechecked    time.Time // when poll last called Recheck

	receptionMu sync.Mutex // guards reception and linkVotes
	reception   underlay.Reception
	linkVotes   linkVotes

	mu   sync.Mutex       // serializes changes of table and others, and guards the fields up to ipsec
	live map[*Tunnel]bool // tunnels that were registered, and are not closed yet
	// fastPath and ipsec are opened by openShared, for the first tunnel that uses them.
	fastPath     *fastpath.FastPath
	fastPathErr  error
	addresses    addresses
	ipsec        *ipsec.Manager
	state        *handover.State // where ipsec saves the SAs; nil: they end with the process
	espReceivers atomic.Int32    // started so far
	applying     sync.Mutex      // held by Apply; guards closed
	closed       bool            // Close was called, or receiving has failed to begin
	working      sync.WaitGroup  // workers' threads
	loops        sync.WaitGroup  // other goroutines
	cancel       context.CancelFunc
	closeOnce    sync.Once // closes the workers and the socket
}

// errNotKernel is why an Engine with an in-memory socket, device or Network has no fast path.
var errNotKernel = errors.New("the tunnel is not the kernel's")

// NewEngine opens the socket and starts receiving; with Kept or Confine the first Apply starts it. The caller
// must Close the Engine.
func NewEngine(o EngineOptions) (*Engine, error) {
	if o.Threads == 0 {
		o.Threads = DefaultThreads()
	}
	e := &Engine{threads: o.Threads, log: o.Log, socket: o.Socket, openDevice: o.OpenDevice, network: o.Network, traffic: make(chan struct{}, 1), linkVotes: linkVotes{}, live: map[*Tunnel]bool{}, manager: o.Manager, kept: o.Kept, confine: o.Confine}
	e.leaving.Store(len(o.Kept) > 0)
	e.partialChecksums.epoch = time.Now()
	if e.openFastPath = o.FastPath; e.openFastPath == nil {
		e.openFastPath = e.loadFastPath
		if o.Socket != nil || o.OpenDevice != nil || o.Network != nil {
			e.openFastPath = func() (*fastpath.FastPath, error) { return nil, errNotKernel }
		}
	}
	if e.log == nil {
		e.log = slog.New(slog.DiscardHandler)
	}
	if e.openDevice == nil {
		e.openDevice = tun.Open
	}
	if e.lookupName = o.LookupName; e.lookupName == nil {
		e.lookupName = resolve.New().Lookup
	}
	opened := e.socket == nil
	if opened {
		var err error
		if e.socket, err = underlay.OpenSocket(underlay.SocketOptions{
			Receivers: o.Threads, Adopt: takeKeptSockets(o.Kept, keptSocket), Opened: e.keepSocket, Closed: e.dropSocket,
		}); err != nil {
			return nil, err
		}
	}
	if e.network == nil {
		bypass := ""
		if s, ok := e.socket.(underlay.ReceiveSetter); ok && !s.PacketSockets() {
			bypass = "there are no packet sockets (AF_PACKET): RestrictAddressFamilies= of the service, or the kernel, refuses them"
		}
		host, err := netstate.Open(netstate.Options{Bypass: bypass, Failed: func(err error) {
			e.log.Error("changes of the host's network are not seen any more: restart ipipd", "err", err)
		}})
		if err != nil {
			if opened {
				e.socket.Close()
			}
			return nil, err
		}
		e.network = hostNetwork{host}
		e.sysctls = &managedSysctls{manage: o.ManageSysctls, manager: sysctl.Manager{Dir: o.RuntimeDir}}
		if !o.ManageSysctls {
			e.sysctls.restore(e)
		}
	}
	if opened {
		if f := KernelIPIP(os.DirFS("/")); f != nil {
			e.log.Warn(f.What, "because", f.Why, "remedy", f.Do)
		}
	}
	var err error
	if e.ledger, err = openLedger(o.Manager, o.Kept); err != nil {
		e.log.Warn("the counters of the tunnels begin anew", "err", err)
	}
	e.table.Store(&table{})
	e.others.Store(&table{})
	ctx, cancel := context.WithCancel(context.Background())
	e.cancel = cancel
	workerThreads.add(2 * e.threads)
	if err := e.startWorkers(); err != nil {
		_ = e.Close()
		return nil, err
	}
	e.loops.Go(func() { e.poll(ctx) })
	return e, nil
}

// startWorkers makes the workers, and has them read the socket's Receivers: the first one is the raw
// socket's, the others are the link layer's (startReceiving).
func (e *Engine) startWorkers() error {
	for i := range e.threads {
		p, err := newWorkers(i, func(i int) *worker { return newWorker(i, e.socket.NewSender()) }, e.working.Go)
		if err != nil {
			return err
		}
		e.workers = append(e.workers, p)
	}
	// Else Apply does it: the sockets of the process before are read once there are tunnels, and a process that is
	// to be confined reads nothing before.
	if e.leaving.Load() || e.confine != nil {
		return nil
	}
	return e.startReceiving()
}

// startReceiving has the workers read the socket's Receivers. A packet that they read before its tunnel is
// registered is dropped: unknown-peer.
func (e *Engine) startReceiving() error {
	e.receiving = true
	e.loops.Go(e.receiveICMPErrors)
	for i, receiver := range e.socket.Receivers() {
		in := &inbound{engine: e, receiver: receiver, from: fromIPIP, fail: e.disableLinkLayer}
		if i == 0 {
			in.fail = func(err error) { e.failTunnels(err, func(*Tunnel) bool { return true }) }
		}
		w := e.workers[max(i-1, 0)%len(e.workers)].in
		key := w.add(in)
		if err := receiver.Watch(func(fd int) error { return w.watch(fd, key) }); err != nil {
			return err
		}
	}
	return nil
}

// failTunnels fails the tunnels that match selects.
func (e *Engine) failTunnels(err error, match func(*Tunnel) bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for t := range e.live {
		if match(t) {
			t.fail(err)
		}
	}
}

// Close closes all tunnels and the socket, and returns when the last thread has ended. It waits for
// Apply, whose context the caller may cancel; a later Apply fails.
func (e *Engine) Close() error {
	e.applying.Lock()
	defer e.applying.Unlock()
	e.closed = true
	e.mu.Lock()
	if e.leaving.Load() { // while the table has the tunnels: what the workers do not read the next process does
		for _, p := range e.workers {
			p.stop()
		}
		e.working.Wait()
		if e.ipsec != nil {
			e.ipsec.Leave()
		}
	}
	live := slices.Collect(maps.Keys(e.live)) // not those of the table: one that has failed may be closing, and out of it
	e.mu.Unlock()
	errs := []error{e.CloseTunnels(live...)}
	e.cancel()
	if e.ipsec != nil {
		errs = append(errs, e.ipsec.Close())
	}
	e.closeOnce.Do(func() {
		for _, p := range e.workers {
			p.stop()
		}
		errs = append(errs, e.socket.Close())
		e.loops.Wait()
		e.working.Wait()
		for _, p := range e.workers {
			p.close()
		}
		workerThreads.add(-2 * e.threads)
		errs = append(errs, e.closeState())
	})
	if e.fastPath != nil {
		e.fastPath.Close()
	}
	errs = append(errs, e.dropLedger())
	e.sysctls.end(e)
	if e.addresses.follower != nil {
		e.addresses.follower.Close()
	}
	errs = append(errs, e.network.Close())
	return errors.Join(errs...)
}

// receiveICMPErrors reads ICMP errors about outer packets and passes each to the tunnel whose
// outer header it quotes.
func (e *Engine) receiveICMPErrors() {
	buf := make([]byte, 2048)
	for {
		n, err := e.socket.ReadError(buf)
		if errors.Is(err, os.ErrClosed) {
			return
		}
		if err != nil {
			e.log.Warn("ICMP errors are not heard any more: the path MTU is not learnt", "err", err)
			return
		}
		outerErr, d := encap.ParseError(buf[:n])
		if d != drop.None {
			e.dropPacket(d, buf[:n])
			continue
		}
		if outerErr == (encap.OuterError{}) { // about another program's packet
			continue
		}
		if t := e.table.Load().find(outerErr.Source, outerErr.Destination); t != nil {
			t.capture(capture.OuterIn, buf[:n], t.outerError(&outerErr, time.Now()))
		} else if t := e.table.Load().findMany(outerErr.Source); t != nil {
			t.capture(capture.OuterIn, buf[:n], t.outerErrorOf(&outerErr, time.Now()))
		}
	}
}

// splitIDs divides the values 1 to 65535 of the IPv4 Identification among n queues; the kernel
// would replace 0. Each queue begins at random, so that a restarted daemon does not repeat
// IDs just used.
func splitIDs(n int) []idCounter {
	ids := make([]idCounter, n)
	share := 0xffff / n
	for i := range ids {
		first := 1 + i*share
		ids[i] = idCounter{at: uint16(first + rand.IntN(share)), first: uint16(first), end: uint16(first + share - 1)}
	}
	return ids
}

// idCounters returns ID ranges for n queues. The upper half of all IDs is the fast path's (package
// fastpath), which a tunnel may be allowed at any time.
func idCounters(n int) []idCounter { return splitIDs(2 * n)[:n] }
