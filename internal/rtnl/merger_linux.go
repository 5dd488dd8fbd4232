package rtnl

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/safchain/ethtool"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Merger is a veth pair that takes packets on a thread of the kernel's, many at a time,
// and puts the TCP segments of a flow together (GRO). What is sent to its near end, here,
// arrives at the far one, in a network namespace that has nothing else and that only
// this process holds: when the process ends, in whatever way, the kernel removes the
// namespace, and with it the pair.
//
// The far end waits a little for more to come; the near end has a queue for what comes
// faster than the thread takes it.
type Merger struct {
	// Near and Far are the indexes of the ends, each in its namespace.
	Near, Far int
	near      netlink.Link
	namespace *os.File
}

const (
	farName = "far"
	// mergeFor is how long the far end waits for more segments, in nanoseconds. It is
	// a fraction of the time in which a gigabit's packets fill its ring of 256.
	mergeFor = "50000"
	// mergerQueue is how many packets wait for the far end. A TCP sender without
	// pacing sends a window at once.
	mergerQueue = 1000
	// mergerMTU is the largest that a veth has.
	mergerMTU = 65535
)

// OpenMerger makes one. It needs CAP_NET_ADMIN, and CAP_SYS_ADMIN for the namespace,
// and lets nothing stay behind if it fails.
func OpenMerger() (_ *Merger, err error) {
	m := new(Merger)
	defer func() {
		if err != nil {
			_ = m.Close()
			err = fmt.Errorf("make a veth pair for GRO: %w", permission(err))
		}
	}()
	err = onThreadOfItsOwn(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return os.NewSyscallError("unshare a network namespace", err)
		}
		m.namespace, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	if err != nil {
		return nil, err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "ipipgro" + strings.ToLower(rand.Text()[:8]) // 15 bytes
	attrs.TxQLen, attrs.MTU = mergerQueue, mergerMTU
	pair, err := addVeth(attrs, farName, int(m.namespace.Fd()))
	if err != nil {
		return nil, err
	}
	m.near, m.Near = pair, pair.Index
	if err := m.setUpNear(); err != nil {
		return nil, err
	}
	if err := m.InFar(m.setUpFar); err != nil {
		return nil, err
	}
	return m, netlink.LinkSetUp(pair)
}

func (m *Merger) setUpNear() error {
	// The kernel merges nothing for an end that could have sent it merged.
	if err := features(m.near.Attrs().Name, false, "tx-tcp-segmentation", "tx-tcp-ecn-segmentation",
		"tx-tcp-mangleid-segmentation", "tx-tcp6-segmentation"); err != nil {
		return err
	}
	// Since Linux 6.16 a veth with a queue does not lose what its ring has no room for.
	queue := &netlink.GenericQdisc{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: m.Near, Parent: netlink.HANDLE_ROOT, Handle: netlink.MakeHandle(1, 0)},
		QdiscType:  "pfifo", // as long as the interface's txqueuelen
	}
	return errors.Join(
		netlink.QdiscReplace(queue),
		netlink.LinkSetAlias(m.near, "GRO for ipipd's fast path"),
		silence(m.near),
	)
}

// setUpFar runs in the far end's namespace.
func (m *Merger) setUpFar() error {
	far, err := netlink.LinkByName(farName)
	if err != nil {
		return err
	}
	m.Far = far.Attrs().Index
	if err := errors.Join(silence(far), features(farName, true, "rx-gro")); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(far); err != nil { // before, there is no NAPI to set up
		return err
	}
	if err := mountSys(); err != nil {
		return err
	}
	for _, set := range [][2]string{
		{"threaded", "1"},
		// After a packet the ring is looked at again when that time has passed, not
		// for each packet.
		{"gro_flush_timeout", mergeFor},
		{"napi_defer_hard_irqs", "1"},
	} {
		if err := os.WriteFile(filepath.Join("/sys/class/net", farName, set[0]), []byte(set[1]), 0); err != nil {
			return err
		}
	}
	return nil
}

// InFar calls f on a thread that is in the far end's namespace and ends with f.
func (m *Merger) InFar(f func() error) error { return inNamespace(m.namespace, f) }

// Works reports whether the near end is there and up: that nobody took it away.
func (m *Merger) Works() bool {
	near, err := netlink.LinkByIndex(m.Near)
	return err == nil && near.Attrs().Flags&net.FlagUp != 0
}

// Drops counts the packets that found no room.
func (m *Merger) Drops() (uint64, error) {
	near, err := netlink.LinkByIndex(m.Near)
	if err != nil {
		return 0, err
	}
	queues, err := netlink.QdiscList(near)
	if err != nil {
		return 0, err
	}
	drops := near.Attrs().Statistics.TxDropped
	for _, q := range queues {
		if s := q.Attrs().Statistics; s != nil && s.Queue != nil {
			drops += uint64(s.Queue.Drops)
		}
	}
	return drops, nil
}

// Close removes the pair.
func (m *Merger) Close() error {
	var errs []error
	if m.near != nil {
		errs = append(errs, netlink.LinkDel(m.near))
	}
	if m.namespace != nil {
		errs = append(errs, m.namespace.Close())
	}
	return errors.Join(errs...)
}

// silence has the kernel send nothing by itself through an interface.
func silence(l netlink.Link) error {
	const none = 1 // IN6_ADDR_GEN_MODE_NONE
	err := netlink.LinkSetIP6AddrGenMode(l, none)
	if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
		err = nil // without IPv6
	}
	return errors.Join(err, netlink.LinkSetARPOff(l))
}

// features turns what an interface can do on or off.
func features(ifname string, on bool, names ...string) error {
	e, err := ethtool.NewEthtool()
	if err != nil {
		return err
	}
	defer e.Close()
	change := make(map[string]bool)
	for _, name := range names {
		change[name] = on
	}
	if err := e.Change(ifname, change); err != nil {
		return fmt.Errorf("turn %s of %s: %w", strings.Join(names, ", "), ifname, err)
	}
	return nil
}

// mountSys has the thread see, in /sys, the interfaces of the network namespace that it
// is in: another sysfs shows others. The thread must end with that.
func mountSys() error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return os.NewSyscallError("unshare a mount namespace", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return os.NewSyscallError("mount", err)
	}
	return os.NewSyscallError("mount sysfs", unix.Mount("sysfs", "/sys", "sysfs", 0, ""))
}

// inNamespace calls f on a thread that is in a network namespace and ends with f.
func inNamespace(namespace *os.File, f func() error) error {
	return onThreadOfItsOwn(func() error {
		if err := unix.Setns(int(namespace.Fd()), unix.CLONE_NEWNET); err != nil {
			return os.NewSyscallError("setns", err)
		}
		return f()
	})
}

// onThreadOfItsOwn calls f on a thread that nobody else gets: it ends with f.
func onThreadOfItsOwn(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		done <- f()
	}()
	return <-done
}
