// Package resolve looks up the IPv4 addresses of DNS names, and their TTL.
//
// Go's own resolver does it, so that resolv.conf, search lists, EDNS, TCP and /etc/hosts are as
// everywhere in Go; it does not return the TTL. This package reads that from the DNS messages
// that the resolver's connections receive.
package resolve

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"ipipd/internal/ipv4"
)

// Answer is what a name resolves to. It is immutable.
type Answer struct {
	// Addresses are unicast addresses, at least one, each once and ascending: name servers
	// rotate the order (RFC 1794), so it says nothing.
	Addresses []netip.Addr
	// TTL is the smallest of the records that led to Addresses; 0 also if they are not from DNS
	// but from /etc/hosts.
	TTL time.Duration
}

const (
	// parallel is how many look-ups can be under way at once, slow ones not counted.
	parallel = 64
	// patience is the time after which a look-up is slow. At most parallel are slow at once: further ones are
	// given up, so that names of a zone whose servers are silent do not keep the others waiting.
	patience = time.Second
	// timeout of a look-up, its retries included.
	timeout = 10 * time.Second
)

var (
	errNoAddress = errors.New("it has no IPv4 address of one host")
	errSilent    = errors.New("no answer yet, and many other names have none")
)

// Resolver looks names up, a limited number at once; callers that ask for one name share a look-up.
// Its methods are safe for concurrent use.
type Resolver struct {
	dial func(ctx context.Context, network, address string) (net.Conn, error)
	// slots has an item for each look-up that is under way and not slow, slow one for each slow one.
	slots, slow       chan struct{}
	patience, timeout time.Duration

	mu      sync.Mutex
	pending map[string]*lookup // by name
}

// lookup is a look-up that is under way, or waits for a slot.
type lookup struct {
	done chan struct{} // closed when the fields below are set

	answer   Answer
	err      error
	canceled bool // by the context of the caller that made it
}

// New returns a Resolver.
func New() *Resolver {
	return &Resolver{dial: new(net.Dialer).DialContext, slots: make(chan struct{}, parallel), slow: make(chan struct{}, parallel), patience: patience, timeout: timeout, pending: map[string]*lookup{}}
}

// Lookup looks name up. It waits for a slot until ctx is done, and then 10 s at most for the answer.
func (r *Resolver) Lookup(ctx context.Context, name string) (Answer, error) {
	for {
		r.mu.Lock()
		l, joined := r.pending[name]
		if !joined {
			l = &lookup{done: make(chan struct{})}
			r.pending[name] = l
		}
		r.mu.Unlock()
		if !joined {
			l.answer, l.err = r.ask(ctx, name)
			l.canceled = ctx.Err() != nil
			r.mu.Lock()
			delete(r.pending, name)
			r.mu.Unlock()
			close(l.done)
			return l.answer, l.err
		}
		select {
		case <-l.done:
			if !l.canceled {
				return l.answer, l.err
			}
		case <-ctx.Done():
			return Answer{}, ctx.Err()
		}
	}
}

// ask waits for a slot, and then makes a query.
func (r *Resolver) ask(ctx context.Context, name string) (Answer, error) {
	select {
	case r.slots <- struct{}{}:
	case <-ctx.Done():
		return Answer{}, ctx.Err()
	}
	ctx, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	defer r.hold(giveUp)()
	a, err := r.query(ctx, name)
	if err != nil && context.Cause(ctx) == errSilent {
		err = errSilent
	}
	return a, err
}

// hold moves a look-up from slots to slow after patience, or gives it up if slow is full. end frees its slot.
func (r *Resolver) hold(giveUp func(error)) (end func()) {
	slot, moved := r.slots, make(chan struct{})
	timer := time.AfterFunc(r.patience, func() {
		defer close(moved)
		select {
		case r.slow <- struct{}{}:
			<-r.slots
			slot = r.slow
		default:
			giveUp(errSilent)
		}
	})
	return func() {
		if !timer.Stop() {
			<-moved
		}
		<-slot
	}
}

// query has Go's resolver look name up, within the timeout.
func (r *Resolver) query(ctx context.Context, name string) (Answer, error) {
	ctx, cancel := context.WithTimeout(ctx, r.timeout)
	defer cancel()
	over := ctx
	var ttl ttlReader // one look-up sends one query after the other
	resolver := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := r.dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		context.AfterFunc(over, func() { conn.Close() }) // the resolver would wait for its own timeout
		return ttl.watch(conn), nil
	}}
	found, err := resolver.LookupNetIP(ctx, "ip4", name)
	if err != nil {
		return Answer{}, err
	}
	var a Answer
	for _, address := range found {
		if address = address.Unmap(); ipv4.IsUnicast(address) {
			a.Addresses = append(a.Addresses, address)
		}
	}
	if len(a.Addresses) == 0 {
		return Answer{}, errNoAddress
	}
	slices.SortFunc(a.Addresses, netip.Addr.Compare)
	a.Addresses, a.TTL = slices.Compact(a.Addresses), ttl.least
	return a, nil
}
