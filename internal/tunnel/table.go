package tunnel

import (
	"fmt"
	"maps"
)

// table maps outer local and remote addresses to tunnels. It is immutable; register stores a
// changed copy.
type table map[outerPair]*Tunnel

// outerPair are a tunnel's outer addresses in network byte order, the local one in the upper 32 bits.
type outerPair uint64

func pairOf(local, remote [4]byte) outerPair {
	return outerPair(local[0])<<56 | outerPair(local[1])<<48 | outerPair(local[2])<<40 | outerPair(local[3])<<32 |
		outerPair(remote[0])<<24 | outerPair(remote[1])<<16 | outerPair(remote[2])<<8 | outerPair(remote[3])
}

func (t *table) find(local, remote [4]byte) *Tunnel { return (*t)[pairOf(local, remote)] }

// findMany returns the tunnel with many remotes whose local-address is local, else the one without a local-address.
func (t *table) findMany(local [4]byte) *Tunnel {
	if has := t.find(local, anyRemote); has != nil || local[0] >= 224 { // multicast is no address of this host
		return has
	}
	return t.find([4]byte{}, anyRemote)
}

// has reports whether all of these tunnels have these addresses.
func (t *table) has(pairs map[*Tunnel]outerPair) bool {
	for tunnel, pair := range pairs {
		if (*t)[pair] != tunnel {
			return false
		}
	}
	return true
}

// with returns a copy in which these tunnels have these addresses in place of their earlier ones, and
// the removed ones none. It fails if two tunnels have the same.
func (t *table) with(pairs map[*Tunnel]outerPair, removed map[*Tunnel]bool) (*table, error) {
	next := make(table, len(*t)+len(pairs))
	for pair, tunnel := range *t {
		if _, moves := pairs[tunnel]; !moves && !removed[tunnel] && !tunnel.closing.Load() {
			next[pair] = tunnel
		}
	}
	for tunnel, pair := range pairs {
		if pair == 0 { // not known yet
			continue
		}
		if other := next[pair]; other != nil {
			return nil, &TunnelError{tunnel.Name(), fmt.Errorf("%s has the same local-address and remote-address: only one tunnel can have both", other.Name())}
		}
		if !tunnel.closing.Load() {
			next[pair] = tunnel
		}
	}
	return &next, nil
}

// register enters tunnels in the table under these outer addresses, in place of their earlier ones,
// unless they are closing, and takes the removed ones out, at one instant. It fails if two tunnels
// have the same. The pair 0 is none.
func (e *Engine) register(pairs map[*Tunnel]outerPair, removed map[*Tunnel]bool) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(removed) == 0 && len(pairs) > 0 && e.table.Load().has(pairs) {
		return nil
	}
	next, err := e.table.Load().with(pairs, removed)
	if err != nil {
		return err
	}
	for t := range pairs {
		if !t.closing.Load() {
			e.live[t] = true
		}
	}
	e.reservePairsLocked(next, e.others.Load())
	e.table.Store(next)
	for t := range e.live {
		if t.pairTaken.Load() { // it may be free now
			t.wakeControl()
		}
	}
	return nil
}

// enterOthers enters further outer addresses of t in others, in place of those that it had.
func (e *Engine) enterOthers(t *Tunnel, others []*otherRemote) {
	e.mu.Lock()
	defer e.mu.Unlock()
	next := maps.Clone(*e.others.Load())
	maps.DeleteFunc(next, func(_ outerPair, of *Tunnel) bool { return of == t })
	for _, o := range others {
		if pair := pairOf(o.path.Local, o.path.Remote); next[pair] == nil && !t.closing.Load() {
			next[pair] = t
		}
	}
	e.reservePairsLocked(e.table.Load(), &next)
	e.others.Store(&next)
}
