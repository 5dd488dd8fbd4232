//go:build linux && soak

package soak

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/internal/ipv4"
	"ipipd/test/netlab"
)

const (
	etherLen = 14
	// dataLen is the least total length of an outer packet that a ledger counts: what a keepalive,
	// ARP and most of IKE send is shorter.
	dataLen = 500
)

// impairment is what the wire does to frames, each a probability.
type impairment struct {
	loss, double, reorder, damage float64
	// dataOnly spares frames that a ledger does not count.
	dataOnly bool
}

// tally counts outer packets of a pair of addresses: first fragments and whole ones, of dataLen at least.
type tally struct {
	sent      int // by the end, to the wire
	delivered int // to the other end, damaged and doubled ones too
	broken    int // of these, with damage in the outer header: the kernel drops them
}

// pair is outer source and destination.
type pair [8]byte

// port is the wire's end of an end's eth0.
type port struct {
	ns   *netlab.NS
	file *os.File
	peer *port
	// lock guards all that follows, and is not held during writes.
	lock    sync.Mutex
	random  *rand.Rand
	impair  impairment // of what this end sends
	dark    bool       // nothing that this end sends arrives
	held    *frame     // waits for the next one
	tallies map[pair]*tally
	samples [256][]byte // frames of the past, for the forger
	frames  int
	lost    int
}

type frame struct {
	bytes  []byte
	tally  *tally
	broken bool
}

// newPort makes eth0 in ns.
func newPort(ns *netlab.NS, random *rand.Rand) *port {
	p := &port{ns: ns, file: ns.TAP("eth0"), random: random, tallies: map[pair]*tally{}}
	// Its queue is never the limit: packets that it dropped would be counted nowhere else.
	ns.Run("ip", "link", "set", "eth0", "txqueuelen", "20000", "up")
	return p
}

// setCarrier plugs the cable of eth0 in or out.
func (p *port) setCarrier(on bool) error {
	raw, err := p.file.SyscallConn()
	if err != nil {
		return err
	}
	value := 0
	if on {
		value = 1
	}
	var failed error
	err = raw.Control(func(fd uintptr) { failed = unix.IoctlSetPointerInt(int(fd), unix.TUNSETCARRIER, value) })
	return errors.Join(err, failed)
}

// carry passes on the frames that the end sends, until the port is closed.
func (p *port) carry() {
	buf := make([]byte, 1<<16)
	for {
		n, err := p.file.Read(buf)
		if errors.Is(err, os.ErrClosed) {
			return
		}
		if err != nil { // the interface is down
			time.Sleep(10 * time.Millisecond)
			continue
		}
		for _, f := range p.pass(buf[:n]) {
			p.deliver(f)
		}
	}
}

// pass returns the frames that arrive when the end sends one: none, it, damaged or twice, and one that was held.
func (p *port) pass(b []byte) (out []*frame) {
	p.lock.Lock()
	defer p.lock.Unlock()
	p.frames++
	f := &frame{bytes: b}
	ip := b[min(etherLen, len(b)):]
	isIPv4 := len(ip) >= ipv4.HeaderLen && binary.BigEndian.Uint16(b[12:]) == unix.ETH_P_IP
	if isIPv4 {
		p.samples[p.random.IntN(len(p.samples))] = append([]byte(nil), b...)
		if f.tally = p.tallyOf(ip); f.tally != nil {
			f.tally.sent++
		}
	}
	switch {
	case p.dark:
		p.lost++
		return nil
	case !isIPv4 || p.impair.dataOnly && f.tally == nil:
		return []*frame{f}
	case p.random.Float64() < p.impair.loss:
		p.lost++
		return nil
	}
	if p.random.Float64() < p.impair.damage {
		f.bytes = append([]byte(nil), b...)
		at := etherLen + p.random.IntN(len(ip))
		f.bytes[at] ^= 1 << p.random.IntN(8)
		f.broken = at < etherLen+int(ip[0]&0xf)*4
	}
	out = []*frame{f}
	if p.random.Float64() < p.impair.double {
		out = append(out, f)
	}
	if p.held != nil {
		out = append(out, p.held)
		p.held = nil
	} else if p.random.Float64() < p.impair.reorder {
		p.held = &frame{append([]byte(nil), f.bytes...), f.tally, f.broken}
		out = out[1:]
	}
	return out
}

// release delivers the frame that is held for reordering, if there is one.
func (p *port) release() {
	p.lock.Lock()
	f := p.held
	p.held = nil
	p.lock.Unlock()
	if f != nil {
		p.deliver(f)
	}
}

func (p *port) deliver(f *frame) {
	if _, err := p.peer.file.Write(f.bytes); err != nil || f.tally == nil {
		return
	}
	p.lock.Lock()
	defer p.lock.Unlock()
	f.tally.delivered++
	if f.broken {
		f.tally.broken++
	}
}

// tallyOf returns the tally of an IPv4 packet; nil if it is not counted.
func (p *port) tallyOf(ip []byte) *tally {
	if protocol := ip[9]; protocol != ipv4.ProtocolIPIP && protocol != unix.IPPROTO_ESP {
		return nil
	}
	if fragment := binary.BigEndian.Uint16(ip[6:]); fragment&0x1fff != 0 || binary.BigEndian.Uint16(ip[2:]) < dataLen {
		return nil
	}
	key := pair(ip[12:20])
	if p.tallies[key] == nil {
		p.tallies[key] = &tally{}
	}
	return p.tallies[key]
}

// set sets the impairment of what this end sends.
func (p *port) set(i impairment) {
	p.lock.Lock()
	p.impair = i
	p.lock.Unlock()
	p.release()
}

func (p *port) setDark(dark bool) {
	p.lock.Lock()
	p.dark = dark
	p.lock.Unlock()
}

// counted returns the tallies so far.
func (p *port) counted() map[pair]tally {
	p.lock.Lock()
	defer p.lock.Unlock()
	all := map[pair]tally{}
	for key, t := range p.tallies {
		all[key] = *t
	}
	return all
}

// sample returns a frame of the past; nil if there is none at that place.
func (p *port) sample(i int) []byte {
	p.lock.Lock()
	defer p.lock.Unlock()
	return append([]byte(nil), p.samples[i%len(p.samples)]...)
}
