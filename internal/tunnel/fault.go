package tunnel

import (
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"ipipd/internal/netstate"
	"ipipd/internal/warning"
)

// NotResolved returns the Fault of a remote whose name has no address, because of err.
func NotResolved(name string, err error) *warning.Fault {
	text := warning.NameNotResolved.Text()
	return &warning.Fault{
		Code: text.Name, What: fmt.Sprintf("cannot resolve remote-address %q: %v", name, err), Why: "there is no address to send to",
		Do: "getent ahostsv4 " + name + "; " + text.Remedy,
	}
}

// RemoteIsLocal returns the Fault of a remote that is an address of this host.
func RemoteIsLocal(remote netip.Addr) *warning.Fault {
	return &warning.Fault{
		Code: "remote-is-local", What: fmt.Sprintf("remote-address %v is an address of this host", remote),
		Why: "a tunnel leads to another host", Do: "--remote-address with the other end's address",
	}
}

// RouteLoop returns the Fault of outer packets to remote that are routed into the tunnel itself, as into says, or will be
// by one of its routes; nil if they are not.
func RouteLoop(a *netstate.Answer, remote netip.Addr, into bool) *warning.Fault {
	f := &warning.Fault{Code: warning.RouteLoop.String(), Why: "outer packets are encapsulated again, and dropped"}
	switch {
	case a.Loop != (netstate.InterfaceRoute{}):
		f.What = fmt.Sprintf("route %v would be the one to remote-address %v as well, a loop", a.Loop, remote)
	case into:
		f.What = fmt.Sprintf("the route to remote-address %v leads into the tunnel itself, a loop", remote)
	default:
		return nil
	}
	switch r := &a.Route; { // a host route to the remote, by the next hop that it has without the tunnel, if that is known
	case into:
		f.Do = fmt.Sprintf("ip route add %v/32 via GATEWAY dev IF, with those of the route that the tunnel's has replaced", remote)
	case r.Gateway != [4]byte{}:
		f.Do = fmt.Sprintf("ip route add %v/32 via %v dev %s", remote, address(r.Gateway), r.DeviceName)
	default:
		f.Do = fmt.Sprintf("ip route add %v/32 dev %s", remote, r.DeviceName)
	}
	f.Do += ", or give the tunnel's route a higher metric or another table, or set --underlay-device"
	return f
}

// KernelIPIP returns the Fault of a kernel that handles protocol 4 itself; nil if it does not. files is the root directory.
func KernelIPIP(files fs.FS) *warning.Fault {
	list, _ := fs.ReadFile(files, "proc/modules")
	var loaded []string
	for _, m := range []string{"ipip", "tunnel4"} { // the order of rmmod
		_, err := fs.Stat(files, "sys/module/"+m)
		if err == nil || strings.Contains("\n"+string(list), "\n"+m+" ") {
			loaded = append(loaded, m)
		}
	}
	if len(loaded) == 0 {
		return nil
	}
	modules := strings.Join(loaded, " ")
	return &warning.Fault{
		Code: "kernel-ipip", What: "the kernel handles protocol 4 as well, by " + modules,
		Why: "it may answer the peer with ICMP errors", Do: "rmmod " + modules,
	}
}

// File descriptors that `up` takes, measured with test/scale's configuration: for the process, for each thread, and for
// each tunnel beside its TUN queues.
const filesProcess, filesThread, filesTunnel = 40, 6, 2

// TooFewFiles returns the Fault of tunnels, which do not run yet, that need more file descriptors with so many threads
// than limit; nil if they do not.
func TooFewFiles(configs []Config, threads int, limit uint64) *warning.Fault {
	files := filesProcess + filesThread*threads
	for i := range configs {
		queues := configs[i].TunQueues
		if queues == 0 {
			queues = threads
		}
		files += filesTunnel + queues
	}
	if len(configs) == 0 || limit >= uint64(files) {
		return nil
	}
	return &warning.Fault{
		Code: "too-few-files", What: fmt.Sprintf("the tunnels, %d, need %d open files, and the limit is %d", len(configs), files, limit),
		Why: "ipipd up fails with EMFILE", Do: fmt.Sprintf("ulimit -n %d, or LimitNOFILE=%[1]d in the unit", 2*files),
	}
}

// MaxFiles returns the largest RLIMIT_NOFILE that this process may set.
func MaxFiles() (uint64, error) {
	var limit unix.Rlimit
	err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit)
	return limit.Max, os.NewSyscallError("getrlimit", err)
}
