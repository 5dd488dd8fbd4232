package doctor

import (
	"cmp"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"ipipd/internal/ipv4"
	"ipipd/internal/netstate"
	"ipipd/internal/tunnel"
)

// underlayDown says if the device that outer packets leave by is down, or has no carrier. The kernel has no route by
// one that is down: it is underlay-device then, or that of the local address.
func (e *examination) underlayDown() {
	down := sync.OnceValue(e.downAddresses)
	for _, s := range e.tunnels {
		name := s.Config.UnderlayDevice
		if s.hasPath() {
			name = s.device()
		} else if name == "" && s.local.IsValid() {
			name = down()[s.local]
		}
		switch device, ok := e.interfaces[name]; {
		case !ok:
		case device.Flags&net.FlagUp == 0:
			e.found(UnderlayDown, s, "the underlay device "+name+" is set down", "nothing can be sent, and nothing comes", "ip link set "+quote(name)+" up")
		case device.Flags&net.FlagRunning == 0:
			e.found(UnderlayDown, s, "the underlay device "+name+" has no carrier", "nothing can be sent, and nothing comes",
				"see to its cable, and to what is at the other end of it: ip link show "+quote(name))
		}
	}
}

// downAddresses are the addresses of interfaces that are down, with their names.
func (e *examination) downAddresses() map[netip.Addr]string {
	of := map[netip.Addr]string{}
	for name, i := range e.interfaces {
		if i.Flags&net.FlagUp != 0 {
			continue
		}
		addresses, err := i.Addrs()
		if err != nil {
			e.skip(nil, "the addresses of %s cannot be read: %v", name, err)
		}
		for _, a := range addresses {
			if p, err := netip.ParsePrefix(a.String()); err == nil {
				of[p.Addr()] = name
			}
		}
	}
	return of
}

// interfaceDown says if somebody has set the interface of a running tunnel down.
func (e *examination) interfaceDown() {
	for _, s := range e.tunnels {
		if s.running() && s.Status.Disabled {
			e.found(InterfaceDown, s, "the interface "+s.ifname+" is set down", "nothing is routed into it, and what comes is dropped",
				"ip link set "+quote(s.ifname)+" up")
		}
	}
}

// nameTaken says if up cannot make the interface.
func (e *examination) nameTaken() {
	for _, s := range e.tunnels {
		if _, taken := e.interfaces[s.ifname]; taken && !s.running() {
			e.found(NameTaken, s, "the name "+s.ifname+" is taken by an interface of this host", "ipipd up fails",
				"ip -d link show "+s.ifname+"; choose another --name, or remove that one: ip link delete "+s.ifname)
		}
	}
}

// route says whether outer packets have a way, and none into the tunnel itself.
func (e *examination) route() {
	for _, s := range e.tunnels {
		if s.answer == nil {
			continue // said already
		}
		a := s.answer
		if !a.HasLocal && s.local.IsValid() {
			e.noLocalAddress(s)
		}
		switch {
		case a.Err != nil:
			e.found(NoRoute, s, a.Err.Error(), "nothing can be sent", noRouteRemedy(s.remote, a.Err))
			continue
		case a.Route.Local:
			e.found(RemoteIsLocal, s, fmt.Sprintf("remote-address %v is an address of this host", s.remote),
				"a tunnel leads to another host", "--remote-address with the other end's address")
			continue
		case a.Route.DeviceName == s.ifname:
			e.found(RouteLoop, s, fmt.Sprintf("the route to %v leads into the tunnel %s itself", s.remote, s.ifname),
				"outer packets are encapsulated again, and dropped", s.ownRoute())
		case a.Loop != (netstate.InterfaceRoute{}):
			e.found(RouteLoop, s, fmt.Sprintf("--route %v leads the outer packets to %v into the tunnel", a.Loop, s.remote),
				"outer packets are encapsulated again, and dropped", s.ownRoute())
		}
	}
}

func (e *examination) noLocalAddress(s *subject) {
	e.found(NoLocalAddress, s, fmt.Sprintf("no interface of this host has local-address %v", s.local),
		"nothing is sent until it is there; on a VRRP backup that is as it should be",
		fmt.Sprintf("ip address add %v/32 dev IF, or another --local-address", s.local))
}

// noRouteRemedy is what mends err, of the look-up of a route to remote.
func noRouteRemedy(remote netip.Addr, err error) string {
	switch {
	case errors.Is(err, syscall.ENODEV):
		return "ip link show, and --underlay-device with an interface that is there"
	case errors.Is(err, syscall.ENETUNREACH):
		return fmt.Sprintf("ip route add %v via GATEWAY", remote)
	}
	return fmt.Sprintf("ip route get %v", remote)
}

