package conformance

import (
	"encoding/binary"
	"net"
	"sync"
	"testing"
	"time"

	"ipipd/test/netlab"
)

// Threads and queues share flows, not the packets of a flow: each flow arrives in order, and so
// do replies, for which the kernel may change the TUN queue after the first.
func TestReordering_perFlow(t *testing.T) {
	t.Parallel()
	for _, u := range underlays[:2] {
		t.Run(u.name, func(t *testing.T) {
			for _, c := range append([]variant{{name: "four-threads", flags: []string{"--threads", "4", "--tun-queues", "4", "--allow-fast-path", "no"}}}, variants...) {
				t.Run(c.name, func(t *testing.T) {
					t.Parallel()
					a, b := hosts(t)
					if u.wire != nil {
						u.wire(a, b)
					}
					c.upA(t, a)
					c.upB(t, b)
					ping(t, a, innerB)
					var flows sync.WaitGroup
					for range 8 {
						flows.Go(func() { sendNumbered(t, a, b) })
					}
					flows.Wait()
				})
			}
		})
	}
}

// sendNumbered sends numbered datagrams from a to b, and b sends them back. Some may be lost,
// but none may be reordered.
func sendNumbered(t *testing.T, a, b *netlab.NS) {
	near, far := listenUDP(t, a, innerA+":0"), listenUDP(t, b, innerB+":0")
	// inOrder reads datagrams, passes each to then, and returns after the last number, which
	// is repeated until it arrives.
	const count = 4000
	inOrder := func(at string, read func([]byte) (int, error), then func([]byte)) {
		buf := make([]byte, 2048)
		n, next := 0, uint32(0)
		for next < count {
			size, err := read(buf)
			if err != nil {
				t.Errorf("at %s the last did not come: %v", at, err)
				return
			}
			if got := binary.BigEndian.Uint32(buf); got < next {
				t.Errorf("at %s number %d came behind %d", at, got, next-1)
				return
			} else {
				next = got + 1
			}
			n++
			then(buf[:size])
		}
		if n < count/100 {
			t.Errorf("at %s only %d of %d came", at, n, count)
		}
	}
	end := time.Now().Add(netlab.Timeout())
	_, _ = near.SetReadDeadline(end), far.SetReadDeadline(end)
	var ends sync.WaitGroup
	ends.Go(func() {
		var from net.Addr
		read := func(buf []byte) (n int, err error) {
			n, from, err = far.ReadFrom(buf)
			return n, err
		}
		back := func(p []byte) { _, _ = far.WriteTo(p, from) }
		inOrder("b", read, back)
		for buf := make([]byte, 2048); ; { // the last again, as its reply may be lost
			n, err := read(buf)
			if err != nil {
				return
			}
			back(buf[:n])
		}
	})
	returned := make(chan struct{})
	ends.Go(func() {
		defer close(returned)
		inOrder("a", func(buf []byte) (n int, err error) {
			n, _, err = near.ReadFrom(buf)
			return n, err
		}, func([]byte) {})
	})
	p := make([]byte, 600)
	for i := range uint32(count) {
		binary.BigEndian.PutUint32(p, i)
		if _, err := near.WriteTo(p, far.LocalAddr()); err != nil {
			t.Errorf("send: %v", err)
			break
		}
		if i%64 == 63 {
			time.Sleep(time.Millisecond) // otherwise most are lost
		}
	}
	for again := true; again; {
		select {
		case <-returned:
			again = false
		case <-time.After(10 * time.Millisecond):
			_, _ = near.WriteTo(p, far.LocalAddr())
		}
	}
	_ = far.SetReadDeadline(time.Now())
	ends.Wait()
}
