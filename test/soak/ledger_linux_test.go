//go:build linux && soak

package soak

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/internal/drop"
	"ipipd/test/netlab"
)

// firstPort is the UDP port of the first flow, at both ends. Each flow has its own, since some share an inner address.
const firstPort = 7000

// conversation is the traffic of a flow, with a UDP socket at each end, bound to its inner address.
type conversation struct {
	flow
	port  uint16
	conns [2]*net.UDPConn
	// received counts the packets of the present ledger that each end has got.
	received [2]atomic.Int64
	s        *soak
}

// open opens the sockets. IP_FREEBIND: the addresses come and go with the tunnels.
func (s *soak) open(f flow, port uint16) *conversation {
	c := &conversation{flow: f, port: port, s: s}
	for i, e := range s.ends {
		config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) (err error) {
			_ = raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_FREEBIND, 1) })
			return err
		}}
		var conn net.PacketConn
		var err error
		e.ns.Do(func() {
			conn, err = config.ListenPacket(s.ctx, "udp4", netip.AddrPortFrom(f.inner[i], port).String())
		})
		if err != nil {
			s.t.Fatal(err)
		}
		c.conns[i] = conn.(*net.UDPConn)
		_ = c.conns[i].SetReadBuffer(4 << 20)
		s.t.Cleanup(func() { conn.Close() })
		go func() {
			b := make([]byte, 1<<16)
			for {
				n, err := c.conns[i].Read(b)
				if err != nil {
					return
				}
				if n >= 4 && binary.BigEndian.Uint32(b) == s.ledger.Load() {
					c.received[i].Add(1)
				}
			}
		}()
	}
	return c
}

// send sends a packet from an end, with size bytes of payload, and reports whether the kernel took it.
func (c *conversation) send(from int, ledger uint32, size int) bool {
	b := make([]byte, max(size, 4))
	binary.BigEndian.PutUint32(b, ledger)
	_, err := c.conns[from].WriteToUDPAddrPort(b, netip.AddrPortFrom(c.inner[1-from], c.port))
	return err == nil
}

// account has the counters of an end.
type account struct {
	tx, rx, txDrops, rxDrops map[string]uint64 // by tunnel
	process                  uint64            // received packets of no tunnel
	reasons                  map[string]uint64
}

var directions = func() map[string]drop.Direction {
	all := map[string]drop.Direction{}
	for r := range drop.All() {
		all[r.String()] = r.Direction()
	}
	return all
}()

func (e *end) account() (account, error) {
	all, err := e.status()
	a := account{map[string]uint64{}, map[string]uint64{}, map[string]uint64{}, map[string]uint64{}, 0, map[string]uint64{}}
	for name, s := range all {
		a.tx[name], a.rx[name] = s.TxPacket, s.RxPacket
		for reason, n := range s.Drops {
			a.reasons[reason] += n
			switch directions[reason] {
			case drop.Transmit:
				a.txDrops[name] += n
			case drop.Receive:
				a.rxDrops[name] += n
			}
		}
		a.process = 0
		for reason, n := range s.ProcessDrops {
			if a.reasons[reason] = n; directions[reason] != "" {
				a.process += n
			}
		}
	}
	return a, err
}

// picture has the counters of both ends and of the wire at one moment.
type picture struct {
	ends [2]account
	wire [2]map[pair]tally
	lost [2]uint64 // what eth0 has dropped of what was sent
}

func (s *soak) picture() (p picture, err error) {
	for i, e := range s.ends {
		if p.ends[i], err = e.account(); err != nil {
			return p, fmt.Errorf("end %s: %w", e.name, err)
		}
		p.wire[i] = e.port.counted()
		_, counters, _ := strings.Cut(e.try("cat /proc/net/dev"), "eth0:")
		if fields := strings.Fields(counters); len(fields) > 11 {
			p.lost[i], _ = strconv.ParseUint(fields[11], 10, 64)
		}
	}
	return p, nil
}

// standstill returns a picture in which nothing changes for a while.
func (s *soak) standstill() (picture, error) {
	before, err := s.picture()
	for end := time.Now().Add(netlab.Timeout()); ; {
		time.Sleep(netlab.Scale(700 * time.Millisecond))
		now, nowErr := s.picture()
		if err == nil && nowErr == nil && fmt.Sprint(now) == fmt.Sprint(before) {
			return now, nil
		}
		if before, err = now, nowErr; time.Now().After(end) {
			return now, fmt.Errorf("the counters do not stand still: %w", cmp.Or(nowErr, errors.New("packets are still counted")))
		}
	}
}

