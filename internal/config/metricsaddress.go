package config

import (
	"net/netip"
	"path"
	"strconv"
	"strings"
	"syscall"
)

const metricsOff = "off"

var metricsAddress = ProcessProperty{
	Name: "metrics-address", Values: "`off`, address:port, :port or unix:/path", Default: metricsOff,
	Help:  "where metrics, a page about the tunnels, /healthz and /readyz are served by HTTP, to whoever reaches it; :port is that of 127.0.0.1; a unix socket has mode 0660",
	Words: []string{metricsOff},
	get: func(p *Process) string {
		if p.MetricsAddress == "" {
			return metricsOff
		}
		return p.MetricsAddress
	},
	set: func(p *Process, v string) (want string) {
		if v == metricsOff {
			p.MetricsAddress = ""
			return ""
		}
		p.MetricsAddress, want = parseMetricsAddress(v)
		return want
	},
}

// unixPrefix precedes the path of a unix socket in Process.MetricsAddress.
const unixPrefix = "unix:"

// parseMetricsAddress returns the address as Process has it, or a description of those that are accepted.
func parseMetricsAddress(v string) (address, want string) {
	if file, ok := strings.CutPrefix(v, unixPrefix); ok || strings.HasPrefix(v, "/") {
		const longest = len(syscall.RawSockaddrUnix{}.Path) - 1
		if !path.IsAbs(file) || path.Clean(file) != file || file == "/" || len(file) > longest || strings.ContainsRune(file, 0) {
			return "", "unix: and the absolute path of a socket, of " + strconv.Itoa(longest) + " bytes at most, without . and .. in it"
		}
		return unixPrefix + file, ""
	}
	if host, port, _ := strings.Cut(v, ":"); host == "" || host == "localhost" {
		v = "127.0.0.1:" + port
	}
	a, err := netip.ParseAddrPort(v)
	if err != nil {
		return "", "off, an address and a port (127.0.0.1:9469, [::1]:9469; 0.0.0.0:9469 is every address of this host), :9469 for 127.0.0.1, or unix:/path"
	}
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()).String(), ""
}
