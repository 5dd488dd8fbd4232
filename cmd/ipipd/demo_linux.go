package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/net/icmp"
	netipv4 "golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"

	"ipipd/internal/control"
	"ipipd/internal/ipv4"
	"ipipd/internal/netstate"
	"ipipd/internal/tunnel"
)

func init() { platformCommands = append(platformCommands, newCmdDemo) }

func newCmdDemo(s *streams) *cobra.Command {
	return &cobra.Command{
		Use:   "demo",
		Short: "Show a tunnel at work between two hosts made for it, and clean up",
		Long: `demo makes two hosts out of network namespaces, brings up one end of a tunnel in
each, pings through it, and shows a packet as it is on the wire and what print
says. Nothing of this host's network is touched, and nothing is left behind. It
needs root.`,
		Args:              noArguments,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE:              func(c *cobra.Command, _ []string) error { return demoRun(c.Context(), s.out) },
	}
}

// demoHost is one of the two hosts of the demo: an unnamed network namespace, which the
// kernel removes when the process ends.
type demoHost struct {
	name         string
	outer, inner netip.Prefix
	namespace    *os.File
	runtimeDir   string
	up           *exec.Cmd
	log          bytes.Buffer
}

// demoTimeout bounds the whole demo, pingTimeout each ping.
const (
	demoTunnel  = "ipip1"
	demoTimeout = 30 * time.Second
	pingTimeout = 2 * time.Second
)

// demoRun runs `ipipd demo`: two hosts, a tunnel between them, three pings, a captured
// packet, and the output of print.
func demoRun(ctx context.Context, out io.Writer) (err error) {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, demoTimeout)
	defer cancel()
	dir, err := os.MkdirTemp("", "ipipd-demo-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	self, err := os.Executable()
	if err != nil {
		return err
	}

	a := &demoHost{name: "a", outer: netip.MustParsePrefix("192.0.2.1/24"), inner: netip.MustParsePrefix("10.255.0.1/30"), runtimeDir: filepath.Join(dir, "a")}
	b := &demoHost{name: "b", outer: netip.MustParsePrefix("192.0.2.2/24"), inner: netip.MustParsePrefix("10.255.0.2/30"), runtimeDir: filepath.Join(dir, "b")}
	fmt.Fprintf(out, "Two hosts, each a network namespace, joined by a cable:\n\n    host a  %v ──────── %v  host b\n\n", a.outer.Addr(), b.outer.Addr())
	for _, h := range []*demoHost{a, b} {
		if h.namespace, err = newNamespace(); err != nil {
			return err
		}
		defer h.namespace.Close()
	}
	if err := joinHosts(a, b); err != nil {
		return fmt.Errorf("cannot join the two hosts: %w", err)
	}

	fmt.Fprintln(out, "One end of the tunnel in each:")
	fmt.Fprintln(out)
	for _, h := range []*demoHost{a, b} {
		remote := b
		if h == b {
			remote = a
		}
		if err := h.start(ctx, out, self, remote.outer.Addr()); err != nil {
			return err
		}
		defer h.stop()
	}
	for _, h := range []*demoHost{a, b} {
		if err := h.waitReady(ctx); err != nil {
			return err
		}
	}

	var wire []byte
	fmt.Fprintf(out, "\na$ ping -c 3 %v\n", b.inner.Addr())
	if err := a.do(func() error {
		capture, err := openCapture("wire0")
		if err != nil {
			return err
		}
		defer unix.Close(capture)
		for seq := 1; seq <= 3; seq++ {
			if err := ping(out, a.inner.Addr(), b.inner.Addr(), seq); err != nil {
				return err
			}
		}
		wire, err = readTunnelledEcho(capture)
		return err
	}); err != nil {
		return err
	}
	fmt.Fprintln(out, "\nThe first of them on the cable, IP in IP (RFC 2003):")
	fmt.Fprintln(out)
	if err := printPacket(out, wire); err != nil {
		return err
	}
	for _, args := range [][]string{{"print"}, {"print", demoTunnel}} {
		fmt.Fprintf(out, "\na$ ipipd %s\n", strings.Join(args, " "))
		print := exec.CommandContext(ctx, self, append(args, "--runtime-dir", a.runtimeDir)...)
		print.Stdout, print.Stderr = out, out
		if err := print.Run(); err != nil {
			return fmt.Errorf("ipipd print: %w", err)
		}
	}
	for _, h := range []*demoHost{a, b} {
		if err := h.stop(); err != nil {
			return fmt.Errorf("host %s: ipipd did not end cleanly: %w\n%s", h.name, err, h.log.String())
		}
	}
	fmt.Fprintln(out, "\nBoth ends stopped; hosts, cable and interfaces are gone.")
	return nil
}