// balance sends n packets over each flow in both directions, impaired by the wire, and checks that the
// counters account for each.
func (s *soak) balance(what string, i impairment, n int) {
	before, err := s.standstill()
	if err != nil {
		s.failf("%s: %v", what, err)
		return
	}
	ledger := s.ledger.Add(1)
	for _, e := range s.ends {
		e.port.set(i)
	}
	for _, c := range s.conversations {
		c.received[0].Store(0)
		c.received[1].Store(0)
	}
	var sent [2]map[string]int
	sent[0], sent[1] = map[string]int{}, map[string]int{}
	var wait sync.WaitGroup
	var lock sync.Mutex
	for c := range s.conversations {
		for from := range 2 {
			wait.Go(func() {
				taken := 0
				for k := range n {
					if s.conversations[c].send(from, ledger, 600+k*7%600) {
						taken++
					}
					time.Sleep(5 * time.Millisecond)
				}
				lock.Lock()
				sent[from][s.conversations[c].tunnel[from]] += taken
				lock.Unlock()
			})
		}
	}
	wait.Wait()
	for _, e := range s.ends {
		e.port.set(impairment{})
	}
	if !s.agrees(what, func(now picture) []string { return s.compare(before, now, sent, i) }) {
		return
	}
	total := 0
	for from := range 2 {
		for _, n := range sent[from] {
			total += n
		}
	}
	s.logf("ledger: %s: %d packets, all accounted for", what, total)
}

// agrees reports whether the counters agree once they stand still. It tries again for a while, since they may lag.
func (s *soak) agrees(what string, compare func(now picture) []string) bool {
	const patience = 30 * time.Second
	for began := time.Now(); ; {
		now, err := s.standstill()
		if err != nil {
			s.failf("%s: %v", what, err)
			return false
		}
		problems := compare(now)
		if len(problems) == 0 {
			return true
		}
		if time.Since(began) > patience || s.ctx.Err() != nil {
			for _, p := range problems {
				s.failf("%s: %s", what, p)
			}
			return false
		}
		s.logf("ledger: %s: not yet: %s", what, problems[0])
	}
}

// compare returns the counters that do not agree.
func (s *soak) compare(before, now picture, sent [2]map[string]int, i impairment) (problems []string) {
	clean := i == impairment{}
	problem := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	for from, e := range s.ends {
		to := s.ends[1-from]
		b, a := before.ends[from], now.ends[from]
		wire, delivered := map[string]int{}, map[string]int{}
		got, allDelivered, broken := map[string]int{}, 0, 0
		for _, c := range s.conversations {
			key := pair{}
			o := c.outer[from].As4()
			copy(key[:4], o[:])
			o = c.outer[1-from].As4()
			copy(key[4:], o[:])
			was, is := before.wire[from][key], now.wire[from][key]
			wire[c.tunnel[from]] += is.sent - was.sent
			delivered[c.tunnel[1-from]] += is.delivered - was.delivered
			allDelivered += is.delivered - was.delivered
			broken += is.broken - was.broken
			got[c.tunnel[1-from]] += int(c.received[1-from].Load())
		}
		for _, t := range e.tunnels {
			tx, drops := int(a.tx[t.name]-b.tx[t.name]), int(a.txDrops[t.name]-b.txDrops[t.name])
			if tx+drops != sent[from][t.name] {
				problem("end %s, %s: %d packets into the interface, %d sent and %d dropped (%s)", e.name, t.name, sent[from][t.name], tx, drops, difference(b.reasons, a.reasons))
			}
			if wire[t.name] != tx {
				problem("end %s, %s: %d sent, %d on the wire, %d dropped by eth0", e.name, t.name, tx, wire[t.name], now.lost[from]-before.lost[from])
			}
			if clean && drops != 0 {
				problem("end %s, %s: %d packets dropped of %d while all was well (%s)", e.name, t.name, drops, sent[from][t.name], difference(b.reasons, a.reasons))
			}
		}
		b, a = before.ends[1-from], now.ends[1-from]
		all := int(a.process - b.process)
		for _, t := range to.tunnels {
			rx, drops := int(a.rx[t.name]-b.rx[t.name]), int(a.rxDrops[t.name]-b.rxDrops[t.name])
			all += rx + drops
			if clean && (rx != delivered[t.name] || drops != 0 || got[t.name] != rx) {
				problem("end %s, %s: %d delivered by the wire, %d received and %d dropped (%s), %d of them came to their socket", to.name, t.name, delivered[t.name], rx, drops,
					difference(b.reasons, a.reasons), got[t.name])
			}
		}
		// The fast path of many remotes refuses an outer source before the kernel looks at the checksum.
		refused := int(a.reasons["reverse-path"] - b.reasons["reverse-path"])
		if extra := all + broken - allDelivered; extra < 0 || extra > min(refused, broken) {
			problem("end %s: %d delivered by the wire, of which %d with a broken outer header; %d received and dropped (%s)", to.name, allDelivered, broken, all, difference(b.reasons, a.reasons))
		}
	}
	return problems
}

// difference returns the drop counters that have grown, and by how much.
func difference(before, after map[string]uint64) string {
	var all []string
	for reason, n := range after {
		if n != before[reason] {
			all = append(all, fmt.Sprintf("%s=%d", reason, n-before[reason]))
		}
	}
	return strings.Join(all, " ")
}
