package lab

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// End is one end of a cable: an Ethernet interface, down at first.
type End struct {
	Namespace *Namespace
	Name      string
}

// Veth joins two namespaces by a veth pair.
func Veth(a, b End) error {
	return a.Namespace.Do(func() error {
		attributes := netlink.NewLinkAttrs()
		attributes.Name = a.Name
		pair := &netlink.Veth{LinkAttrs: attributes, PeerName: b.Name, PeerNamespace: netlink.NsFd(int(b.Namespace.file.Fd()))}
		if err := netlink.LinkAdd(pair); err != nil {
			return fmt.Errorf("cannot make the veth pair %s and %s: %w", a.Name, b.Name, err)
		}
		return nil
	})
}

// Address is an address of an End: with the prefix length of its subnet, or a /32 with the address of the only host at
// the other end of the cable.
type Address struct {
	Prefix netip.Prefix
	Peer   netip.Addr
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// SetUp adds addresses to an end, and sets it and the loopback interface of its namespace up.
func (e End) SetUp(addresses ...Address) error {
	return e.Namespace.Do(func() error {
		const loopback = 1 // its index in every namespace
		link, err := netlink.LinkByName(e.Name)
		if err != nil {
			return fmt.Errorf("look up %s: %w", e.Name, err)
		}
		for _, address := range addresses {
			a := netlink.Addr{IPNet: ipNet(address.Prefix)}
			if address.Peer.IsValid() {
				a.Peer = ipNet(netip.PrefixFrom(address.Peer, address.Peer.BitLen()))
			}
			if err := netlink.AddrAdd(link, &a); err != nil {
				return fmt.Errorf("add address %v to %s: %w", address.Prefix, e.Name, err)
			}
		}
		for _, up := range []netlink.Link{&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: loopback}}, link} {
			if err := netlink.LinkSetUp(up); err != nil {
				return fmt.Errorf("set %s up: %w", e.Name, err)
			}
		}
		return nil
	})
}

// TAP makes a TAP interface. Each read of its file returns an Ethernet frame that the interface sends, each write
// is a frame that it receives; closing the file removes it.
func (e End) TAP() (file *os.File, err error) {
	err = e.Namespace.Do(func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			return &os.PathError{Op: "open", Path: "/dev/net/tun", Err: err}
		}
		request, err := unix.NewIfreq(e.Name)
		if err == nil {
			request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
			err = os.NewSyscallError("TUNSETIFF", unix.IoctlIfreq(fd, unix.TUNSETIFF, request))
		}
		if err != nil {
			unix.Close(fd)
			return fmt.Errorf("cannot make the TAP interface %s: %w", e.Name, err)
		}
		file = os.NewFile(uintptr(fd), "/dev/net/tun")
		return nil
	})
	return file, err
}

// Lossy is a cable that loses frames: two TAP interfaces, between which this process carries them. It needs no
// netem, which many kernels are built without.
type Lossy struct {
	ends          [2]*os.File
	loss          float64
	carried, lost atomic.Int64
	done          sync.WaitGroup
}

// JoinLossy joins two namespaces by a cable that loses each IPv4 frame with the probability loss, in either direction.
// It loses no other frames: packets that wait for a lost ARP frame would wait for a second.
func JoinLossy(a, b End, loss float64) (*Lossy, error) {
	l := &Lossy{loss: loss}
	for i, end := range []End{a, b} {
		file, err := end.TAP()
		if err != nil {
			l.Close()
			return nil, err
		}
		l.ends[i] = file
	}
	l.done.Go(func() { l.carry(l.ends[0], l.ends[1]) })
	l.done.Go(func() { l.carry(l.ends[1], l.ends[0]) })
	return l, nil
}

// carry passes frames from one TAP interface on to the other, until from is closed.
func (l *Lossy) carry(from, to *os.File) {
	frame := make([]byte, 1<<16)
	for {
		n, err := from.Read(frame)
		if errors.Is(err, os.ErrClosed) {
			return
		}
		if err != nil { // the interface is down
			time.Sleep(10 * time.Millisecond)
			continue
		}
		const etherType = 12
		isIPv4 := n > etherType+1 && frame[etherType] == unix.ETH_P_IP>>8 && frame[etherType+1] == unix.ETH_P_IP&0xff
		if isIPv4 && rand.Float64() < l.loss {
			l.lost.Add(1)
			continue
		}
		if isIPv4 {
			l.carried.Add(1)
		}
		_, _ = to.Write(frame[:n]) // it fails while the other interface is down
	}
}

// Counts returns how many IPv4 frames the cable has carried and lost so far.
func (l *Lossy) Counts() (carried, lost int64) { return l.carried.Load(), l.lost.Load() }

// Close removes both interfaces.
func (l *Lossy) Close() error {
	var errs []error
	for _, end := range l.ends {
		if end != nil {
			errs = append(errs, end.Close())
		}
	}
	l.done.Wait()
	return errors.Join(errs...)
}
