package memory

import (
	"bytes"
	"errors"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/internal/packet"
	"ipipd/internal/underlay"
	"ipipd/tun"
)

var path = &underlay.Path{MTU: 1500}

func filled(n int, b byte) []byte { return bytes.Repeat([]byte{b}, n) }

func batchOf(packets ...[]byte) []*packet.Buffer {
	batch := packet.NewBatch(len(packets), packet.MaxSize)
	for i, p := range packets {
		batch[i].Set(p)
	}
	return batch
}

func TestDevice(t *testing.T) {
	d := NewDevice("ipip1", 1480)
	q, scratch := d.Queues()[0], new(tun.Scratch)
	for i := range 3 {
		if err := d.Inject(filled(100, byte(i))); err != nil {
			t.Fatal(err)
		}
	}
	batch := packet.NewBatch(8, 1480)
	if n, err := q.Read(scratch, batch); n != 3 || err != nil || batch[2].Bytes()[0] != 2 {
		t.Errorf("Read: %d, %v", n, err)
	}
	batch[0].Offload = packet.Offload{Checksum: packet.ChecksumPartial, SegmentSize: 50}
	if n, err := q.Write(scratch, batch[:2]); n != 2 || err != nil {
		t.Errorf("Write: %d, %v", n, err)
	}
	if b := d.ReceiveWithin(time.Minute); b == nil || b.Len() != 100 || b.Offload != batch[0].Offload {
		t.Errorf("received %+v", b)
	}
	if err := d.Receive(batch[5]); err != nil || batch[5].Bytes()[0] != 1 {
		t.Errorf("Receive: %v", err)
	}
	if b := d.ReceiveWithin(time.Millisecond); b != nil {
		t.Errorf("received %x", b.Bytes())
	}
	if err := d.Inject(filled(1481, 0)); !errors.Is(err, syscall.EMSGSIZE) {
		t.Errorf("Inject beyond the MTU: %v", err)
	}
}

// The descriptors are readable exactly while there are packets.
func TestRing_fd(t *testing.T) {
	d := NewDevice("ipip1", 1480)
	d.Inject(filled(20, 1)) // before somebody asks
	q := d.Queues()[0]
	fds := []unix.PollFd{{Fd: int32(q.FD()), Events: unix.POLLIN}}
	readable := func() bool {
		n, _ := unix.Poll(fds, 0)
		return n == 1
	}
	batch := packet.NewBatch(1, 1480)
	for i := range 3 {
		d.Inject(filled(20, 2))
		for left := 2 - min(i, 1); left > 0; left-- {
			if !readable() {
				t.Fatalf("round %d: not readable, and there are %d packets", i, left)
			}
			q.Read(new(tun.Scratch), batch)
		}
		if n, err := q.Read(new(tun.Scratch), batch); n != 0 || err != nil || readable() {
			t.Errorf("round %d: %d, %v, readable %v", i, n, err, readable())
		}
	}
}

func TestDeviceInject_noCarrier(t *testing.T) {
	d := NewDevice("ipip1", 1480)
	d.SetCarrier(false)
	d.Inject(filled(20, 1))
	d.SetCarrier(true)
	d.Inject(filled(20, 2))
	batch := packet.NewBatch(2, 1480)
	if n, err := d.Queues()[0].Read(new(tun.Scratch), batch); n != 1 || err != nil || batch[0].Bytes()[0] != 2 {
		t.Errorf("Read: %d, %v", n, err)
	}
}

// Close of a Device and of a Socket unblocks whoever waits, and all calls fail after it.
func TestDeviceClose(t *testing.T) {
	d := NewDevice("ipip1", 1480)
	s, _ := NewSocketPair()
	readers := []func() error{
		func() error { return d.Receive(packet.New(1480)) },
		func() error { _, err := s.ReadError(make([]byte, 576)); return err },
	}
	errs := make(chan error)
	for _, read := range readers {
		go func() { errs <- read() }()
	}
	d.Close()
	s.Close()
	for range readers {
		if err := <-errs; !errors.Is(err, os.ErrClosed) {
			t.Errorf("%v", err)
		}
	}
	if _, err := d.Queues()[0].Read(new(tun.Scratch), packet.NewBatch(1, 1480)); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Read of the device: %v", err)
	}
	if _, err := s.Receivers()[0].Read(packet.NewBatch(1, 1480)); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Read of the socket: %v", err)
	}
	if _, err := d.Queues()[0].Write(new(tun.Scratch), batchOf(filled(20, 0))); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Write to the device: %v", err)
	}
	if _, err := s.NewSender().Write(batchOf(filled(20, 0)), []*underlay.Path{path}); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Write to the socket: %v", err)
	}
	if err := d.Inject(filled(20, 0)); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Inject: %v", err)
	}
}

