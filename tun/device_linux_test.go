package tun

import (
	"bytes"
	"errors"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/internal/ipv4"
	"ipipd/internal/packet"
	"ipipd/test/netlab"
)

// openIn opens a device in ns, with address 10.9.0.1/24, and sets it up.
func openIn(t testing.TB, ns *netlab.NS, o Options) Device {
	t.Helper()
	var d Device
	var err error
	ns.Do(func() { d, err = Open(o) })
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOENT) {
		t.Skipf("needs /dev/net/tun and CAP_NET_ADMIN: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	ns.Run("ip", "address", "add", "10.9.0.1/24", "dev", d.Name())
	ns.Run("ip", "link", "set", d.Name(), "up")
	return d
}

// eachBackend runs f with offload and, through water, without.
func eachBackend(t *testing.T, f func(t *testing.T, o Options)) {
	t.Run("offload", func(t *testing.T) { f(t, Options{}) })
	t.Run("water", func(t *testing.T) { f(t, Options{NoOffload: true}) })
}

// dialIn returns a connected UDP socket in ns.
func dialIn(t testing.TB, ns *netlab.NS, local, remote string) *net.UDPConn {
	t.Helper()
	var c *net.UDPConn
	var err error
	l, _ := net.ResolveUDPAddr("udp4", local)
	r, _ := net.ResolveUDPAddr("udp4", remote)
	ns.Do(func() { c, err = net.DialUDP("udp4", l, r) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestDevice_readAndWrite(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		ns := netlab.New(t)
		d := openIn(t, ns, o)
		c := dialIn(t, ns, "10.9.0.1:7000", "10.9.0.2:7001")
		if _, err := c.Write([]byte("there")); err != nil {
			t.Fatal(err)
		}
		batch, scratch := packet.NewBatch(8, 1500), new(Scratch)
		n, err := readSome(d.Queues()[0], scratch, batch)
		if err != nil || n != 1 {
			t.Fatalf("Read: %d, %v", n, err)
		}
		p := batch[0].Bytes()
		checkPacket(t, p)
		if !bytes.Equal(p[28:], []byte("there")) {
			t.Errorf("read %x", p)
		}
		reverse(p)
		copy(p[28:], "HERE!")
		tr, _ := parseTransport(p)
		tr.putChecksum(p)
		batch[0].Offload = packet.Offload{}
		if n, err := d.Queues()[0].Write(scratch, batch[:1]); n != 1 || err != nil {
			t.Fatalf("Write: %d, %v", n, err)
		}
		got := make([]byte, 100)
		c.SetReadDeadline(time.Now().Add(netlab.Timeout()))
		if n, err := c.Read(got); err != nil || string(got[:n]) != "HERE!" {
			t.Errorf("the stack got %q, %v", got[:n], err)
		}
	})
}

// reverse swaps the addresses and ports of p.
func reverse(p []byte) {
	for i := range 4 {
		p[12+i], p[16+i] = p[16+i], p[12+i]
	}
	for i := range 2 {
		p[20+i], p[22+i] = p[22+i], p[20+i]
	}
}

// checkPacket checks the lengths and checksums of a TCP or UDP packet.
func checkPacket(t testing.TB, p []byte) {
	t.Helper()
	if _, err := ipv4.Parse(p); err != nil {
		t.Errorf("%v: %x", err, p)
		return
	}
	tr, ok := parseTransport(p)
	b := packet.New(len(p))
	b.Set(p)
	if !ok || !tr.checksumsValid(b) {
		t.Errorf("bad TCP or UDP header or checksum (parsed: %v): %x", ok, p)
	}
}

func TestOpen_nameTaken(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		ns := netlab.New(t)
		first := openIn(t, ns, o)
		if first.Name() != "ipip1" {
			t.Errorf("the first free name was %q", first.Name())
		}
		ns.Run("ip", "tuntap", "add", "mode", "tun", "name", "persistent")
		for _, name := range []string{first.Name(), "persistent", "lo"} {
			o.Name = name
			ns.Do(func() {
				if d, err := Open(o); !errors.Is(err, ErrNameTaken) {
					t.Errorf("Open(%q) = %v, %v", name, d, err)
				} else if strings.Contains(err.Error(), "\n") {
					t.Errorf("more than one line: %v", err)
				}
			})
			ns.Run("ip", "link", "show", "dev", name)
		}
		o.Name = ""
		if second := openIn(t, ns, o); second.Name() != "ipip2" {
			t.Errorf("the second free name was %q", second.Name())
		}
	})
}

func TestOpen_badName(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		for _, name := range []string{"sixteen-bytes-xx", "a/b", "a b", "tun%d", ".", "..", "a\nb", "x:1", "all", "é"} {
			o.Name = name
			if d, err := Open(o); err == nil || !strings.Contains(err.Error(), "not accepted") {
				t.Errorf("Open(%q) = %v, %v", name, d, err)
			}
		}
	})
}

// FD is readable when there are packets, and Read does not wait for any.
func TestQueueFD(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		ns := netlab.New(t)
		d := openIn(t, ns, o)
		q, scratch := d.Queues()[0], new(Scratch)
		readable := func(timeout int) bool {
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(q.FD()), Events: unix.POLLIN}}, timeout)
			if err != nil && err != unix.EINTR {
				t.Fatal(err)
			}
			return n == 1
		}
		batch := packet.NewBatch(4, 1500)
		if n, err := q.Read(scratch, batch); n != 0 || err != nil || readable(0) {
			t.Errorf("Read without packets: %d, %v", n, err)
		}
		ns.Run("ip", "address", "add", "10.0.0.1/24", "dev", d.Name())
		ns.Run("ip", "link", "set", "up", "dev", d.Name())
		ns.Do(func() {
			conn, err := net.Dial("udp4", "10.0.0.2:9")
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			_, _ = conn.Write([]byte("datagram!"))
		})
		netlab.Eventually(t, "it is readable after a packet", func() bool { return readable(100) })
		if n, err := q.Read(scratch, batch); n != 1 || err != nil || batch[0].Len() != 20+8+9 {
			t.Errorf("Read: %d, %v", n, err)
		}
		d.Close()
		if _, err := q.Read(scratch, batch); !errors.Is(err, os.ErrClosed) {
			t.Errorf("Read after Close: %v", err)
		}
	})
}

