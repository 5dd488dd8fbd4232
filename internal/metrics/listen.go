package metrics

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/net/netutil"
)

// maxConnections is how many clients can be connected at once; more wait.
const maxConnections = 32

// Listen opens the address of config.Process.MetricsAddress. Closing the Listener removes the unix socket.
func Listen(address string) (net.Listener, error) {
	if path, ok := strings.CutPrefix(address, "unix:"); ok {
		return listenUnix(path)
	}
	at, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, err
	}
	network := "tcp" // [::] is both families
	if at.Addr().Is4() {
		network = "tcp4" // else 0.0.0.0 would be [::], too
	}
	l, err := net.Listen(network, address)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("%w: another process has the port (ss -ltnp 'sport = :%d')", err, at.Port())
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return nil, fmt.Errorf("%w: no interface of this host has the address", err)
	case err != nil:
		return nil, err
	}
	return netutil.LimitListener(l, maxConnections), nil
}

// listenUnix makes a socket of mode 0660. It replaces one that nobody listens at.
func listenUnix(path string) (net.Listener, error) {
	if err := removeStale(path); err != nil {
		return nil, err
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) { // so that others cannot connect before the mode is set
			if runtime.GOOS == "linux" {
				_ = syscall.Fchmod(int(fd), 0o600)
			}
		})
	}}
	l, err := lc.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, err
	}
	made := &unixListener{UnixListener: l.(*net.UnixListener), path: path}
	made.SetUnlinkOnClose(false) // see Close
	if err := os.Chmod(path, 0o660); err != nil {
		_ = made.UnixListener.Close()
		_ = os.Remove(path)
		return nil, err
	}
	if made.info, err = os.Lstat(path); err != nil {
		_ = made.UnixListener.Close()
		return nil, err
	}
	return netutil.LimitListener(made, maxConnections), nil
}

// removeStale removes a socket that nobody listens at, which a process that was killed has left.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode()&fs.ModeSocket == 0:
		return fmt.Errorf("%s is no socket: %w", path, fs.ErrExist)
	}
	c, err := net.DialTimeout("unix", path, time.Second)
	switch {
	case err == nil:
		c.Close()
		return fmt.Errorf("%s: another process listens there", path)
	case errors.Is(err, syscall.ECONNREFUSED):
		return os.Remove(path)
	}
	return err
}

// unixListener removes its socket, unless another has taken its place.
type unixListener struct {
	*net.UnixListener
	path string
	info fs.FileInfo
}

func (l *unixListener) Close() error {
	if now, err := os.Lstat(l.path); err == nil && os.SameFile(now, l.info) {
		_ = os.Remove(l.path)
	}
	return l.UnixListener.Close()
}

// ShownAddress returns where l listens, in the notation of metrics-address, with the port that port 0 has become.
func ShownAddress(l net.Listener) string {
	if l.Addr().Network() == "unix" {
		return "unix:" + l.Addr().String()
	}
	return l.Addr().String()
}