// newNamespace creates a network namespace. It exists while its file is open or a process
// is in it.
func newNamespace() (file *os.File, err error) {
	err = runOnNewThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			if errors.Is(err, unix.EPERM) {
				return fmt.Errorf("cannot make a network namespace: %w: run the demo as root, or in a container with --privileged", os.NewSyscallError("unshare", err))
			}
			return os.NewSyscallError("unshare", err)
		}
		file, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	return file, err
}

// runOnNewThread calls f on a new thread that ends with f, so that no other goroutine runs
// in a namespace that f has entered.
func runOnNewThread(f func() error) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked, so the thread ends
		result <- f()
	}()
	return <-result
}

// do calls f in the host's network namespace, where sockets and processes of f stay.
func (h *demoHost) do(f func() error) error {
	return runOnNewThread(func() error {
		if err := unix.Setns(int(h.namespace.Fd()), unix.CLONE_NEWNET); err != nil {
			return os.NewSyscallError("setns", err)
		}
		return f()
	})
}

// joinHosts joins the two hosts with a veth pair, wire0 at both ends.
func joinHosts(a, b *demoHost) error {
	if err := a.do(func() error { return netstate.AddVeth("wire0", "wire0", int(b.namespace.Fd())) }); err != nil {
		return err
	}
	for _, h := range []*demoHost{a, b} {
		if err := h.do(func() error {
			wire, err := netstate.DeviceIndex("wire0")
			if err != nil {
				return err
			}
			const loopback = 1 // its index in every namespace
			_, err = netstate.AddAddresses(wire, []netstate.InterfaceAddress{{Prefix: h.outer}})
			return errors.Join(err, netstate.SetUp(loopback), netstate.SetUp(wire))
		}); err != nil {
			return err
		}
	}
	return nil
}

// start runs `ipipd up` in the host.
func (h *demoHost) start(ctx context.Context, out io.Writer, self string, remote netip.Addr) error {
	args := []string{"up", "--local-address", h.outer.Addr().String(), "--remote-address", remote.String(), "--address", h.inner.String()}
	fmt.Fprintf(out, "%s$ ipipd %s\n", h.name, strings.Join(args, " "))
	h.up = exec.Command(self, append(args, "--name", demoTunnel, "--runtime-dir", h.runtimeDir)...)
	h.up.Stdout, h.up.Stderr = &h.log, &h.log
	// So that a killed demo leaves no tunnel running.
	h.up.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	started := make(chan error)
	go func() { // Pdeathsig is sent when the parent thread ends, so keep it
		runtime.LockOSThread()
		err := unix.Setns(int(h.namespace.Fd()), unix.CLONE_NEWNET)
		if err == nil {
			err = h.up.Start()
		}
		started <- err
		<-ctx.Done()
	}()
	return <-started
}

// waitReady waits until the tunnel is ready.
func (h *demoHost) waitReady(ctx context.Context) error {
	for {
		var status tunnel.Status
		if control.Status(h.runtimeDir, demoTunnel, time.Second, &status) == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("host %s: the tunnel did not come up:\n%s", h.name, h.log.String())
		case <-time.After(20 * time.Millisecond):
		}
		if h.up.Process.Signal(syscall.Signal(0)) != nil {
			return fmt.Errorf("host %s: ipipd ended:\n%s", h.name, h.log.String())
		}
	}
}

// stop ends `ipipd up` with SIGTERM, as systemd would. It may be called more than once.
func (h *demoHost) stop() error {
	if h.up == nil || h.up.Process == nil || h.up.ProcessState != nil {
		return nil
	}
	h.up.Process.Signal(syscall.SIGTERM)
	late := time.AfterFunc(5*time.Second, func() { h.up.Process.Kill() })
	defer late.Stop()
	return h.up.Wait()
}

