//go:build !linux

package netstate

import (
	"net/netip"
	"sync"
	"sync/atomic"
)

// Host looks up routes by Go's net package. Only Recheck finds changes.
type Host struct {
	mu        sync.Mutex
	followers map[*Follower]bool
}

// Open never fails.
func Open(o Options) (*Host, error) { return &Host{followers: map[*Follower]bool{}}, nil }

// Close does nothing.
func (h *Host) Close() error { return nil }

// Follower has the Answer to one Query.
type Follower struct {
	host    *Host
	changed func()
	query   atomic.Pointer[Query]
	answer  atomic.Pointer[Answer]
}

// Follow computes the first Answer. Recheck calls changed.
func (h *Host) Follow(q Query, changed func()) *Follower {
	f := &Follower{host: h, changed: changed}
	f.Set(q)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.followers[f] = true
	return f
}

// Answer returns the present Answer.
func (f *Follower) Answer() *Answer { return f.answer.Load() }

// Set replaces the Query and returns its Answer.
func (f *Follower) Set(q Query) *Answer {
	f.query.Store(&q)
	a := answer(q)
	if before := f.Answer(); before != nil {
		a.InterfaceChanges = before.InterfaceChanges
	}
	f.answer.Store(a)
	return a
}

// Close ends it.
func (f *Follower) Close() {
	f.host.mu.Lock()
	defer f.host.mu.Unlock()
	delete(f.host.followers, f)
}

func answer(q Query) *Answer {
	const no = "the system is not Linux"
	a := &Answer{HasLocal: true, Bypass: no, Ingress: no, Egress: no}
	if q.UnderlayDevice != "" {
		if a.Device, a.Err = deviceIndex(q.UnderlayDevice); a.Err != nil {
			a.Err = &NoDeviceError{q.UnderlayDevice}
		}
	}
	if a.Err == nil {
		a.Route, a.Err = lookup(q.Remote, q.Local, q.Mark, a.Device)
	}
	local := q.Local
	if local == [4]byte{} {
		local = a.Route.Source
	}
	if has, err := isLocal(netip.AddrFrom4(local)); err == nil && local != [4]byte{} {
		a.HasLocal = has
	}
	a.ReturnDevice = a.Route.Device
	return a
}

// Refresh does nothing: a Route is never Ethernet here.
func (f *Follower) Refresh() error { return nil }

// Attach returns ErrUnsupported.
func (f *Follower) Attach(p Program) error { return ErrUnsupported }

// Recheck looks up all routes again, and calls changed of all: nothing tells of a change of
// an interface. Call it every few seconds.
func (h *Host) Recheck() {
	h.mu.Lock()
	var changed []func()
	for f := range h.followers {
		a := answer(*f.query.Load())
		a.InterfaceChanges, a.NetworkChanges = f.Answer().InterfaceChanges+1, f.Answer().NetworkChanges+1
		f.answer.Store(a)
		changed = append(changed, f.changed)
	}
	h.mu.Unlock()
	for _, call := range changed {
		call()
	}
}

// Taps are the packet sockets that see what interfaces send, on Linux only.
type Taps struct{}

// On always returns a reason.
func (t Taps) On(device int) (reason string) { return "the system is not Linux" }

// EgressTaps returns the zero Taps.
func (h *Host) EgressTaps() (Taps, error) { return Taps{}, nil }

// RawSockets returns ErrUnsupported.
func (h *Host) RawSockets(uint8) ([]uint64, error) { return nil, ErrUnsupported }

// Configure fails with ErrUnsupported if there is an address or a route to add.
func (h *Host) Configure(interfaces []Interface) error {
	for _, i := range interfaces {
		if len(i.Addresses)+len(i.Routes) > 0 {
			return &InterfaceError{i.Index, ErrUnsupported}
		}
	}
	return nil
}

// AddAddresses returns ErrUnsupported unless there is none to add.
func (h *Host) AddAddresses(device int, addresses []InterfaceAddress) (added []InterfaceAddress, err error) {
	return addNone(addresses)
}

// AddRoutes returns ErrUnsupported unless there is none to add.
func (h *Host) AddRoutes(device int, routes []InterfaceRoute) (added []InterfaceRoute, err error) {
	return addNone(routes)
}

// RemoveAddresses returns ErrUnsupported.
func (h *Host) RemoveAddresses(device int, addresses []InterfaceAddress) error { return ErrUnsupported }

// RemoveRoutes returns ErrUnsupported.
func (h *Host) RemoveRoutes(device int, routes []InterfaceRoute) error { return ErrUnsupported }

// ExistingRoutes returns ErrUnsupported.
func (h *Host) ExistingRoutes(interfaces []Interface) (existing map[InterfaceRoute]bool, err error) {
	return nil, ErrUnsupported
}

// ReplaceRoutes returns ErrUnsupported.
func (h *Host) ReplaceRoutes(device int, routes []InterfaceRoute) error { return ErrUnsupported }

// Remove returns ErrUnsupported.
func (h *Host) Remove(devices []int) error { return ErrUnsupported }

// SetUp does nothing.
func (h *Host) SetUp(device int) error { return nil }

// SetRPS returns ErrUnsupported.
func (h *Host) SetRPS(ifname, mask string) error { return ErrUnsupported }

// ClearRPS returns ErrUnsupported.
func (h *Host) ClearRPS(ifname, mask string) error { return ErrUnsupported }

// DeviceIndex is the index of an interface.
func (h *Host) DeviceIndex(ifname string) (int, error) { return deviceIndex(ifname) }

// Reassembly returns ErrUnsupported.
func (h *Host) Reassembly() (done, failed uint64, err error) { return 0, 0, ErrUnsupported }

// RouteFollower follows the routes out of an interface on Linux only.
type RouteFollower struct{}

// FollowRoutes never calls changed.
func (h *Host) FollowRoutes(device int, changed func([]RouteChange)) *RouteFollower {
	return &RouteFollower{}
}

// Close does nothing.
func (m *RouteFollower) Close() {}

// AddressFollower follows the addresses of this host on Linux only.
type AddressFollower struct{}

// FollowAddresses never calls changed.
func (h *Host) FollowAddresses(changed func([][4]byte)) *AddressFollower { return &AddressFollower{} }

// Close does nothing.
func (a *AddressFollower) Close() {}
