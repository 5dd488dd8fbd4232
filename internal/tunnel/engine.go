package tunnel

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"ipipd/encap"
	"ipipd/internal/fastpath"
	"ipipd/internal/ipsec"
	"ipipd/internal/underlay"
	"ipipd/tun"
)

// EngineOptions are what a Engine is made of. Only Log is needed outside tests.
type EngineOptions struct {
	// Log takes what an operator has to know; nil discards it.
	Log *slog.Logger
	// Socket is the outer door. nil opens the real one.
	Socket underlay.Socket
	// OpenDevice opens the inner door of a tunnel; nil is tun.Open.
	OpenDevice func(tun.Options) (tun.Device, error)
	// Threads is how many threads receive, where more than one can; 0 leaves it
	// to the number of processors.
	Threads int
	// Network is asked how a remote is reached; nil asks the kernel.
	Network Network
	// LookupName finds the IPv4 address of a remote's DNS name, until ctx is done;
	// nil asks the system's resolver.
	LookupName func(ctx context.Context, name string) (netip.Addr, error)
	// FastPath loads what carries packets in the kernel; nil is fastpath.Open,
	// unless one of the doors or the Network is not the real one.
	FastPath func() (*fastpath.FastPath, error)
}

// Engine is all the tunnels of one process. They share one socket, and a packet
// that comes in by it finds its tunnel by its source and destination in constant
// time, also while a tunnel starts or ends.
type Engine struct {
	log        *slog.Logger
	socket     underlay.Socket
	openDevice func(tun.Options) (tun.Device, error)
	network    Network
	lookupName func(ctx context.Context, name string) (netip.Addr, error)
	threads    int

	openFastPath func() (*fastpath.FastPath, error)

	table atomic.Pointer[table]
	// drops counts packets that belong to no tunnel.
	drops drops

	// unfinished packets make reception move to the link layer.
	unfinished unfinished
	// linkFailed: a Receiver of the link layer has ended.
	linkFailed atomic.Bool

	choosing  sync.Mutex // guards reception; is taken before mu
	reception underlay.Reception

	mu sync.Mutex // guards the changing of table, and the rest
	// kernelPath is loaded when it is first asked for.
	kernelPath    *fastpath.FastPath
	kernelPathErr error
	ipsec         *ipsec.Manager // likewise
	// sealedReceivers is how many of ESP there have been.
	sealedReceivers atomic.Int32
	loops           sync.WaitGroup
	cancel          context.CancelFunc
}

// errNotReal is about a Engine whose parts the kernel does not know.
var errNotReal = errors.New("the tunnel is not the kernel's")

// table finds a tunnel by the outer addresses of what it receives. It is never
// changed, only replaced.
type table map[uint64]*Tunnel

func key(local, remote [4]byte) uint64 {
	return uint64(local[0])<<56 | uint64(local[1])<<48 | uint64(local[2])<<40 | uint64(local[3])<<32 |
		uint64(remote[0])<<24 | uint64(remote[1])<<16 | uint64(remote[2])<<8 | uint64(remote[3])
}

func (t *table) find(local, remote [4]byte) *Tunnel { return (*t)[key(local, remote)] }

// NewEngine opens the socket and begins to listen.
func NewEngine(o EngineOptions) (*Engine, error) {
	if o.Threads == 0 {
		o.Threads = defaultThreads()
	}
	h := &Engine{threads: o.Threads, log: o.Log, socket: o.Socket, openDevice: o.OpenDevice, network: o.Network}
	h.unfinished.epoch = time.Now()
	if h.openFastPath = o.FastPath; h.openFastPath == nil {
		h.openFastPath = fastpath.Open
		if o.Socket != nil || o.OpenDevice != nil || o.Network != nil {
			h.openFastPath = func() (*fastpath.FastPath, error) { return nil, errNotReal }
		}
	}
	if h.log == nil {
		h.log = slog.New(slog.DiscardHandler)
	}
	if h.openDevice == nil {
		h.openDevice = tun.Open
	}
	if h.lookupName = o.LookupName; h.lookupName == nil {
		h.lookupName = lookupName
	}
	if h.network == nil {
		h.network = kernelNetwork{}
	}
	if h.socket == nil {
		var err error
		if h.socket, err = underlay.OpenSocket(underlay.SocketOptions{Receivers: o.Threads}); err != nil {
			return nil, err
		}
		if underlay.KernelHandlesIPIP() {
			h.log.Warn("the kernel's ipip module is loaded and handles protocol 4 as well: it may answer the peer with ICMP errors; unload ipip and tunnel4")
		}
	}
	h.table.Store(&table{})
	ctx, cancel := context.WithCancel(context.Background())
	h.cancel = cancel
	for i, receiver := range h.socket.Receivers() {
		h.receive(receiver, i)
	}
	h.loops.Go(h.receiveErrors)
	h.loops.Go(func() {
		if err := h.network.Watch(ctx, h.networkChanged); err != nil && ctx.Err() == nil {
			h.log.Warn("changes of routes and addresses are looked for every ten seconds only", "err", err)
		}
	})
	return h, nil
}

