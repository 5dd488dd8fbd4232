package demo

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"

	netipv4 "golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"

	"ipipd/internal/ipv4"
)

// openCapture opens a packet socket on an interface of a host.
func openCapture(h *host, name string) (file *os.File, err error) {
	err = h.namespace.Do(func() error {
		device, err := net.InterfaceByName(name)
		if err != nil {
			return err
		}
		const all = unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8 // network byte order
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return os.NewSyscallError("socket", err)
		}
		if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: device.Index}); err != nil {
			unix.Close(fd)
			return os.NewSyscallError("bind", err)
		}
		file = os.NewFile(uintptr(fd), "capture on "+name)
		return nil
	})
	return file, err
}

// readOuter returns the first captured outer packet: ESP, or IPIP with an ICMP echo request inside.
func readOuter(capture *os.File, esp bool) ([]byte, error) {
	raw, err := capture.SyscallConn()
	if err != nil {
		return nil, err
	}
	buf := make([]byte, 2048)
	for {
		var n int
		var failed error
		if err := raw.Control(func(fd uintptr) { n, _, failed = unix.Recvfrom(int(fd), buf, 0) }); err != nil {
			return nil, err
		}
		if failed != nil {
			return nil, fmt.Errorf("no ping was seen on the cable: %w", os.NewSyscallError("recvfrom", failed))
		}
		outer, err := ipv4.Parse(buf[:n])
		switch {
		case err != nil:
		case esp && outer.Protocol() == unix.IPPROTO_ESP:
			return buf[:n], nil
		case !esp && outer.Protocol() == ipv4.ProtocolIPIP:
			inner, err := ipv4.Parse(outer.Payload())
			if err == nil && inner.Protocol() == unix.IPPROTO_ICMP && len(inner.Payload()) > 0 && inner.Payload()[0] == byte(netipv4.ICMPTypeEcho) {
				return buf[:n], nil
			}
		}
	}
}

// describe prints the headers of an outer packet that can be read, then a hex dump.
func (l *laboratory) describe(packet []byte) error {
	outer, err := ipv4.Parse(packet)
	if err != nil {
		return err
	}
	header := func(what string, p ipv4.Packet, carries string) {
		df := 0
		if p.DF() {
			df = 1
		}
		l.say("    %s  IPv4 %v > %v, protocol %d (%s), TTL %d, TOS 0x%02x, ID %d, DF=%d, %d bytes", what,
			netip.AddrFrom4(p.Source()), netip.AddrFrom4(p.Destination()), p.Protocol(), carries, p.TTL(), p.TOS(), p.ID(), df, p.TotalLen())
	}
	if outer.Protocol() == unix.IPPROTO_ESP {
		header("outer", outer, "ESP")
		const espHeader = 8
		if len(outer.Payload()) < espHeader {
			return errors.New("the ESP packet on the cable is too short")
		}
		spi, seq := binary.BigEndian.Uint32(outer.Payload()), binary.BigEndian.Uint32(outer.Payload()[4:])
		l.say("    inner  not to be read: SPI 0x%08x, sequence number %d, the rest is encrypted", spi, seq)
	} else {
		inner, err := ipv4.Parse(outer.Payload())
		if err != nil {
			return err
		}
		header("outer", outer, "IPv4")
		header("inner", inner, "ICMP")
	}
	l.say("")
	for line := range strings.Lines(strings.TrimSpace(hex.Dump(outer.Bytes()))) {
		l.say("    %s", strings.TrimSuffix(line, "\n"))
	}
	return nil
}
