package demo

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/icmp"
	netipv4 "golang.org/x/net/ipv4"
)

// flow is a pair of inner addresses of hosts.
type flow struct {
	from     *host
	src, dst netip.Addr
}

// reply is an echo reply.
type reply struct {
	size, ttl int
	after     time.Duration
}

// pinger sends ICMP echo requests on a host.
type pinger struct {
	conn    *icmp.PacketConn
	lock    sync.Mutex
	waiting map[int]chan reply // by sequence number
	seq     int
	sent    atomic.Int64
}

// newPinger opens a raw ICMP socket on a host.
func newPinger(h *host) (p *pinger, err error) {
	err = h.namespace.Do(func() error {
		conn, err := icmp.ListenPacket("ip4:icmp", "0.0.0.0")
		if err != nil {
			return err
		}
		if err := conn.IPv4PacketConn().SetControlMessage(netipv4.FlagTTL, true); err != nil {
			conn.Close()
			return err
		}
		p = &pinger{conn: conn, waiting: map[int]chan reply{}}
		go p.receive()
		return nil
	})
	return p, err
}

func (p *pinger) close() { p.conn.Close() }

// receive passes replies to the calls of once that wait for them, until the socket is closed.
func (p *pinger) receive() {
	buf := make([]byte, 1500)
	for {
		n, control, _, err := p.conn.IPv4PacketConn().ReadFrom(buf)
		if err != nil {
			return
		}
		message, err := icmp.ParseMessage(1, buf[:n])
		if err != nil || message.Type != netipv4.ICMPTypeEchoReply {
			continue
		}
		if echo, ok := message.Body.(*icmp.Echo); ok {
			p.lock.Lock()
			if to := p.waiting[echo.Seq]; to != nil {
				delete(p.waiting, echo.Seq)
				to <- reply{size: n, ttl: control.TTL}
			}
			p.lock.Unlock()
		}
	}
}

// once sends an echo request, and waits for its reply, for patience at most.
func (p *pinger) once(ctx context.Context, src, dst netip.Addr, patience time.Duration) (r reply, answered bool, err error) {
	to := make(chan reply, 1)
	p.lock.Lock()
	p.seq++
	seq := p.seq & 0xffff
	p.waiting[seq] = to
	p.lock.Unlock()
	request := icmp.Message{Type: netipv4.ICMPTypeEcho, Body: &icmp.Echo{ID: os.Getpid() & 0xffff, Seq: seq, Data: make([]byte, 56)}}
	message, err := request.Marshal(nil)
	if err != nil {
		return reply{}, false, err
	}
	start := time.Now()
	p.sent.Add(1)
	// An error is about a route that is not there yet, or an earlier ICMP error: no reply comes then.
	_, _ = p.conn.IPv4PacketConn().WriteTo(message, &netipv4.ControlMessage{Src: src.AsSlice()}, &net.IPAddr{IP: dst.AsSlice()})
	select {
	case r := <-to:
		r.after = time.Since(start)
		return r, true, nil
	case <-time.After(patience):
	case <-ctx.Done():
		return reply{}, false, ctx.Err()
	}
	p.lock.Lock()
	delete(p.waiting, seq)
	p.lock.Unlock()
	return reply{}, false, nil
}

// reach pings until there is a reply.
func (p *pinger) reach(ctx context.Context, src, dst netip.Addr) (reply, error) {
	const patience = 200 * time.Millisecond
	for {
		r, answered, err := p.once(ctx, src, dst, patience)
		if err != nil {
			return r, fmt.Errorf("%v does not answer %v: %w", dst, src, err)
		}
		if answered {
			return r, nil
		}
	}
}

// reachAll pings along all flows, some at a time, until each has had a reply. It returns the round-trip time of that
// reply for each, and the number of requests.
func reachAll(ctx context.Context, flows []flow) (took []time.Duration, sent int64, err error) {
	pingers := map[*host]*pinger{}
	for _, f := range flows {
		if pingers[f.from] == nil {
			p, err := newPinger(f.from)
			if err != nil {
				return nil, 0, err
			}
			defer p.close()
			pingers[f.from] = p
		}
	}
	const atATime = 16
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var group sync.WaitGroup
	took = make([]time.Duration, len(flows))
	slots := make(chan bool, atATime)
	for i, f := range flows {
		slots <- true
		group.Go(func() {
			defer func() { <-slots }()
			r, err := pingers[f.from].reach(ctx, f.src, f.dst)
			if err != nil {
				cancel(err)
			}
			took[i] = r.after
		})
	}
	group.Wait()
	for _, p := range pingers {
		sent += p.sent.Load()
	}
	return took, sent, context.Cause(ctx)
}
