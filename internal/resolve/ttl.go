package resolve

import (
	"encoding/binary"
	"math"
	"net"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// ttlReader reads the TTL of a look-up from the messages that its connections receive. The
// resolver ignores messages that do not match its query, and waits on; of those that match, one
// with addresses ends the look-up. So the last message with addresses is the answer.
type ttlReader struct{ least time.Duration }

// watch returns a conn that has r read the messages it receives. It stays a net.PacketConn if it is
// one, by which the resolver tells how messages are framed.
func (r *ttlReader) watch(conn net.Conn) net.Conn {
	if udp, ok := conn.(*net.UDPConn); ok {
		return &datagrams{udp, r}
	}
	return &stream{Conn: conn, ttl: r}
}

// read takes the TTL of a message that has A records: the smallest of the answer section. One with
// the top bit set counts as 0 (RFC 2181, section 8).
func (r *ttlReader) read(message []byte) {
	var p dnsmessage.Parser
	if _, err := p.Start(message); err != nil || p.SkipAllQuestions() != nil {
		return
	}
	least, addresses := uint32(math.MaxUint32), false
	for {
		h, err := p.AnswerHeader()
		if err != nil || p.SkipAnswer() != nil {
			break
		}
		addresses = addresses || h.Type == dnsmessage.TypeA
		if h.TTL > math.MaxInt32 {
			h.TTL = 0
		}
		least = min(least, h.TTL)
	}
	if addresses {
		r.least = time.Duration(least) * time.Second
	}
}

// datagrams is a connection whose Read returns a message.
type datagrams struct {
	*net.UDPConn
	ttl *ttlReader
}

func (c *datagrams) Read(p []byte) (n int, err error) {
	if n, err = c.UDPConn.Read(p); err == nil {
		c.ttl.read(p[:n])
	}
	return n, err
}

// stream is a connection for one query, whose answer comes with its length in front (RFC 1035,
// section 4.2.2).
type stream struct {
	net.Conn
	ttl      *ttlReader
	received []byte
}

func (c *stream) Read(p []byte) (n int, err error) {
	n, err = c.Conn.Read(p)
	c.received = append(c.received, p[:n]...)
	if len(c.received) < 2 {
		return n, err
	}
	if size := int(binary.BigEndian.Uint16(c.received)); len(c.received) >= 2+size {
		c.ttl.read(c.received[2 : 2+size])
	}
	return n, err
}
