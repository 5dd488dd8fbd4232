package netstate

import "net/netip"

// once is a Host for one question, of the calling thread's network namespace.
func once() *Host {
	h := newHost(Options{})
	h.mu.Lock()
	_ = h.resync()
	h.mu.Unlock()
	h.refreshPolicy(0)
	return h
}

// Lookup is the Answer's Route of a Host that lives for one call.
func Lookup(dst, src [4]byte, mark uint32, device int) (Route, error) {
	f, _, err := fresh.lookup(dst, src, mark, device, func(i int) (link, error) { return fresh.getLink(i, "") })
	if err == nil && f.Ethernet {
		s := fresh.getNeighbour(f.neighbour(dst))
		f.Resolved, f.DestinationMAC, f.Static = s.resolved, s.mac, s.static
	}
	return f.Route, err
}

// Resolve is Host.Refresh.
func Resolve(r Route, dst [4]byte) error {
	if !r.Ethernet || r.Static {
		return nil
	}
	return fresh.resolve(r.neighbour(dst))
}

// SafeToBypass is Answer.Bypass.
func SafeToBypass(device int, local, remote [4]byte) (reason string) {
	h := once()
	l, err := h.link(device)
	if err != nil {
		return reasonOf("", err)
	}
	return h.bypass(device, l.name, local, remote)
}

// IngressFilters is Answer.Ingress.
func IngressFilters(device int) (reason string) { return once().ingressFilters(device) }

// EgressHooks is Answer.Egress.
func EgressHooks(device int) (reason string) { return once().egressHooks(device) }

// EgressTaps is Host.EgressTaps.
func EgressTaps(device int) (reason string) {
	t, err := fresh.EgressTaps()
	if err != nil {
		return reasonOf("", err)
	}
	return t.On(device)
}

// AddressIsLocal is Answer.HasLocal.
func AddressIsLocal(address netip.Addr) (bool, error) {
	if address = address.Unmap(); !address.Is4() {
		return false, nil
	}
	return fresh.isLocal(address.As4())
}

// AddRoutes is Host.AddRoutes.
func AddRoutes(device int, destinations []netip.Prefix) (added []netip.Prefix, err error) {
	return fresh.AddRoutes(device, destinations)
}

// CheckRoute is Host.CheckRoute.
func CheckRoute(device int, destination netip.Prefix) error {
	return fresh.CheckRoute(device, destination)
}

// SetRPS is Host.SetRPS.
func SetRPS(ifname, mask string) error { return fresh.SetRPS(ifname, mask) }

// Reassembly is Host.Reassembly.
func Reassembly() (done, failed uint64, err error) { return fresh.Reassembly() }
