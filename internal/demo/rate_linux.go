package demo

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"time"
)

// rate sends from one host to another by TCP for a moment, and shows what monitor says meanwhile.
func (l *laboratory) rate(ctx context.Context, from, to *host, src, dst netip.Addr) error {
	l.say("\nTCP from %s to %s, as fast as it goes:", from.name, to.name)
	conn, accepted, err := connect(ctx, from, to, src, dst)
	if err != nil {
		return err
	}
	received := make(chan int64, 1)
	go func() {
		n, _ := io.Copy(io.Discard, accepted)
		received <- n
	}()
	begin := time.Now()
	sent := make(chan error, 1)
	go func() {
		for b := make([]byte, 128<<10); ; {
			if _, err := conn.Write(b); err != nil {
				sent <- err
				return
			}
		}
	}()
	interval := "500ms"
	if l.Lossy {
		interval = "1s" // with losses TCP needs longer to get going
	}
	err = l.show(ctx, from, nil, "monitor", tunnelName, "--interval", interval, "--count", "1")
	took := time.Since(begin)
	// Reset, since connections that end by themselves would keep their namespaces for a while.
	for _, c := range []*net.TCPConn{conn, accepted} {
		_ = c.SetLinger(0)
		c.Close()
	}
	<-sent
	n := <-received
	if err != nil {
		return err
	}
	if n == 0 {
		return errors.New("no byte went through the tunnel by TCP")
	}
	l.say("\n%.1f MB arrived in %.1f s: %.0f Mbit/s on this machine.", float64(n)/1e6, took.Seconds(), float64(n)*8/took.Seconds()/1e6)
	return nil
}

// connect makes a TCP connection, and returns both ends.
func connect(ctx context.Context, from, to *host, src, dst netip.Addr) (conn, accepted *net.TCPConn, err error) {
	var listener *net.TCPListener
	if err := to.namespace.Do(func() (err error) {
		listener, err = net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(netip.AddrPortFrom(dst, 0)))
		return err
	}); err != nil {
		return nil, nil, err
	}
	defer listener.Close()
	if err := from.namespace.Do(func() error {
		dialer := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(src, 0))}
		c, err := dialer.DialContext(ctx, "tcp4", listener.Addr().String())
		if err == nil {
			conn = c.(*net.TCPConn)
		}
		return err
	}); err != nil {
		return nil, nil, err
	}
	stop := context.AfterFunc(ctx, func() { listener.Close() })
	defer stop()
	if accepted, err = listener.AcceptTCP(); err != nil {
		_ = conn.SetLinger(0)
		conn.Close()
	}
	return conn, accepted, err
}
