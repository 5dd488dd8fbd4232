package tunnel

import (
	"errors"
	"strings"
	"testing"

	"ipipd/internal/fastpath"
)

// The tunnel without a local-address is woken when this host has too many addresses for the fast path, and when that ends.
func TestEngineFollowAddresses(t *testing.T) {
	fast, err := fastpath.Open(fastpath.Options{})
	if errors.As(err, new(*fastpath.Unavailable)) {
		t.Skipf("no fast path here: %v", err)
	} else if err != nil {
		t.Fatal(err)
	}
	defer fast.Close()
	network := new(fakeNetwork)
	e, one := &Engine{network: network}, &Tunnel{wake: make(chan struct{}, 1)}
	e.table.Store(&table{pairOf([4]byte{}, anyRemote): one})
	e.followAddresses(fast)
	woken := func() bool {
		select {
		case <-one.wake:
			return true
		default:
			return false
		}
	}
	network.followAddresses([][4]byte{{192, 0, 2, 1}})
	if e.addresses.full.Load() != nil || woken() {
		t.Error("one address is too many, or news")
	}
	many := make([][4]byte, 16385)
	for i := range many {
		many[i] = [4]byte{10, 0, byte(i >> 8), byte(i)}
	}
	network.followAddresses(many)
	if err := e.addresses.full.Load(); err == nil || !strings.Contains((*err).Error(), "16385 addresses, more than the 16384") || !woken() {
		t.Errorf("%v", err)
	}
	network.followAddresses(many[1:])
	if e.addresses.full.Load() != nil || !woken() {
		t.Error("as many as there may be are too many, or no news")
	}
}

// The outer addresses of other tunnels are reserved where one with many remotes would receive their packets.
func TestPairsToReserve(t *testing.T) {
	a, b, far := [4]byte{192, 0, 2, 1}, [4]byte{192, 0, 2, 2}, [4]byte{198, 51, 100, 1}
	toMany, toOne, others := pairOf(a, anyRemote), pairOf(b, far), pairOf(a, far)
	any := pairOf([4]byte{}, anyRemote)
	for name, c := range map[string]struct {
		table []outerPair
		want  map[outerPair]bool
	}{
		"none with many remotes":    {[]outerPair{toOne, others}, nil},
		"one of the same address":   {[]outerPair{toMany, toOne, others}, map[outerPair]bool{others: true}},
		"one without an address":    {[]outerPair{any, toOne}, map[outerPair]bool{toOne: true}},
		"and one with many remotes": {[]outerPair{any, toMany, toOne, others}, map[outerPair]bool{toMany: true, toOne: true, others: true}},
	} {
		all := table{}
		for _, p := range c.table {
			all[p] = &Tunnel{}
		}
		got := map[outerPair]bool{}
		for _, p := range pairsToReserve(&all, &table{}) {
			got[pairOf(p.Local, p.Remote)] = true
		}
		if len(got) != len(c.want) {
			t.Errorf("%s: %v", name, got)
		}
		for p := range c.want {
			if !got[p] {
				t.Errorf("%s: %v is not reserved", name, p)
			}
		}
	}
}
