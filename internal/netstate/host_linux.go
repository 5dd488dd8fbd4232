package netstate

import (
	"net/netip"
	"slices"
	"sync/atomic"
)

// Host is the network of one namespace. Its methods are safe for concurrent use.
type Host struct{}

// Open opens all sockets that the Host will use, in the calling thread's namespace.
func Open(o Options) (*Host, error) { return &Host{}, nil }

// Close ends the Host.
func (h *Host) Close() error { return nil }

// Follower has the present Answer to one Query.
type Follower struct {
	host    *Host
	changed func()
	answer  atomic.Pointer[Answer]
	query   Query
}

// Follow computes the first Answer before it returns. changed is called, from the Host's
// goroutine, after the Answer has changed in any field; it must not block.
func (h *Host) Follow(q Query, changed func()) *Follower {
	f := &Follower{host: h, changed: changed}
	f.Set(q)
	return f
}

// Answer returns the present Answer, at once.
func (f *Follower) Answer() *Answer { return f.answer.Load() }

// Set replaces the Query, and returns its Answer.
func (f *Follower) Set(q Query) *Answer {
	f.query = q
	a := &Answer{HasLocal: true}
	if q.UnderlayDevice != "" {
		if i, err := DeviceIndex(q.UnderlayDevice); err != nil {
			a.Err = &NoDeviceError{q.UnderlayDevice}
		} else {
			a.Device = i
		}
	}
	if a.Err == nil {
		a.Route, a.Err = Lookup(q.Remote, q.Local, q.Mark, a.Device)
	}
	local := q.Local
	if local == [4]byte{} {
		local = a.Route.Source
	}
	if local != [4]byte{} {
		has, err := AddressIsLocal(netip.AddrFrom4(local))
		a.HasLocal = has || err != nil
	}
	if a.Err == nil {
		a.Bypass, a.Ingress = SafeToBypass(a.Route.Device, local, q.Remote), IngressFilters(a.Route.Device)
		back, _ := Lookup(q.Remote, local, 0, 0)
		a.ReturnDevice = back.Device
	}
	if q.Interface != 0 {
		a.Egress = EgressHooks(q.Interface)
	}
	f.answer.Store(a)
	return a
}

// Close ends it: changed is not called any more.
func (f *Follower) Close() {}

// Refresh has the kernel resolve, or confirm, the follower's next hop: see Resolve.
func (h *Host) Refresh(f *Follower) error {
	a := f.Answer()
	if a.Err != nil {
		return nil
	}
	return Resolve(a.Route, f.query.Remote)
}

// Recheck looks for what no message tells of.
func (h *Host) Recheck() {}

// Taps has the interfaces whose egress a packet socket is shown.
type Taps struct{}

// On is the reason not to bypass the egress of that interface; "" if there is none.
func (t Taps) On(device int) (reason string) { return EgressTaps(device) }

// EgressTaps finds the packet sockets of ETH_P_ALL.
func (h *Host) EgressTaps() (Taps, error) { return Taps{}, nil }

// Configure adds an interface's addresses, sets it up, and adds routes into it.
func (h *Host) Configure(device int, addresses, routes []netip.Prefix) error {
	if _, err := h.AddAddresses(device, addresses); err != nil {
		return err
	}
	if err := h.SetUp(device); err != nil {
		return err
	}
	added, err := h.AddRoutes(device, routes)
	for _, r := range routes {
		if err == nil && !slices.Contains(added, r) {
			err = h.CheckRoute(device, r)
		}
	}
	return err
}

// AddAddresses is the function of that name on the Host's sockets.
func (h *Host) AddAddresses(device int, addresses []netip.Prefix) (added []netip.Prefix, err error) {
	return AddAddresses(device, addresses)
}

// AddRoutes is the function of that name on the Host's sockets.
func (h *Host) AddRoutes(device int, destinations []netip.Prefix) (added []netip.Prefix, err error) {
	return AddRoutes(device, destinations)
}

// CheckRoute is the function of that name on the Host's sockets.
func (h *Host) CheckRoute(device int, destination netip.Prefix) error {
	return CheckRoute(device, destination)
}

// SetUp is the function of that name on the Host's sockets.
func (h *Host) SetUp(device int) error { return SetUp(device) }

// SetRPS is the function of that name on the Host's sockets.
func (h *Host) SetRPS(ifname, mask string) error { return SetRPS(ifname, mask) }

// DeviceIndex is the function of that name on the Host's sockets.
func (h *Host) DeviceIndex(ifname string) (int, error) { return DeviceIndex(ifname) }

// Reassembly is the function of that name.
func (h *Host) Reassembly() (done, failed uint64, err error) { return Reassembly() }