// A Socket carries packets in both directions and enforces the path MTU for DF only.
func TestSocket(t *testing.T) {
	a, b := NewSocketPair()
	withDF := filled(1501, 1)
	withDF[6] = 0x40
	without := filled(3000, 2)
	without[6] = 0
	n, err := a.NewSender().Write(batchOf(filled(1500, 0), withDF, without), []*underlay.Path{path})
	if n != 2 || !errors.Is(err, syscall.EMSGSIZE) {
		t.Errorf("Write: %d, %v", n, err)
	}
	batch := packet.NewBatch(8, packet.MaxSize)
	if n, err := b.Receivers()[0].Read(batch); n != 2 || err != nil || batch[1].Len() != 3000 {
		t.Errorf("Read: %d, %v", n, err)
	}
	if _, err := b.NewSender().Write(batch[:1], []*underlay.Path{path}); err != nil || a.ReceiveWithin(time.Minute) == nil {
		t.Errorf("the reverse direction: %v", err)
	}
	if err := a.InjectError([]byte{1, 2, 3}); err != nil {
		t.Error(err)
	}
	buf := make([]byte, 8)
	if n, err := a.ReadError(buf); err != nil || !bytes.Equal(buf[:n], []byte{1, 2, 3}) {
		t.Errorf("ReadError: %x, %v", buf[:n], err)
	}
}

func TestFaults(t *testing.T) {
	const sent = 200
	arrivals := func(f Faults) (order []byte, damaged int) {
		a, b := NewSocketPair()
		a.SetFaults(f)
		sender := a.NewSender()
		for i := range sent {
			sender.Write(batchOf(filled(100, byte(i))), []*underlay.Path{path})
		}
		batch := packet.NewBatch(2*sent, 100)
		n := 0
		if b.in.n > 0 {
			n, _ = b.Receivers()[0].Read(batch)
		}
		for _, p := range batch[:n] {
			order = append(order, p.Bytes()[50])
			if !bytes.Equal(p.Bytes(), filled(100, p.Bytes()[0])) {
				damaged++
			}
		}
		return order, damaged
	}
	if got, _ := arrivals(Faults{Loss: 1}); len(got) != 0 {
		t.Errorf("%d arrived of those lost", len(got))
	}
	if got, _ := arrivals(Faults{Duplicate: 1}); len(got) != 2*sent || got[0] != got[1] {
		t.Errorf("%d arrived of those doubled", len(got))
	}
	if got, _ := arrivals(Faults{Reorder: 1}); len(got) != sent || got[0] != 1 || got[1] != 0 {
		t.Errorf("%d arrived, as %v", len(got), got[:4])
	}
	if _, damaged := arrivals(Faults{Corrupt: 1}); damaged != sent {
		t.Errorf("%d were damaged", damaged)
	}
	mixed := Faults{Loss: .1, Duplicate: .1, Reorder: .1, Corrupt: .1, Seed: 7}
	first, _ := arrivals(mixed)
	if second, _ := arrivals(mixed); !bytes.Equal(first, second) {
		t.Error("not the same each time")
	}
}

// A full receive buffer drops packets and counts them, a full TUN queue returns ENOBUFS.
func TestRing_full(t *testing.T) {
	a, b := NewSocketPair()
	d := NewDevice("ipip1", 1480)
	sender := a.NewSender()
	for range capacity {
		sender.Write(batchOf([]byte{1}), []*underlay.Path{path})
		d.Queues()[0].Write(new(tun.Scratch), batchOf([]byte{1}))
	}
	if n, err := sender.Write(batchOf([]byte{1}), []*underlay.Path{path}); n != 1 || err != nil || b.Overflows() != 1 {
		t.Errorf("Write: %d, %v; %d overflows", n, err, b.Overflows())
	}
	if n, err := d.Queues()[0].Write(new(tun.Scratch), batchOf([]byte{1})); n != 0 || !errors.Is(err, syscall.ENOBUFS) {
		t.Errorf("Write: %d, %v", n, err)
	}
}

func TestRing_allocs(t *testing.T) {
	a, b := NewSocketPair()
	d := NewDevice("ipip1", 1480)
	p := filled(1400, 1)
	batch := packet.NewBatch(4, packet.MaxSize)
	sender, receiver, queue, scratch := a.NewSender(), b.Receivers()[0], d.Queues()[0], new(tun.Scratch)
	roundTrip := func() {
		d.Inject(p)
		n, _ := queue.Read(scratch, batch)
		sender.Write(batch[:n], []*underlay.Path{path})
		n, _ = receiver.Read(batch)
		queue.Write(scratch, batch[:n])
		d.Receive(batch[0])
	}
	for range capacity { // each slot once
		roundTrip()
	}
	if allocs := testing.AllocsPerRun(100, roundTrip); allocs != 0 {
		t.Errorf("%v allocations", allocs)
	}
}
