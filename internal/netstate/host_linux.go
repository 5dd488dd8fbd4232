package netstate

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"reflect"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// pause is the time between two rounds of the Host's goroutine: a storm of messages is
	// read in batches.
	pause = 10 * time.Millisecond
	// lookupsPerRound limits the followers whose routes are looked up in one round: with pause,
	// some 2,000 a second.
	lookupsPerRound = 20
	// policyGap is the least time between two reads of the policy caused by messages,
	// resyncGap the least between two dumps of links and qdiscs after lost messages.
	policyGap = 100 * time.Millisecond
	resyncGap = 250 * time.Millisecond
)

// Host is the network of one namespace. It answers from memory, for any number of
// Followers, and follows changes by netlink; it polls nothing. It also configures
// interfaces. All of its sockets and files are opened by Open. Its methods are safe for concurrent
// use.
type Host struct {
	requester
	options Options
	events  [len(eventGroups)]int // sockets; -1 for a family that the kernel lacks
	waker   int                   // an eventfd: wakes the goroutine
	ended   chan struct{}         // closed when the goroutine has ended
	buffer  []byte                // for messages; mu guards it

	policyMu sync.Mutex // is held while the policy is read; locked before mu

	// mu guards the rest. It is not held over a request, except a dump to whose result later
	// messages are applied.
	mu     sync.Mutex
	closed bool
	// seen counts the messages so far.
	seen uint64
	// lost: messages were dropped, so that memory may differ from the kernel's state. behind:
	// the last read left messages in a socket's queue, so that the kernel may be dropping more.
	lost, behind bool
	lastResync   time.Time

	links map[int]link
	named map[string]int // ifindex by name and alternative name
	// tunnelInterfaces are the interfaces that have been a Query's Interface. A change of one concerns
	// its follower and those routed through it, not all followers.
	tunnelInterfaces map[int]bool
	qdiscs           map[int][]qdisc // the configured ones, by interface
	filters          map[filterKey]*filters
	neighbours       map[neighbour]*neighbourEntry
	policy           *policy
	stale            policyParts // parts of policy to be read again
	lastPolicy       time.Time

	followers map[*Follower]bool
	index     keyIndex
	queue     []*Follower // to be updated
	mirrors   mirrors
	addresses addressFollowers
}

// neighbourEntry is a neighbour that followers depend on. The Host's mu guards it.
type neighbourEntry struct {
	neighbourState
	known bool      // neighbourState is the kernel's
	used  time.Time // when resolve was last called; zero: never
}

// Open opens a Host in the network namespace of the calling thread.
func Open(o Options) (h *Host, err error) {
	h = newHost(o)
	defer func() {
		if err != nil {
			h.release()
			h, err = nil, fmt.Errorf("watch the network for changes: %w", permission(err))
		}
	}()
	if h.waker, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return h, os.NewSyscallError("eventfd", err)
	}
	for i := range eventGroups {
		if h.events[i], err = eventGroups[i].subscribe(); err != nil && !eventGroups[i].optional {
			return h, err
		}
	}
	if err := h.open(); err != nil {
		return h, err
	}
	h.mu.Lock()
	err = h.resyncLocked()
	h.mu.Unlock()
	if err != nil {
		return h, err
	}
	h.refreshPolicy(0)
	go h.run()
	return h, nil
}

// newHost returns a Host without sockets.
func newHost(o Options) *Host {
	h := &Host{
		options: o, waker: -1, ended: make(chan struct{}), buffer: make([]byte, maxMessage),
		tunnelInterfaces: map[int]bool{}, neighbours: map[neighbour]*neighbourEntry{}, policy: &policy{},
		followers: map[*Follower]bool{}, index: keyIndex{sets: map[key]map[*Follower]bool{}},
		mirrors: newMirrors(), addresses: addressFollowers{all: map[*AddressFollower]bool{}},
	}
	for i := range h.events {
		h.events[i] = -1
	}
	return h
}

// Close ends the Host: Answers stay as they are, and other methods fail. It waits for the
// goroutine, so that it must not be called from a Follower's changed.
func (h *Host) Close() error {
	h.mu.Lock()
	again := h.closed
	h.closed = true
	h.wakeLocked()
	h.mu.Unlock()
	<-h.ended
	if !again {
		h.release()
	}
	return nil
}