// receive carries what one Receiver of the socket gives. Where nothing is read from it as
// yet, it has no thread and no memory.
func (h *Engine) receive(receiver underlay.Receiver, index int) {
	late, ok := receiver.(underlay.LateReceiver)
	start := func() {
		sender := h.socket.NewSender()
		h.spawn("receive", func() error { return h.inbound(receiver, sender, index, fromIPIP) }, func(err error) {
			if ok {
				h.leaveLink(err)
			} else {
				h.failTunnels(err, func(*Tunnel) bool { return true })
			}
		})
	}
	if !ok {
		start()
		return
	}
	h.loops.Go(func() {
		if late.WaitOpen() {
			start()
		}
	})
}

// spawn runs a loop of the data path. failed is called with what ended it, unless that was
// Close.
func (h *Engine) spawn(what string, loop func() error, failed func(error)) {
	loopThreads.add(1)
	h.loops.Go(func() {
		err := loop()
		loopThreads.add(-1)
		if err != nil && !errors.Is(err, os.ErrClosed) {
			h.log.Error("the data path ended", "loop", what, "err", err)
			failed(err)
		}
	})
}

// failTunnels ends those that cannot go on.
func (h *Engine) failTunnels(err error, cannot func(*Tunnel) bool) {
	for _, t := range *h.table.Load() {
		if cannot(t) {
			t.fail(err)
		}
	}
}

func (h *Engine) drop(reason encap.Drop) { h.drops.add(reason, 1) }

// Close ends every tunnel, removes their interfaces, and returns when the last
// thread has ended.
func (h *Engine) Close() error {
	var errs []error
	for _, t := range *h.table.Load() {
		errs = append(errs, t.Close())
	}
	h.cancel()
	if h.ipsec != nil {
		errs = append(errs, h.ipsec.Close())
	}
	errs = append(errs, h.socket.Close())
	h.loops.Wait()
	if h.kernelPath != nil {
		errs = append(errs, h.kernelPath.Close())
	}
	return errors.Join(errs...)
}

// register makes the tunnel findable by the outer addresses of path, and by no
// others that it had before; nil makes it unfindable.
func (h *Engine) register(t *Tunnel, path *underlay.Path) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	next := make(table, len(*h.table.Load())+1)
	for k, v := range *h.table.Load() {
		if v != t {
			next[k] = v
		}
	}
	if path != nil {
		k := key(path.Local, path.Remote)
		if other := next[k]; other != nil {
			return fmt.Errorf("%s has the same local-address and remote-address: only one tunnel can have both", other.Name())
		}
		next[k] = t
	}
	h.table.Store(&next)
	return nil
}

// networkChanged has every tunnel look at its route and its interface again.
func (h *Engine) networkChanged(wentDown map[int]bool) {
	for _, t := range *h.table.Load() {
		if len(wentDown) > 0 {
			t.noteDown(wentDown)
		}
		t.wakeSupervisor()
	}
}

// receiveErrors reads the ICMP errors that the network sends about our outer
// packets and hands each to the tunnel that it quotes.
func (h *Engine) receiveErrors() {
	buf := make([]byte, 2048)
	for {
		n, err := h.socket.ReadError(buf)
		if errors.Is(err, os.ErrClosed) {
			return
		}
		if err != nil {
			h.log.Warn("ICMP errors are not heard any more: the path MTU is not learnt", "err", err)
			return
		}
		e, d := encap.ParseError(buf[:n])
		if d != encap.DropNone {
			if d != encap.DropOuterErrorUnrelated { // other programs have errors too
				h.drop(d)
			}
			continue
		}
		if t := h.table.Load().find(e.Source, e.Destination); t != nil {
			t.outerError(&e, time.Now())
		}
	}
}

// randomIdentifiers shares the IDs among n queues, 0 left out, which the kernel
// would replace. Each begins somewhere, so that a restarted daemon does not repeat
// what it has just used.
func randomIdentifiers(n int) []identifier {
	ids := make([]identifier, n)
	share := 0xffff / n
	for i := range ids {
		first := 1 + i*share
		ids[i] = identifier{at: uint16(first + rand.IntN(share)), first: uint16(first), end: uint16(first + share - 1)}
	}
	return ids
}
