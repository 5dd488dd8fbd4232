package fastpath

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"ipipd/encap"
	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
)

// The kernel runs the programs on packets in memory (BPF_PROG_TEST_RUN), and the tests
// compare the output with package encap: the same bytes for a redirected packet, the
// unchanged packet for one passed to userspace.

var (
	local  = [4]byte{192, 0, 2, 1}
	remote = [4]byte{198, 51, 100, 1}
	innerA = [4]byte{10, 255, 0, 1} // behind local
	innerB = [4]byte{10, 255, 0, 2} // behind remote
)

const (
	loopback = 1 // ifindex, which BPF_PROG_TEST_RUN uses
	slot     = 5

	next     = -1 // TCX_NEXT
	dropped  = 2  // TCX_DROP
	redirect = 7  // TCX_REDIRECT
)

// lab holds both programs, loaded, with one tunnel on the loopback device.
type lab struct {
	t testing.TB
	*objects
	cpus  int
	table uint32 // 0 is none
}

func newLab(t testing.TB, tunnel Tunnel) *lab {
	t.Helper()
	o, err := load(etherLen)
	if errors.Is(err, unix.EPERM) {
		t.Skipf("needs CAP_BPF: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(o.close)
	l := &lab{t: t, objects: o, cpus: ebpf.MustPossibleCPU()}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(o.Counters.Put(uint32(slot), make([]counters, l.cpus)))
	must(o.IPIDs.Put(uint32(slot), uint32(0xfffe)))
	l.enable(tunnel)
	return l
}

// enable enters the tunnel, with the table of routes.
func (l *lab) enable(tunnel Tunnel) {
	l.t.Helper()
	if err := errors.Join(l.TxTunnels.Put(uint32(loopback), tunnel.txTunnel(slot, l.table)), l.RxTunnels.Put(tunnel.rxKey(), tunnel.rxTunnel(slot, l.table))); err != nil {
		l.t.Fatal(err)
	}
}

// defaultTunnel has RouterOS's defaults.
func defaultTunnel() Tunnel {
	return Tunnel{
		Ifindex: loopback, MTU: 1480, Local: local, Remote: remote, UnderlayIfindex: loopback, NextHop: remote,
		PathMTU: 1500, DSCP: encap.InheritDSCP, TTL: 255, ClampTCPMSS: true, TxEnabled: true, RxEnabled: true,
	}
}

const etherLen = 14

// run runs a program on an IPv4 packet.
func (l *lab) run(p *ebpf.Program, in []byte) (verdict int, out []byte) {
	l.t.Helper()
	frame := make([]byte, etherLen, etherLen+len(in))
	binary.BigEndian.PutUint16(frame[12:], 0x0800)
	frame = append(frame, in...)
	opts := ebpf.RunOptions{Data: frame, DataOut: make([]byte, len(frame)+256)}
	ret, err := p.Run(&opts)
	if err != nil {
		l.t.Fatalf("run on %x: %v", in, err)
	}
	return int(int32(ret)), opts.DataOut[etherLen:]
}

func (l *lab) counters() (sum counters) {
	l.t.Helper()
	all := make([]counters, l.cpus)
	if err := l.Counters.Lookup(uint32(slot), all); err != nil {
		l.t.Fatal(err)
	}
	for _, c := range all {
		sum.RxPackets += c.RxPackets
		sum.RxBytes += c.RxBytes
		sum.TxPackets += c.TxPackets
		sum.TxBytes += c.TxBytes
		sum.TxFailed += c.TxFailed
		sum.ReversePath += c.ReversePath
		sum.NotInAcceptFrom += c.NotInAcceptFrom
		sum.NotInAcceptTo += c.NotInAcceptTo
		sum.Orphaned += c.Orphaned
		sum.LastReceived = max(sum.LastReceived, c.LastReceived)
	}
	return sum
}

// inner returns an IPv4 packet; TTL 0 means 64.
func inner(h ipv4.Header, payload []byte) []byte {
	if h.TTL == 0 {
		h.TTL = 64
	}
	h.TotalLen = ipv4.HeaderLen + len(payload)
	b := make([]byte, ipv4.HeaderLen, h.TotalLen)
	h.Put(b)
	return append(b, payload...)
}

// udp returns a UDP header and n bytes of data.
func udp(n int) []byte {
	b := make([]byte, 8+n)
	binary.BigEndian.PutUint16(b, 4000)
	binary.BigEndian.PutUint16(b[2:], 5000)
	binary.BigEndian.PutUint16(b[4:], uint16(len(b)))
	return b
}

// tcp returns a TCP header with these flags, and padding for options.
func tcp(flags byte) []byte {
	b := make([]byte, 32)
	b[12], b[13] = 8<<4, flags
	return b
}

// sum sets the checksum of an IPv4 header, options included.
func sum(b []byte) []byte {
	n := min(int(b[0]&0xf)*4, len(b))
	if n >= ipv4.HeaderLen {
		b[10], b[11] = 0, 0
		binary.BigEndian.PutUint16(b[10:], ipv4.Checksum(b[:n], 0))
	}
	return b
}

// buffer returns a copy of p.
func buffer(p []byte) *packet.Buffer {
	b := packet.New(len(p))
	b.Set(p)
	return b
}

// outerOf returns the outer header settings of a tunnel.
func outerOf(t Tunnel) encap.Outer {
	return encap.Outer{Local: t.Local, Remote: t.Remote, DSCP: t.DSCP, TTL: t.TTL, DontFragmentInherit: t.DontFragmentInherit}
}

// checkVerdict fails unless an eligible p was redirected, and any other one passed to
// userspace unchanged and uncounted. It reports whether p was passed.
func (l *lab) checkVerdict(verdict int, eligible bool, p, out []byte, uncounted bool) (passed bool) {
	l.t.Helper()
	want := next
	if eligible {
		want = redirect
	}
	if verdict != want {
		l.t.Fatalf("verdict %d, want %d on %x", verdict, want, p)
	}
	if verdict != next {
		return false
	}
	if !bytes.Equal(out, p) {
		l.t.Fatalf("a packet left to userspace was changed\n%x\n%x", p, out)
	}
	if !uncounted {
		l.t.Fatalf("and it was counted: %+v", l.counters())
	}
	return true
}

// load is loadSpec with new maps.
func load(linkHeader uint32) (*objects, error) {
	spec, err := readObject()
	if err != nil {
		return nil, err
	}
	return loadSpec(spec, linkHeader, nil)
}