// release closes the sockets.
func (h *Host) release() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for i, fd := range append(h.events[:], h.waker) {
		if fd >= 0 {
			unix.Close(fd)
		}
		if i < len(h.events) {
			h.events[i] = -1
		}
	}
	h.waker = -1
	h.requester.close()
}

// wakeLocked wakes the Host's goroutine.
func (h *Host) wakeLocked() {
	if h.waker >= 0 {
		// It fails only if the eventfd's counter is full, and the goroutine woken anyway.
		_, _ = unix.Write(h.waker, binary.NativeEndian.AppendUint64(nil, 1))
	}
}

// run is the Host's goroutine: it reads messages, and updates the followers they concern.
func (h *Host) run() {
	defer close(h.ended)
	for {
		if err := h.wait(); err != nil {
			h.fail(err)
			return
		}
		h.mu.Lock()
		err := h.readLocked()
		closed := h.closed
		h.mu.Unlock()
		switch {
		case closed:
			return
		case err != nil:
			h.fail(err)
			return
		}
		h.catchUp(time.Now())
		h.updateMirrors()
		h.updateAddresses()
		for left := lookupsPerRound; left > 0; {
			f := h.next()
			if f == nil {
				break
			}
			if f.update() {
				left--
			}
		}
		time.Sleep(pause)
	}
}

func (h *Host) fail(err error) {
	if h.options.Failed != nil {
		h.options.Failed(fmt.Errorf("changes of the network are no longer seen: %w", err))
	}
}

// wait blocks until a message or a wake comes, or the time of dueLocked.
func (h *Host) wait() error {
	h.mu.Lock()
	timeout := -1
	if at, ok := h.dueLocked(); ok {
		timeout = max(int(time.Until(at)/time.Millisecond)+1, 0)
	}
	fds := []unix.PollFd{{Fd: int32(h.waker), Events: unix.POLLIN}}
	for _, fd := range h.events {
		fds = append(fds, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN}) // poll ignores -1
	}
	h.mu.Unlock()
	if _, err := unix.Poll(fds, timeout); err != nil && err != unix.EINTR {
		return os.NewSyscallError("poll", err)
	}
	var count [8]byte
	_, _ = unix.Read(int(fds[0].Fd), count[:])
	return nil
}

// dueLocked returns when the goroutine has something to do that no message tells of, the zero time if now: to update
// followers, or to read again what is stale. ok is false if there is nothing.
func (h *Host) dueLocked() (at time.Time, ok bool) {
	earliest := func(t time.Time) {
		if !ok || t.Before(at) {
			at, ok = t, true
		}
	}
	if len(h.queue) > 0 || h.mirrors.hasDirty() {
		earliest(time.Time{})
	}
	switch {
	case h.lost:
		earliest(h.lastResync.Add(resyncGap))
	case h.stale != 0:
		earliest(h.lastPolicy.Add(policyGap))
	}
	if h.mirrors.stale {
		earliest(h.mirrors.due)
	}
	if h.addresses.stale {
		earliest(h.addresses.due)
	}
	return at, ok
}

// catchUp reads links and qdiscs again after lost messages, and the stale parts of the policy, where that is due.
func (h *Host) catchUp(now time.Time) {
	h.mu.Lock()
	if h.lost && !h.behind && now.Sub(h.lastResync) >= resyncGap {
		// An error is an interrupted dump, or a lack of memory: it is tried again.
		_ = h.resyncLocked()
	}
	due := h.stale != 0 && now.Sub(h.lastPolicy) >= policyGap
	h.mu.Unlock()
	if due {
		h.refreshPolicy(0)
	}
}