// ownRoute is the command for a route of the remote's own, by the way that it has without the tunnel, if that
// is known.
func (s *subject) ownRoute() string {
	r := &s.answer.Route
	switch {
	case r.DeviceName == s.ifname:
		return fmt.Sprintf("ip route add %v/32 via GATEWAY dev IF, with those of the route that the tunnel's has replaced", s.remote)
	case r.Gateway != [4]byte{}:
		return fmt.Sprintf("ip route add %v/32 via %v dev %s", s.remote, netip.AddrFrom4(r.Gateway), r.DeviceName)
	}
	return fmt.Sprintf("ip route add %v/32 dev %s", s.remote, r.DeviceName)
}

// rpFilter says if reverse-path filtering drops packets: the larger value of all and of the interface.
func (e *examination) rpFilter() {
	for _, s := range e.tunnels {
		if !s.hasPath() {
			continue
		}
		if from, strict := e.strict(s.device()); strict && s.answer.ReturnDevice != s.answer.Route.Device {
			e.found(RPFilterUnderlay, s, fmt.Sprintf("rp_filter is strict on %s (%s), and without mark and underlay-device the route to %v is another one", s.device(), from, s.remote),
				"the kernel drops what the remote sends", "sysctl "+from+"=2")
		}
		ifname := s.ifname
		if !s.running() {
			ifname = "default" // what it will have
		}
		from, strict := e.strict(ifname)
		if !strict {
			continue
		}
		if dropped := e.counter("TcpExt", "IPReversePathFilter"); dropped > 0 && s.running() {
			e.found(RPFilterTunnel, s, fmt.Sprintf("rp_filter is strict on the tunnel's interface (%s), and this host has dropped %d packets by it", from, dropped),
				"an inner packet is dropped whose source is not routed into the tunnel", "sysctl "+from+"=2, or routes for what is behind the peer")
		} else if len(s.Config.Addresses)+len(s.Config.Routes)+len(e.routesInto(s)) == 0 {
			e.found(RPFilterTunnel, s, fmt.Sprintf("rp_filter is strict on the tunnel's interface (%s), and nothing is routed into it", from),
				"each inner packet that comes is dropped", "sysctl "+from+"=2, or --address and --route for what is behind the peer")
		}
	}
}

// strict reports whether rp_filter is 1, and the sysctl that makes it so.
func (e *examination) strict(ifname string) (from string, strict bool) {
	value := func(of string) int {
		n, _ := strconv.Atoi(e.file("proc/sys/net/ipv4/conf/" + of + "/rp_filter"))
		return n
	}
	all, own := value("all"), value(ifname)
	name := strings.ReplaceAll(ifname, ".", "/") // as sysctl takes it
	from = "net.ipv4.conf." + name + ".rp_filter"
	if own == 0 {
		from = "net.ipv4.conf.all.rp_filter"
	}
	return from, max(all, own) == 1
}

// counter is one of /proc/net/netstat.
func (e *examination) counter(group, name string) (n uint64) {
	var names []string
	for line := range strings.Lines(e.file("proc/thread-self/net/netstat")) {
		f := strings.Fields(line)
		if len(f) == 0 || f[0] != group+":" {
			continue
		}
		if names == nil {
			names = f
			continue
		}
		for i := range min(len(f), len(names)) {
			if names[i] == name {
				n, _ = strconv.ParseUint(f[i], 10, 64)
			}
		}
	}
	return n
}

// kernelIPIP says if the kernel has a handler of protocol 4 of its own.
func (e *examination) kernelIPIP() {
	loaded := ""
	modules := e.file("proc/modules")
	for _, m := range []string{"ipip", "tunnel4"} {
		_, err := fs.Stat(e.Files, "sys/module/"+m)
		if err == nil || strings.HasPrefix(modules, m+" ") || strings.Contains(modules, "\n"+m+" ") {
			loaded = strings.TrimSpace(loaded + " " + m)
		}
	}
	if loaded != "" {
		e.found(KernelIPIP, nil, "loaded: "+loaded, tunnel.KernelIPIP, "rmmod "+loaded)
	}
}

// samePair says if two tunnels have the same outer addresses.
func (e *examination) samePair() {
	var tunnels, others []Outer
	for _, s := range e.tunnels {
		tunnels = append(tunnels, Outer{s.name, s.local, s.remote})
	}
	for i := range e.others {
		others = append(others, OuterOf(&e.others[i]))
	}
	kernel, err := e.KernelTunnels()
	if err != nil {
		e.skip(nil, "the kernel's own tunnels are not known: %v", err)
	}
	SamePairs(tunnels, others, kernel, func(i int, what, why, do string) { e.found(SamePair, e.tunnels[i], what, why, do) })
}

