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

	"ipipd/internal/ipsec"
	"ipipd/internal/ipv4"
	"ipipd/internal/tunnel"
	"ipipd/internal/warning"
)

// underlayDown says if the device that outer packets leave by is down, or has no carrier. The kernel removes the routes
// by a device that is down: it is underlay-device then, or the device that has the local address.
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

// downAddresses returns the addresses of interfaces that are down, each with its interface's name.
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

// nameTaken says if up cannot make the interface, since another one has its name.
func (e *examination) nameTaken() {
	for _, s := range e.tunnels {
		if _, taken := e.interfaces[s.ifname]; taken && !s.running() {
			e.found(NameTaken, s, "name "+s.ifname+" is taken by an interface of this host", "ipipd up fails",
				"ip -d link show "+s.ifname+"; choose another --name, or remove that one: ip link delete "+s.ifname)
		}
	}
}

// route says if there is no route to the remote, or one into the tunnel itself, and if the local address is missing.
func (e *examination) route() {
	for _, s := range e.tunnels {
		if s.answer == nil {
			continue // said already
		}
		a := s.answer
		if !a.HasLocal && s.local.IsValid() {
			e.noLocalAddress(s)
		}
		switch f := tunnel.RouteLoop(a, s.remote, a.Route.DeviceName == s.ifname); {
		case a.Err != nil:
			e.fault(s, noRoute(s.remote, a.Err))
		case a.Route.Local:
			e.fault(s, tunnel.RemoteIsLocal(s.remote))
		case f != nil:
			e.fault(s, f)
		}
	}
}

func (e *examination) noLocalAddress(s *subject) {
	e.warn(warning.NoLocalAddress, s, s.local.String(), fmt.Sprintf("none on a VRRP backup; else ip address add %v/32 dev IF, or another --local-address", s.local))
}

// noRoute returns the Fault for err, with which the look-up of the route to remote has failed.
func noRoute(remote netip.Addr, err error) *warning.Fault {
	var known interface{ Fault() *warning.Fault }
	if errors.As(err, &known) {
		return known.Fault()
	}
	return &warning.Fault{Code: string(NoRoute), What: err.Error(), Why: "nothing can be sent", Do: fmt.Sprintf("ip route get %v", remote)}
}

// rpFilter says if reverse-path filtering drops packets. The larger of conf/all and the interface's value counts.
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

// strict reports whether rp_filter is strict (1) on an interface, and which sysctl makes it so.
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

// counter returns a counter of /proc/net/netstat; 0 if it is not there.
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
	if f := tunnel.KernelIPIP(e.Files); f != nil {
		e.fault(nil, f)
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
				e.fault(s, ipsec.PortTaken(address, port, e.holder(inode), nil))
				break
			}
		}
	}
}

// procAddress parses an address of /proc/net/udp or udp6: hexadecimal, in 32-bit words of the host's byte order.
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
				return fmt.Sprintf("%s (process %s)", e.file(p+"/comm"), strings.TrimPrefix(p, "proc/"))
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

// keyOf returns the value of a key in lines of KEY=VALUE; "" if it is not there.
func keyOf(text, key string) string {
	for line := range strings.Lines(text) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), key+"="); ok {
			return value
		}
	}
	return ""
}

// cilium says if Cilium, which drops foreign IPIP, runs on this host.
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