// resyncLocked reads links and qdiscs from the kernel again, and marks everything else as to be read or looked up
// again. mu is held over the requests: later messages must be applied to what was read.
func (h *Host) resyncLocked() error {
	h.lastResync = time.Now()
	all, err := h.getLinks(0, "")
	if err != nil {
		return fmt.Errorf("list the interfaces: %w", err)
	}
	qdiscs, err := h.getQdiscs()
	if err != nil {
		return err
	}
	h.lost = false
	h.links, h.named = map[int]link{}, map[string]int{}
	for _, l := range all {
		h.setLink(l)
	}
	maps.DeleteFunc(h.tunnelInterfaces, func(device int, _ bool) bool { return h.links[device].index == 0 })
	h.qdiscs, h.filters = qdiscs, map[filterKey]*filters{}
	for _, n := range h.neighbours {
		n.known = false
	}
	h.stale = allParts
	h.markMirrorsLocked(0, [4]byte{})
	h.markAddressesLocked()
	for f := range h.followers {
		if i := f.query.Interface; i != 0 {
			f.changes++
			if l := h.links[i]; !l.up() {
				f.downs++
			}
		}
		h.markLocked(f, dirtyRoute)
	}
	return nil
}

// refreshPolicy reads these parts of the policy and the stale ones again, and marks all
// followers if the policy has changed.
func (h *Host) refreshPolicy(parts policyParts) {
	h.policyMu.Lock() // a caller that needs the policy waits until another has read it
	defer h.policyMu.Unlock()
	h.mu.Lock()
	before := h.policy
	if h.stale != 0 {
		h.lastPolicy = time.Now()
	}
	parts |= h.stale
	h.stale = 0
	h.mu.Unlock()
	if parts == 0 {
		return
	}
	next := h.readPolicy(*before, parts)
	if reflect.DeepEqual(*before, next) {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.policy = &next
	for f := range h.followers {
		h.markLocked(f, dirtyMemory)
	}
}

// synchronize handles the messages that the kernel has sent so far and reads legacy iptables again,
// so that an Answer computed next takes both into account.
func (h *Host) synchronize() {
	h.readMessages()
	h.refreshPolicy(partIptables)
	h.wakeIfMarked()
}

// readMessages handles the messages that the kernel has sent so far.
func (h *Host) readMessages() {
	h.mu.Lock()
	_ = h.readLocked() // the goroutine reports the error
	h.mu.Unlock()
	h.wakeIfMarked()
}

// wakeIfMarked wakes the Host's goroutine if it has something to do: it may be waiting for a message that is read by now.
func (h *Host) wakeIfMarked() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, ok := h.dueLocked(); ok {
		h.wakeLocked()
	}
}

// Recheck reads legacy iptables, whose changes no message tells of, and repeats what has
// failed. One call serves all followers.
func (h *Host) Recheck() {
	parts := partIptables
	h.mu.Lock()
	if h.policy.chainsUnknown != "" {
		parts |= partNftables
	}
	if h.policy.xfrmUnknown != "" {
		parts |= partXfrm
	}
	if h.policy.rulesUnknown {
		parts |= partRules
	}
	for f := range h.followers {
		a := f.Answer()
		if a.Err != nil && !errors.As(a.Err, new(*NoRouteError)) && !errors.As(a.Err, new(*NoDeviceError)) {
			h.markLocked(f, dirtyRoute)
		}
	}
	for k, f := range h.filters {
		if f.unknown != "" {
			h.filtersChanged(k.device)
		}
	}
	h.mu.Unlock()
	h.refreshPolicy(parts)
	h.wakeIfMarked()
}

// markLocked queues a follower for an update of what.
func (h *Host) markLocked(f *Follower, what dirty) {
	f.dirty |= what
	if !f.queued {
		f.queued = true
		h.queue = append(h.queue, f)
	}
}

// next takes the follower that has waited for its update for longest; nil if there is none.
func (h *Host) next() *Follower {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.queue) == 0 {
		h.queue = nil
		return nil
	}
	f := h.queue[0]
	h.queue[0] = nil
	h.queue = h.queue[1:]
	f.queued = false
	return f
}

// link returns an interface by index.
func (h *Host) link(device int) (link, error) {
	h.mu.Lock()
	l, ok := h.links[device]
	ok = ok && !h.lost
	h.mu.Unlock()
	if ok {
		return l, nil
	}
	return h.getLink(device, "") // it may be newer than what has been read
}

// linkNamed returns the index of an interface.
func (h *Host) linkNamed(name string) (int, error) {
	h.mu.Lock()
	device, ok := h.named[name]
	h.mu.Unlock()
	if ok {
		return device, nil
	}
	return h.DeviceIndex(name)
}
