package ipsec

import (
	"bytes"
	"crypto/sha256"
	"encoding/gob"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"ipipd/internal/ipsec/esp"
	"ipipd/internal/ipsec/ike"
)

// A Session outlives the process as a record in Options.State, whose key is the two outer addresses. It is
// replaced before a message that depends on it is sent. Sequence numbers and anti-replay windows are not in it:
// the data path keeps them in State's Counters, so that the next process continues with the last ones used,
// wherever this one is killed.

// savedSession is for encoding/gob.
type savedSession struct {
	Settings []setting
	IKE      []byte // ike.Peer.Save
	Children []savedChild
}

type savedChild struct {
	Inbound  uint32 // SPI
	Counters int    // index in State
}

// setting is a setting that SAs depend on, with the hash of its value: if that differs, saved SAs are not used.
type setting struct {
	Name string
	Sum  [32]byte
}

func settingsOf(c *Config) []setting {
	sum := func(name string, value any) setting { return setting{name, sha256.Sum256(fmt.Append(nil, value))} }
	return []setting{
		{"ipsec-secret", sha256.Sum256(c.Secret)},
		sum("ipsec-exchange", c.Mode),
		sum("ipsec-phase1", c.Phase1),
		sum("ipsec-phase2", c.Phase2),
		sum("ipsec-pfs-group", c.PFS),
		sum("ipsec-lifetime", [2]time.Duration{c.Lifetime1, c.Lifetime2}),
		sum("ipsec-remote-id", c.RemoteID),
		sum("fwmark", c.Mark),
		sum("underlay-device", c.Device),
	}
}

// saCounters are the Counters of a pair of SAs: esp.OutboundWords, then esp.InboundWords. index is their index in
// State, -1 if they are memory of this process only.
type saCounters struct {
	index int
	words []atomic.Uint64
}

// countersTag returns the tag that identifies the Counters of a child SA in State.
func countersTag(c *ike.Child) uint64 { return uint64(c.Inbound.SPI)<<32 | uint64(c.Outbound.SPI) }

// countersOf returns the counters of a child SA, which are zero if it is new.
func (n *negotiator) countersOf(c *ike.Child) saCounters {
	counters, ok := n.counters[c.Inbound.SPI]
	if !ok {
		counters = saCounters{index: -1}
		if n.manager.state != nil {
			if index, words, ok := n.manager.state.TakeCounters(countersTag(c)); ok {
				counters = saCounters{index, words}
			}
		}
		if counters.index < 0 {
			counters.words = make([]atomic.Uint64, esp.OutboundWords+esp.InboundWords)
		}
		n.setCounters(c.Inbound.SPI, counters)
	}
	return counters
}

func (n *negotiator) setCounters(spi uint32, counters saCounters) {
	if n.counters == nil {
		n.counters = map[uint32]saCounters{}
	}
	n.counters[spi] = counters
}

func (n *negotiator) releaseCounters(spi uint32) {
	if counters, ok := n.counters[spi]; ok && counters.index >= 0 {
		n.manager.state.ReleaseCounters(counters.index)
	}
	delete(n.counters, spi)
}

var errCounters = errors.New("there are more SAs than can be kept")

// save replaces the record by the present state of the Peer. If that fails it deletes the record: the next process
// must not continue with an old one.
func (n *negotiator) save() {
	state := n.manager.state
	if state == nil || !n.peer.Changed() {
		return
	}
	record := savedSession{Settings: n.settings, IKE: n.peer.Save(bootTime())}
	if record.IKE == nil {
		state.Delete(n.tunnelKey().String())
		return
	}
	var err error
	for _, c := range n.peer.Children() {
		counters := n.countersOf(c)
		if counters.index < 0 {
			err = errCounters
		}
		record.Children = append(record.Children, savedChild{c.Inbound.SPI, counters.index})
	}
	var b bytes.Buffer
	if err == nil {
		err = gob.NewEncoder(&b).Encode(&record)
	}
	if err == nil {
		err = state.Put(n.tunnelKey().String(), b.Bytes())
	}
	if err != nil {
		state.Delete(n.tunnelKey().String())
		if !n.notKept {
			n.notKept = true
			n.emit(EventNotKept, err)
		}
	}
}

// readSaved reads the records of the process before.
func (m *Manager) readSaved() {
	if m.state == nil {
		return
	}
	m.saved = map[tunnelKey][]byte{}
	for key, data := range m.state.Records() {
		one, two, _ := strings.Cut(key, " ")
		local, err := netip.ParseAddr(one)
		remote, err2 := netip.ParseAddr(two)
		if err != nil || err2 != nil {
			m.state.Delete(key)
			continue
		}
		m.saved[tunnelKey{local, remote}] = data
	}
}

// Saved returns the remotes with which there are SAs of the process before, and no Session yet.
func (m *Manager) Saved(local netip.Addr) (remotes []netip.Addr) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for key := range m.saved {
		if key.local == local {
			remotes = append(remotes, key.remote)
		}
	}
	slices.SortFunc(remotes, netip.Addr.Compare)
	return remotes
}

// restore adopts the SAs of the process before, if there are any. It is called before run.
func (n *negotiator) restore(cfg ike.Config) {
	saved := n.saved
	if n.saved = nil; saved == nil {
		return
	}
	if err := n.restoreSaved(cfg, saved); err != nil {
		for spi := range n.counters {
			n.releaseCounters(spi)
		}
		n.manager.state.Delete(n.tunnelKey().String())
		n.emit(EventNotRestored, err)
		return
	}
	for _, c := range n.peer.Children() {
		n.install(c)
	}
	n.setOutbound(n.peer.Current())
	n.restored = true
	n.publish()
}

func (n *negotiator) restoreSaved(cfg ike.Config, saved []byte) error {
	var record savedSession
	if err := gob.NewDecoder(bytes.NewReader(saved)).Decode(&record); err != nil {
		return err
	}
	if len(record.Settings) != len(n.settings) {
		return errors.New("they depend on other settings")
	}
	for i, s := range n.settings {
		if record.Settings[i] != s {
			return errors.New(s.Name + " was another one")
		}
	}
	peer, err := ike.RestorePeer(cfg, time.Now(), bootTime(), record.IKE)
	if err != nil {
		return err
	}
	children := peer.Children()
	if len(children) != len(record.Children) {
		return errors.New("they are damaged")
	}
	for i, c := range children {
		of := record.Children[i]
		words, ok := n.manager.state.AdoptCounters(of.Counters, countersTag(c))
		if !ok || of.Inbound != c.Inbound.SPI || n.counters[of.Inbound].words != nil {
			return errors.New("their sequence numbers are missing")
		}
		n.setCounters(of.Inbound, saCounters{of.Counters, words})
	}
	n.peer = peer
	return nil
}