// udpPorts says if the ports of IKE are taken, for tunnels that do not run.
func (e *examination) udpPorts() {
	taken := map[int]map[netip.Addr]string{500: {}, ipv4.PortNATT: {}} // by address, the inode
	for _, name := range []string{"udp", "udp6"} {
		for line := range strings.Lines(e.file("proc/thread-self/net/" + name)) {
			f := strings.Fields(line)
			if len(f) < 10 {
				continue
			}
			if address, port, ok := procAddress(f[1]); ok && taken[port] != nil {
				taken[port][address] = f[9]
			}
		}
	}
	for _, s := range e.tunnels {
		if !s.encrypted || s.running() {
			continue
		}
		for _, port := range []int{500, ipv4.PortNATT} {
			for _, address := range []netip.Addr{s.local, netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
				inode, ok := taken[port][address]
				if !ok {
					continue
				}
				e.found(UDPPortTaken, s, fmt.Sprintf("UDP port %d of %v is taken%s", port, address, e.holder(inode)),
					"IKE needs it", fmt.Sprintf("stop strongSwan, libreswan or racoon, or the ipipd that has it, or have it leave this address: ss -ulpn sport = :%d", port))
				break
			}
		}
	}
}

// procAddress parses one of /proc/net/udp or udp6: hexadecimal, in words of the host's byte order.
func procAddress(text string) (a netip.Addr, port int, ok bool) {
	left, right, _ := strings.Cut(text, ":")
	b, err := hex.DecodeString(left)
	n, err2 := strconv.ParseUint(right, 16, 16)
	if err != nil || err2 != nil || len(b) != 4 && len(b) != 16 {
		return a, 0, false
	}
	for i := 0; i < len(b); i += 4 {
		binary.NativeEndian.PutUint32(b[i:], binary.BigEndian.Uint32(b[i:]))
	}
	a, _ = netip.AddrFromSlice(b)
	return a.Unmap(), int(n), true
}

// holder names the process that has a socket, if this user may see it.
func (e *examination) holder(inode string) string {
	link := "socket:[" + inode + "]"
	links, ok := e.Files.(fs.ReadLinkFS)
	if !ok {
		return ""
	}
	processes, _ := fs.Glob(e.Files, "proc/[0-9]*")
	for _, p := range processes {
		entries, _ := fs.ReadDir(e.Files, p+"/fd")
		for _, d := range entries {
			if to, err := links.ReadLink(p + "/fd/" + d.Name()); err == nil && to == link {
				return fmt.Sprintf(" by %s (process %s)", e.file(p+"/comm"), strings.TrimPrefix(p, "proc/"))
			}
		}
	}
	return ""
}

// managers says if another program manages the tunnel's interface.
func (e *examination) managers() {
	for _, s := range e.tunnels {
		i, ok := e.interfaces[s.ifname]
		if !ok || !s.running() {
			e.skip(nil, "who manages an interface shows when its tunnel runs")
			continue
		}
		networkd, nm := fmt.Sprintf("run/systemd/netif/links/%d", i.Index), fmt.Sprintf("run/NetworkManager/devices/%d", i.Index)
		if state := keyOf(e.file(networkd), "ADMIN_STATE"); state != "" && state != "unmanaged" {
			e.found(ManagedByNetworkd, s, "systemd-networkd manages "+s.ifname+" (its state is "+state+")",
				"it removes addresses and routes that it has not set",
				fmt.Sprintf("printf '[Match]\\nName=%s\\n[Link]\\nUnmanaged=yes\\n' > /etc/systemd/network/00-%[1]s.network && networkctl reload", s.ifname))
		}
		if slices.Contains([]string{"true", "1", "full"}, keyOf(e.file(nm), "managed")) {
			e.found(ManagedByNM, s, "NetworkManager manages "+s.ifname, "it removes addresses and routes that it has not set",
				"nmcli device set "+s.ifname+" managed no")
		}
	}
}

// keyOf is the value of a key in lines of KEY=VALUE.
func keyOf(text, key string) string {
	for line := range strings.Lines(text) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), key+"="); ok {
			return value
		}
	}
	return ""
}

// cilium says if Cilium is at work here.
func (e *examination) cilium() {
	if _, here := e.interfaces["cilium_host"]; !here {
		return
	}
	for _, s := range e.tunnels {
		if !s.encrypted && !e.heard(s) {
			e.found(CiliumDrops, s, "Cilium runs on this host (interface cilium_host)",
				"its programs drop IPIP that is not its own on its devices (DROP_UNKNOWN_L4)",
				"cilium-dbg monitor --type drop; and leave the underlay device out of Cilium's: devices in its configuration")
		}
	}
}

// fastPath says why the fast path is off, where it is wanted.
func (e *examination) fastPath() {
	for _, s := range e.tunnels {
		why := ""
		switch {
		case s.encrypted && s.Config.AllowFastPath != tunnel.On, s.Config.AllowFastPath == tunnel.Off, !s.hasPath():
			continue
		case s.running():
			if why = s.Status.FastPath; why == "active" || why == "starting" {
				continue
			}
		default:
			why = cmp.Or(s.answer.Bypass, s.answer.Ingress)
		}
		if strings.HasPrefix(why, "cannot tell") && !s.running() {
			e.skip(s, "%s", why)
			continue
		}
		if why != "" {
			e.found(FastPathOff, s, "the fast path is off: "+why, "packets go through userspace, which is slower", "see docs/fast-path.md; nothing, if it is fast enough")
		}
	}
}
