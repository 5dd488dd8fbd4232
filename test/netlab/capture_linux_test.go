package netlab

import (
	"testing"

	"ipipd/internal/ipv4"
)

func TestCapture_bothDirections(t *testing.T) {
	a, b := New(t), New(t)
	Veth(t, a, b, End{Name: "eth0", Address: "192.0.2.1/24"}, End{Name: "eth0", Address: "192.0.2.2/24"})
	wire := Capture(t, a, "eth0", nil)
	only := Capture(t, a, "eth0", func(f Frame) bool { return f.Outgoing })

	a.Run("ping", "-c", "1", "-w", Seconds(Timeout()), "-t", "17", "-Q", "0x28", "192.0.2.2")

	request := wire.Await(ICMP(8, 0), Source("192.0.2.1"), Destination("192.0.2.2"), TTL(17), DSCP(10), ECN(ipv4.NotECT))
	reply := wire.Await(ICMP(0, 0), Source("192.0.2.2"), TotalLen(84), DF(false), Fragmented(false))
	if !request.Outgoing || reply.Outgoing {
		t.Errorf("request outgoing %v, reply outgoing %v", request.Outgoing, reply.Outgoing)
	}
	if reply.At.Before(request.At) || request.At.IsZero() {
		t.Errorf("request at %v, reply at %v", request.At, reply.At)
	}
	only.Await(ICMP(8, 0))
	if n := len(only.Matching(ICMP(0, 0))); n != 0 {
		t.Errorf("%d packets were kept that the filter refuses", n)
	}
	if n := len(wire.Matching(Not(Protocol(ipv4.ProtocolICMP)))); n != 0 {
		t.Errorf("%d packets are not ICMP", n)
	}
}
