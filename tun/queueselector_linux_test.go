package tun

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
	"ipipd/test/netlab"
)

// requireQueueSelector skips the test without CAP_BPF, and fails it if the kernel rejects the
// program otherwise.
func requireQueueSelector(t *testing.T) {
	t.Helper()
	program, err := loadQueueSelector()
	if errors.Is(err, unix.EPERM) {
		t.Skipf("needs CAP_BPF: %v", err)
	} else if err != nil {
		t.Fatal(err)
	}
	program.Close()
}

// A flow stays in its queue although its replies are written to another: RSS of the underlay
// NIC does not know the queues.
func TestAttachQueueSelector_flowKeepsQueue(t *testing.T) {
	ns := netlab.New(t)
	requireQueueSelector(t)
	d := openIn(t, ns, Options{Queues: 4, OnDegraded: func(err error) { t.Error(err) }})
	received := make(chan [2]int) // port and queue
	for i, q := range d.Queues() {
		go func() {
			batch, scratch := packet.NewBatch(8, 2048), new(Scratch)
			for {
				n, err := readSome(q, scratch, batch)
				if err != nil {
					return
				}
				for _, b := range batch[:n] {
					if p := b.Bytes(); len(p) == 20+8+4 && p[9] == 17 {
						received <- [2]int{int(binary.BigEndian.Uint16(p[20:])), i}
					}
				}
			}
		}()
	}
	const flows = 64
	used := map[int]int{}
	for flow := range flows {
		port := 2000 + flow
		c := dialIn(t, ns, fmt.Sprintf("10.9.0.1:%d", port), "10.9.0.2:9")
		queue := -1
		for round := range 5 {
			if _, err := c.Write([]byte("data")); err != nil {
				t.Fatal(err)
			}
			got := <-received
			if got[0] != port {
				t.Fatalf("a packet of port %d instead of %d", got[0], port)
			}
			if queue >= 0 && got[1] != queue {
				t.Fatalf("port %d was in queue %d, and is in %d", port, queue, got[1])
			}
			queue = got[1]
			p := spec{payload: []byte("back")}.build()
			copy(p[ipv4.HeaderLen:], []byte{0, 9, byte(port >> 8), byte(port)})
			copy(p[ipv4.HeaderLen+ipv4.OffUDPChecksum:], []byte{0, 0}) // none
			reply := packet.New(2048)
			reply.Set(p)
			if _, err := d.Queues()[(queue+round)%4].Write(new(Scratch), []*packet.Buffer{reply}); err != nil {
				t.Fatal(err)
			}
		}
		used[queue]++
	}
	for i := range 4 {
		if used[i] < flows/16 {
			t.Errorf("of %d flows %d are in queue %d: %v", flows, used[i], i, used)
		}
	}
}

// A signal, such as Go's preemption signal, interrupts the verifier (EAGAIN).
func TestLoadQueueSelector_signals(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	process, thread := unix.Getpid(), unix.Gettid()
	loaded := make(chan struct{})
	var interrupting sync.WaitGroup
	interrupting.Go(func() {
		for {
			select {
			case <-loaded:
				return
			default:
				_ = unix.Tgkill(process, thread, unix.SIGURG)
			}
		}
	})
	defer interrupting.Wait()
	defer close(loaded)
	for range 50 {
		requireQueueSelector(t)
	}
}