func TestDeviceClose(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		ns := netlab.New(t)
		d := openIn(t, ns, o)
		if err := errors.Join(d.Close(), d.Close()); err != nil {
			t.Error(err)
		}
		if out, err := ns.Try("ip", "link", "show", "dev", d.Name()); err == nil {
			t.Errorf("still there: %s", out)
		}
		batch, scratch := packet.NewBatch(1, 1500), new(Scratch)
		if _, err := d.Queues()[0].Read(scratch, batch); !errors.Is(err, os.ErrClosed) {
			t.Errorf("Read after Close: %v", err)
		}
		if _, err := d.Queues()[0].Write(scratch, batch); !errors.Is(err, os.ErrClosed) {
			t.Errorf("Write after Close: %v", err)
		}
		if err := d.SetMTU(1400); !errors.Is(err, os.ErrClosed) {
			t.Errorf("SetMTU after Close: %v", err)
		}
		if _, err := d.State(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("State after Close: %v", err)
		}
		if err := d.SetCarrier(true); !errors.Is(err, os.ErrClosed) {
			t.Errorf("SetCarrier after Close: %v", err)
		}
	})
}

// Close waits for the calls in flight, and they fail from then on.
func TestDeviceClose_concurrentReads(t *testing.T) {
	for _, o := range []Options{{Queues: 1}, {Queues: 2}, {NoOffload: true}} {
		ns := netlab.New(t)
		d := openIn(t, ns, o)
		done := make(chan error)
		for _, q := range d.Queues() {
			go func() {
				for batch, scratch := packet.NewBatch(4, 1500), new(Scratch); ; {
					if _, err := q.Read(scratch, batch); err != nil {
						done <- err
						return
					}
				}
			}()
		}
		time.Sleep(20 * time.Millisecond) // most likely they read by now
		d.Close()
		for range d.Queues() {
			if err := <-done; !errors.Is(err, os.ErrClosed) {
				t.Errorf("%+v: Read: %v", o, err)
			}
		}
	}
}

// FD is readable when the interface is gone, and Read says so.
func TestQueueRead_interfaceDeleted(t *testing.T) {
	ns := netlab.New(t)
	d := openIn(t, ns, Options{})
	done := make(chan error)
	go func() {
		for batch, scratch := packet.NewBatch(4, 1500), new(Scratch); ; {
			if _, err := unix.Poll([]unix.PollFd{{Fd: int32(d.Queues()[0].FD()), Events: unix.POLLIN}}, -1); err != nil {
				continue // EINTR
			}
			if _, err := d.Queues()[0].Read(scratch, batch); err != nil {
				done <- err
				return
			}
		}
	}()
	ns.Run("ip", "link", "delete", d.Name())
	if err := <-done; errors.Is(err, os.ErrClosed) || !strings.Contains(err.Error(), "gone") {
		t.Errorf("Read: %v", err)
	}
}

func TestDevice_mtuAndCarrier(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		ns := netlab.New(t)
		o.MTU = 1480
		d := openIn(t, ns, o)
		if s, err := d.State(); s.MTU != 1480 || err != nil {
			t.Errorf("MTU: %d, %v", s.MTU, err)
		}
		for _, mtu := range []int{68, 65515} {
			if err := d.SetMTU(mtu); err != nil {
				t.Error(err)
			}
			if s, err := d.State(); s.MTU != mtu || err != nil {
				t.Errorf("MTU: %d, %v, want %d", s.MTU, err, mtu)
			}
		}
		if err := d.SetMTU(67); err == nil || !strings.Contains(err.Error(), "not accepted") {
			t.Errorf("SetMTU(67): %v", err)
		}
		for _, carrier := range []bool{false, true} {
			if err := d.SetCarrier(carrier); err != nil {
				t.Error(err)
			}
			if out := ns.Run("ip", "link", "show", "dev", d.Name()); strings.Contains(out, "NO-CARRIER") == carrier {
				t.Errorf("SetCarrier(%v): %s", carrier, out)
			}
		}
	})
}

// A child process must not keep the interface alive.
func TestOpen_closeOnExec(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		openIn(t, netlab.New(t), o)
		out, err := exec.Command("ls", "-l", "/proc/self/fd").CombinedOutput()
		if err != nil || bytes.Contains(out, []byte("tun")) {
			t.Errorf("%v: %s", err, out)
		}
	})
}

// EPERM from opening the device is due to the cgroup's device list, from attaching a queue to a missing capability.
func TestExplain(t *testing.T) {
	for _, c := range []struct {
		call, want string
		errno      unix.Errno
	}{
		{openCall, "the device list of this container's cgroup", unix.EPERM},
		{openCall, "run it as root", unix.EACCES},
		{openCall, cloneDevice + " does not exist: ", unix.ENOENT},
		{openCall, "the kernel has no TUN: modprobe tun; ", unix.ENODEV},
		{featuresCall, "another kind of file", unix.ENOTTY},
		{"ioctl TUNSETIFF ipip1", "CAP_NET_ADMIN", unix.EPERM},
	} {
		if err := explain(os.NewSyscallError(c.call, c.errno)); !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v: the error is %q, want %q in it", c.call, c.errno, err, c.want)
		}
	}
}
