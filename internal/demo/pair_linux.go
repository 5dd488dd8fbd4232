package demo

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"ipipd/internal/lab"
)

// pair shows a tunnel between two hosts.
func (l *laboratory) pair(ctx context.Context) error {
	a, err := l.add("a")
	if err != nil {
		return err
	}
	b, err := l.add("b")
	if err != nil {
		return err
	}
	outer := [2]netip.Prefix{netip.MustParsePrefix("192.0.2.1/24"), netip.MustParsePrefix("192.0.2.2/24")}
	inner := [2]netip.Prefix{netip.MustParsePrefix("10.255.0.1/30"), netip.MustParsePrefix("10.255.0.2/30")}
	l.say("Two hosts, each a network namespace, joined by %s:\n\n    host a  %v ──────── %v  host b\n", l.cable(), outer[0].Addr(), outer[1].Addr())
	ends := [2]lab.End{{Namespace: a.namespace, Name: wire}, {Namespace: b.namespace, Name: wire}}
	if err := l.join(ends[0], ends[1]); err != nil {
		return err
	}
	encryption, err := l.encryption()
	if err != nil {
		return err
	}
	l.say("One end of the tunnel in each:\n")
	for i, h := range l.hosts {
		if err := ends[i].SetUp(lab.Address{Prefix: outer[i]}); err != nil {
			return err
		}
		args := []string{"--local-address", outer[i].Addr().String(), "--remote-address", outer[1-i].Addr().String(), "--address", inner[i].String()}
		for _, flag := range encryption {
			args = append(args, "--"+flag[0], flag[1])
		}
		l.say("%s$ ipipd up %s", h.name, strings.Join(args, " "))
		if err := h.start(append(args, "--name", tunnelName)...); err != nil {
			return err
		}
	}
	if err := l.awaitReady(ctx); err != nil {
		return err
	}
	src, dst := inner[0].Addr(), inner[1].Addr()
	began := time.Now()
	if _, _, err := reachAll(ctx, []flow{{a, src, dst}}); err != nil {
		return err
	}
	if l.Encrypted {
		l.say("\nIKE took %.0f ms until the first packet was answered.", time.Since(began).Seconds()*1e3)
	}
	packet, err := l.ping(ctx, a, src, dst)
	if err != nil {
		return err
	}
	l.say("\nThe first of them on the cable%s:\n", map[bool]string{true: ", encrypted by ESP (RFC 4303)", false: ", IP in IP (RFC 2003)"}[l.Encrypted])
	if err := l.describe(packet); err != nil {
		return err
	}
	if err := l.rate(ctx, a, b, src, dst); err != nil {
		return err
	}
	if err := l.show(ctx, a, nil, "print"); err != nil {
		return err
	}
	if err := l.show(ctx, a, state, "print", tunnelName); err != nil {
		return err
	}
	l.countLost()
	return nil
}

// ping sends some pings, and returns the first as it is on the cable.
func (l *laboratory) ping(ctx context.Context, from *host, src, dst netip.Addr) (packet []byte, err error) {
	p, err := newPinger(from)
	if err != nil {
		return nil, err
	}
	defer p.close()
	capture, err := openCapture(from, wire)
	if err != nil {
		return nil, err
	}
	defer capture.Close()
	count, patience := 3, 10*time.Second
	if l.Lossy {
		count, patience = 20, 200*time.Millisecond
	}
	l.say("\n%s$ ping -c %d %v", from.name, count, dst)
	replies := 0
	for seq := 1; seq <= count; seq++ {
		r, answered, err := p.once(ctx, src, dst, patience)
		switch {
		case err != nil:
			return nil, err
		case answered:
			replies++
			if !l.Lossy {
				l.say("%d bytes from %v: icmp_seq=%d ttl=%d time=%.3f ms", r.size, dst, seq, r.ttl, r.after.Seconds()*1e3)
			}
		case !l.Lossy:
			return nil, fmt.Errorf("no answer to ping %d", seq)
		}
	}
	if l.Lossy {
		l.say("%d packets transmitted, %d received: %d requests or replies were lost on the cable", count, replies, count-replies)
	}
	return readOuter(capture, l.Encrypted)
}
