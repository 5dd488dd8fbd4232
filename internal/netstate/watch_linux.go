package netstate

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// debounce is how long Watch waits after a change for more of them: one
// `ip link set down` is a dozen.
const debounce = 50 * time.Millisecond

// resync is how often Watch calls even if it is told of nothing: legacy iptables
// change without a word.
const resync = 5 * time.Second

// family is a netlink family that tells of changes, and of which ones.
type family struct {
	protocol int
	groups   []uint
	optional bool // a kernel may have been built without it
}

// families are all that the answers of Lookup, SafeToBypass and EgressHooks depend on.
var families = []family{
	{protocol: unix.NETLINK_ROUTE, groups: []uint{
		unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH, unix.RTNLGRP_TC,
		unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_NEXTHOP,
	}},
	{protocol: unix.NETLINK_NETFILTER, groups: []uint{unix.NFNLGRP_NFTABLES}, optional: true},
	{protocol: unix.NETLINK_XFRM, groups: []uint{xfrmGroupPolicy}, optional: true},
}

// xfrmGroupPolicy is XFRMNLGRP_POLICY of linux/xfrm.h.
const xfrmGroupPolicy = 4

// Watch calls changed once when it has begun to listen, then after any change
// of a link, an address, a route, a rule, a neighbour, a netfilter table, an
// IPsec policy or a tc filter, and every five seconds in any case. Changes that
// come close together are one call; wentDown are the interfaces, by index, that were
// down since the last one, be they up again by now. Watch returns when ctx ends, with
// its error, or when it cannot listen. It calls changed in its own goroutine, one
// call at a time, and none after it has returned.
//
// If so much changes at once that the kernel has to drop messages, changed is
// called all the same, and wentDown may lack one.
func Watch(ctx context.Context, changed func(wentDown map[int]bool)) error {
	var sockets []*os.File
	defer func() {
		for _, s := range sockets {
			s.Close()
		}
	}()
	for _, f := range families {
		s, err := f.subscribe()
		if err != nil && f.optional {
			continue // the beat has to do
		}
		if err != nil {
			return fmt.Errorf("follow changes of the network: %w", permission(err))
		}
		sockets = append(sockets, s)
	}

	changes := make(chan struct{}, 1)
	var down downs
	failed := make(chan error, len(sockets))
	var readers sync.WaitGroup
	for i, s := range sockets {
		note := down.note
		if i > 0 { // of another family: the numbers of its messages mean something else
			note = func([]byte) {}
		}
		readers.Go(func() { failed <- watch(s, note, changes) })
	}
	stop := func() {
		for _, s := range sockets {
			s.Close() // unblocks watch
		}
		readers.Wait()
	}
	defer stop()

	timer := time.NewTicker(resync)
	defer timer.Stop()
	for {
		changed(down.take())
		select {
		case <-changes:
		case <-timer.C:
		case <-ctx.Done():
			return ctx.Err()
		case err := <-failed:
			return fmt.Errorf("follow changes of the network: %w", err)
		}
		select {
		case <-time.After(debounce):
		case <-ctx.Done():
			return ctx.Err()
		}
		select { // what came in the meantime is in the call that is due now
		case <-changes:
		default:
		}
	}
}

// downs are the interfaces that messages say are down, by index.
type downs struct {
	mu      sync.Mutex
	devices map[int]bool
}

// note looks at one message of rtnetlink, of which b is the start.
func (d *downs) note(b []byte) {
	const index, flags = unix.SizeofNlMsghdr + 4, unix.SizeofNlMsghdr + 8 // struct ifinfomsg
	if len(b) < messageStart || binary.NativeEndian.Uint16(b[4:]) != unix.RTM_NEWLINK ||
		binary.NativeEndian.Uint32(b[flags:])&unix.IFF_UP != 0 {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.devices == nil {
		d.devices = map[int]bool{}
	}
	d.devices[int(binary.NativeEndian.Uint32(b[index:]))] = true
}

// take is what was noted since it was last called.
func (d *downs) take() map[int]bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	devices := d.devices
	d.devices = nil
	return devices
}

// messageStart is as much of a message as note looks at.
const messageStart = unix.SizeofNlMsghdr + unix.SizeofIfInfomsg

// watch notes and signals each message that s receives, until s is closed. A signal
// that nobody took yet stands for the later ones too.
func watch(s io.Reader, note func([]byte), changes chan<- struct{}) error {
	var buf [messageStart]byte // the rest is cut off
	for {
		n, err := s.Read(buf[:])
		// ENOBUFS: the kernel dropped messages since the last read. The socket
		// is as good as before, and what was lost is one change more.
		if err != nil && !errors.Is(err, unix.ENOBUFS) {
			return err
		}
		note(buf[:max(n, 0)])
		select {
		case changes <- struct{}{}:
		default:
		}
	}
}

// subscribe opens a socket that hears of the family's changes, in the network
// namespace of the calling thread. Close unblocks a Read of it.
func (f *family) subscribe() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, f.protocol)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	var mask uint32
	for _, g := range f.groups {
		mask |= 1 << (g - 1)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: mask}); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("bind", err)
	}
	return os.NewFile(uintptr(fd), "netlink"), nil
}