// ping sends one ICMP echo request and waits for its reply.
func ping(out io.Writer, from, to netip.Addr, seq int) error {
	conn, err := icmp.ListenPacket("ip4:icmp", from.String())
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.IPv4PacketConn().SetControlMessage(netipv4.FlagTTL, true); err != nil {
		return err
	}
	request := icmp.Message{Type: netipv4.ICMPTypeEcho, Body: &icmp.Echo{ID: os.Getpid() & 0xffff, Seq: seq, Data: make([]byte, 56)}}
	message, err := request.Marshal(nil)
	if err != nil {
		return err
	}
	start := time.Now()
	if _, err := conn.WriteTo(message, &net.IPAddr{IP: to.AsSlice()}); err != nil {
		return err
	}
	conn.SetReadDeadline(start.Add(pingTimeout))
	buf := make([]byte, 1500)
	for {
		n, control, _, err := conn.IPv4PacketConn().ReadFrom(buf)
		if err != nil {
			return fmt.Errorf("no answer to ping %d: %w", seq, err)
		}
		reply, err := icmp.ParseMessage(1, buf[:n])
		if err != nil || reply.Type != netipv4.ICMPTypeEchoReply {
			continue
		}
		if echo, ok := reply.Body.(*icmp.Echo); ok && echo.Seq == seq {
			took := time.Since(start)
			fmt.Fprintf(out, "%d bytes from %v: icmp_seq=%d ttl=%d time=%.3f ms\n", n, to, seq, control.TTL, took.Seconds()*1e3)
			return nil
		}
	}
}

// openCapture opens a packet socket on the interface.
func openCapture(name string) (fd int, err error) {
	ifi, err := net.InterfaceByName(name)
	if err != nil {
		return -1, err
	}
	all := int(uint16(unix.ETH_P_ALL)<<8 | uint16(unix.ETH_P_ALL)>>8) // network byte order
	fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: uint16(all), Ifindex: ifi.Index}); err != nil {
		unix.Close(fd)
		return -1, os.NewSyscallError("bind", err)
	}
	return fd, nil
}

// readTunnelledEcho returns the first captured IPIP packet with an ICMP echo request inside.
func readTunnelledEcho(fd int) ([]byte, error) {
	buf := make([]byte, 2048)
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err != nil {
			return nil, fmt.Errorf("no tunnelled ping was seen on the cable: %w", os.NewSyscallError("recvfrom", err))
		}
		outer, err := ipv4.Parse(buf[:n])
		if err != nil || outer.Protocol() != ipv4.ProtocolIPIP {
			continue
		}
		inner, err := ipv4.Parse(outer.Payload())
		if err == nil && inner.Protocol() == unix.IPPROTO_ICMP && inner.Payload()[0] == byte(netipv4.ICMPTypeEcho) {
			return buf[:n], nil
		}
	}
}

// printPacket prints both IPv4 headers of a packet, then a hex dump.
func printPacket(out io.Writer, wire []byte) error {
	outer, err := ipv4.Parse(wire)
	if err != nil {
		return err
	}
	inner, err := ipv4.Parse(outer.Payload())
	if err != nil {
		return err
	}
	describe := func(what string, p ipv4.Packet, carries string) {
		df := 0
		if p.DF() {
			df = 1
		}
		fmt.Fprintf(out, "    %s  IPv4 %v > %v, protocol %d (%s), TTL %d, TOS 0x%02x, ID %d, DF=%d, %d bytes\n", what,
			netip.AddrFrom4(p.Source()), netip.AddrFrom4(p.Destination()), p.Protocol(), carries, p.TTL(), p.TOS(), p.ID(), df, p.TotalLen())
	}
	describe("outer", outer, "IPv4")
	describe("inner", inner, "ICMP")
	fmt.Fprintln(out)
	for _, line := range strings.Split(strings.TrimSpace(hex.Dump(outer.Bytes())), "\n") {
		fmt.Fprintln(out, "    "+line)
	}
	return nil
}
