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

// debounce is how long Watch collects changes after the first: one `ip link set down` is a
// dozen messages.
const debounce = 50 * time.Millisecond

// resync is the period of the calls that no message causes: legacy iptables send none.
const resync = 5 * time.Second

// family is a netlink family and the multicast groups that Watch joins.
type family struct {
	protocol int
	groups   []uint
	optional bool // absent from some kernels
}

// families have the messages of all that Lookup, SafeToBypass and EgressHooks read.
var families = []family{
	{protocol: unix.NETLINK_ROUTE, groups: []uint{
		unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH, unix.RTNLGRP_TC,
		unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_NEXTHOP,
	}},
	{protocol: unix.NETLINK_NETFILTER, groups: []uint{unix.NFNLGRP_NFTABLES}, optional: true},
	{protocol: unix.NETLINK_XFRM, groups: []uint{xfrmGroupPolicy}, optional: true},
}

// Watch calls changed once when it is subscribed, then after any change of a link,
// address, route, rule, neighbour, netfilter table, IPsec policy or tc filter, and every
// five seconds. Changes within 50 ms are one call; wentDown has the indices of the
// interfaces that were down since the last call, even if they are up again. Watch returns
// when ctx ends, with its error, or when a subscription fails. It calls changed in its own
// goroutine, one call at a time, and never after it has returned.
//
// If the kernel drops messages (ENOBUFS), changed is called all the same, and wentDown may
// be incomplete.
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
			continue // resync covers it
		}
		if err != nil {
			return fmt.Errorf("watch the network for changes: %w", permission(err))
		}
		sockets = append(sockets, s)
	}

	changes := make(chan struct{}, 1)
	var down downs
	failed := make(chan error, len(sockets))
	var readers sync.WaitGroup
	for i, s := range sockets {
		note := down.note
		if i > 0 { // message types are per family
			note = func([]byte) {}
		}
		readers.Go(func() { failed <- readChanges(s, note, changes) })
	}
	stop := func() {
		for _, s := range sockets {
			s.Close() // unblocks readChanges
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
			return fmt.Errorf("watch the network for changes: %w", err)
		}
		select {
		case <-time.After(debounce):
		case <-ctx.Done():
			return ctx.Err()
		}
		select { // changes since then are covered by the call that follows
		case <-changes:
		default:
		}
	}
}

// downs collects the indices of interfaces that were reported down.
type downs struct {
	mu      sync.Mutex
	devices map[int]bool
}

// note reads the first messageStart bytes of an rtnetlink message.
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

// take returns and clears what was noted.
func (d *downs) take() map[int]bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	devices := d.devices
	d.devices = nil
	return devices
}

// messageStart is how many bytes of a message note reads.
const messageStart = unix.SizeofNlMsghdr + unix.SizeofIfInfomsg

// readChanges notes and signals each message that s receives, until s is closed. A signal
// that is still pending covers later messages.
func readChanges(s io.Reader, note func([]byte), changes chan<- struct{}) error {
	var buf [messageStart]byte // the kernel truncates
	for {
		n, err := s.Read(buf[:])
		// ENOBUFS: the kernel dropped messages since the last read. The socket
		// stays usable, and the loss counts as a change.
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

// subscribe opens a socket in the family's multicast groups, in the network namespace of
// the calling thread. Close unblocks a Read.
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
