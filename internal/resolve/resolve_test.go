package resolve

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// nameServer is a DNS server on loopback, by UDP and TCP.
type nameServer struct {
	resolver *Resolver // asks it, whatever resolv.conf says
	asked    atomic.Int32
}

// record is an A record, or a CNAME record if cname is set.
type record struct {
	ttl   uint32
	a     string
	cname string
}

// reply is how a query is answered; nil is not at all.
type reply struct {
	records   []record
	code      dnsmessage.RCode
	truncated bool // by UDP
	forged    bool // preceded, by UDP, by messages that are no answer to the query
}

func serve(t *testing.T, answer func(name string) *reply) *nameServer {
	t.Helper()
	udp, tcp := listen(t)
	s := &nameServer{resolver: New()}
	s.resolver.dial = func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, udp.LocalAddr().String())
	}
	var serving sync.WaitGroup
	t.Cleanup(func() { udp.Close(); tcp.Close(); serving.Wait() })
	serving.Go(func() {
		buf := make([]byte, 1500)
		for {
			n, from, err := udp.ReadFrom(buf)
			if err != nil {
				return
			}
			query := slices.Clone(buf[:n])
			serving.Go(func() {
				for _, message := range s.answer(t, query, true, answer) {
					_, _ = udp.WriteTo(message, from)
				}
			})
		}
	})
	serving.Go(func() {
		for {
			conn, err := tcp.Accept()
			if err != nil {
				return
			}
			var size [2]byte
			if _, err := io.ReadFull(conn, size[:]); err != nil {
				t.Error(err)
			}
			query := make([]byte, binary.BigEndian.Uint16(size[:]))
			if _, err := io.ReadFull(conn, query); err != nil {
				t.Error(err)
			}
			for _, message := range s.answer(t, query, false, answer) {
				framed := append(binary.BigEndian.AppendUint16(nil, uint16(len(message))), message...)
				for _, b := range framed { // as slowly as it may come
					_, _ = conn.Write([]byte{b})
				}
			}
			conn.Close()
		}
	})
	return s
}

// listen opens the same port by UDP and TCP; it tries another one where TCP's is in use.
func listen(t *testing.T) (udp net.PacketConn, tcp net.Listener) {
	t.Helper()
	for {
		udp, err := net.ListenPacket("udp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		tcp, err := net.Listen("tcp4", udp.LocalAddr().String())
		if err == nil {
			return udp, tcp
		}
		udp.Close()
		if !errors.Is(err, syscall.EADDRINUSE) {
			t.Fatal(err)
		}
	}
}

func (s *nameServer) answer(t *testing.T, query []byte, udp bool, answer func(string) *reply) [][]byte {
	s.asked.Add(1)
	var m dnsmessage.Message
	if err := m.Unpack(query); err != nil {
		t.Error(err)
		return nil
	}
	if m.Questions[0].Type != dnsmessage.TypeA {
		t.Errorf("it was asked for %v", m.Questions[0].Type)
	}
	r := answer(m.Questions[0].Name.String())
	if r == nil {
		return nil
	}
	m.Response, m.RecursionAvailable, m.RCode, m.Additionals = true, true, r.code, nil
	owner := m.Questions[0].Name
	for _, one := range r.records {
		h := dnsmessage.ResourceHeader{Name: owner, Class: dnsmessage.ClassINET, TTL: one.ttl}
		if one.cname != "" {
			owner = dnsmessage.MustNewName(one.cname)
			m.Answers = append(m.Answers, dnsmessage.Resource{Header: h, Body: &dnsmessage.CNAMEResource{CNAME: owner}})
			continue
		}
		m.Answers = append(m.Answers, dnsmessage.Resource{Header: h, Body: &dnsmessage.AResource{A: netip.MustParseAddr(one.a).As4()}})
	}
	var messages [][]byte
	pack := func(m dnsmessage.Message) {
		packed, err := m.Pack()
		if err != nil {
			t.Error(err)
		}
		messages = append(messages, packed)
	}
	if udp && r.forged {
		other := m
		other.ID++
		other.Answers = []dnsmessage.Resource{{
			Header: dnsmessage.ResourceHeader{Name: owner, Class: dnsmessage.ClassINET, TTL: 1},
			Body:   &dnsmessage.AResource{A: [4]byte{203, 0, 113, 66}},
		}}
		pack(other)
		messages = append(messages, []byte("noise"))
	}
	if udp && r.truncated {
		m.Truncated, m.Answers = true, m.Answers[:1]
	}
	pack(m)
	return messages
}

func TestResolver_Lookup(t *testing.T) {
	for _, test := range []struct {
		name  string
		reply reply
		want  string
		ttl   time.Duration
	}{
		{"one", reply{records: []record{{ttl: 300, a: "192.0.2.1"}}}, "[192.0.2.1]", 300 * time.Second},
		{"several", reply{records: []record{{ttl: 300, a: "192.0.2.9"}, {ttl: 299, a: "192.0.2.10"}, {ttl: 301, a: "192.0.2.9"}}}, "[192.0.2.9 192.0.2.10]", 299 * time.Second},
		{"cname-least", reply{records: []record{{ttl: 20, cname: "b.example."}, {ttl: 300, a: "192.0.2.1"}}}, "[192.0.2.1]", 20 * time.Second},
		{"cname-chain", reply{records: []record{{ttl: 900, cname: "b.example."}, {ttl: 800, cname: "c.example."}, {ttl: 700, a: "192.0.2.1"}}}, "[192.0.2.1]", 700 * time.Second},
		{"zero", reply{records: []record{{ttl: 0, a: "192.0.2.1"}}}, "[192.0.2.1]", 0},
		{"top-bit", reply{records: []record{{ttl: 1 << 31, a: "192.0.2.1"}}}, "[192.0.2.1]", 0},
		{"by-tcp", reply{records: []record{{ttl: 70, a: "192.0.2.1"}, {ttl: 60, a: "192.0.2.2"}}, truncated: true}, "[192.0.2.1 192.0.2.2]", time.Minute},
		{"forged", reply{records: []record{{ttl: 300, a: "192.0.2.1"}}, forged: true}, "[192.0.2.1]", 300 * time.Second},
		{"blocked-beside", reply{records: []record{{ttl: 5, a: "0.0.0.0"}, {ttl: 5, a: "192.0.2.1"}, {ttl: 5, a: "224.0.0.1"}}}, "[192.0.2.1]", 5 * time.Second},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s := serve(t, func(string) *reply { return &test.reply })
			a, err := s.resolver.Lookup(t.Context(), "far.example.")
			if err != nil {
				t.Fatal(err)
			}
			if got := fmt.Sprint(a.Addresses); got != test.want || a.TTL != test.ttl {
				t.Errorf("got %v, %v; want %v, %v", got, a.TTL, test.want, test.ttl)
			}
		})
	}
}

func TestResolver_Lookup_errors(t *testing.T) {
	for _, test := range []struct {
		name, want string
		reply      *reply
	}{
		{"nxdomain", "no such host", &reply{code: dnsmessage.RCodeNameError}},
		{"no-data", "no such host", &reply{}},
		{"servfail", "server misbehaving", &reply{code: dnsmessage.RCodeServerFailure}},
		{"blocked", "no IPv4 address of one host", &reply{records: []record{{ttl: 300, a: "0.0.0.0"}}}},
		{"silent", "", nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s := serve(t, func(string) *reply { return test.reply })
			ctx := t.Context()
			if test.reply == nil {
				short, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
				defer cancel()
				ctx = short
			}
			a, err := s.resolver.Lookup(ctx, "far.example.")
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, %v; want %q", a, err, test.want)
			}
			if n := len(s.resolver.slots); n != 0 {
				t.Errorf("%d slots are taken", n)
			}
		})
	}
}

func TestResolver_hosts(t *testing.T) {
	s := serve(t, func(string) *reply { return nil })
	a, err := s.resolver.Lookup(t.Context(), "localhost")
	if err != nil || !slices.Contains(a.Addresses, netip.MustParseAddr("127.0.0.1")) || a.TTL != 0 {
		t.Errorf("got %v, %v", a, err)
	}
	if n := s.asked.Load(); n != 0 {
		t.Errorf("the name server was asked %d times", n)
	}
}

// However many tunnels ask at a time, the name server has a bounded number of queries (parallel), and one for each name.
func TestResolver_burst(t *testing.T) {
	var mu sync.Mutex
	now, most := map[string]bool{}, 0
	release := make(chan struct{})
	s := serve(t, func(name string) *reply {
		mu.Lock()
		if now[name] {
			t.Errorf("it was asked for %s twice", name)
		}
		now[name] = true
		most = max(most, len(now))
		mu.Unlock()
		<-release
		mu.Lock()
		delete(now, name)
		mu.Unlock()
		return &reply{records: []record{{ttl: 300, a: "192.0.2.1"}}}
	})
	const names, tunnels = 100, 3
	errs := make(chan error, names*tunnels)
	for i := range names * tunnels {
		go func() {
			_, err := s.resolver.Lookup(t.Context(), fmt.Sprintf("n%d.example.", i%names))
			errs <- err
		}()
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		mu.Lock()
		asking := len(now)
		mu.Unlock()
		s.resolver.mu.Lock()
		waiting := len(s.resolver.pending)
		s.resolver.mu.Unlock()
		if asking == parallel && waiting == names {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%d queries came, and %d look-ups", asking, waiting)
		}
	}
	close(release)
	for range names * tunnels {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if most > parallel {
		t.Errorf("%d queries at a time", most)
	}
}

// Names of a zone whose servers are silent, however many, do not keep another one waiting.
func TestResolver_silentZone(t *testing.T) {
	s := serve(t, func(name string) *reply {
		if strings.HasPrefix(name, "n") {
			return nil
		}
		return &reply{records: []record{{ttl: 300, a: "192.0.2.1"}}}
	})
	s.resolver.patience, s.resolver.timeout = 50*time.Millisecond, time.Hour
	const names = 5 * parallel
	ctx, cancel := context.WithCancel(t.Context())
	errs := make(chan error, names)
	for i := range names {
		go func() {
			_, err := s.resolver.Lookup(ctx, fmt.Sprintf("n%d.example.", i))
			errs <- err
		}()
	}
	if err := <-errs; err != errSilent {
		t.Errorf("the first that is given up: %v", err)
	}
	a, err := s.resolver.Lookup(t.Context(), "far.example.")
	for err == errSilent { // on a slow machine; a tunnel tries again, too
		a, err = s.resolver.Lookup(t.Context(), "far.example.")
	}
	if err != nil || len(a.Addresses) != 1 {
		t.Errorf("%v, %v", a, err)
	}
	cancel()
	for range names - 1 {
		if err := <-errs; err == nil {
			t.Error("a name that has no answer is resolved")
		}
	}
	if len(s.resolver.slots) != 0 || len(s.resolver.slow) != 0 {
		t.Errorf("%d slots are taken, %d of slow ones", len(s.resolver.slots), len(s.resolver.slow))
	}
}

// A caller that gives up does not take the answer from others who ask for the same name.
func TestResolver_Lookup_canceled(t *testing.T) {
	var asked atomic.Int32
	first, release := make(chan struct{}), make(chan struct{})
	s := serve(t, func(string) *reply {
		if asked.Add(1) == 1 {
			close(first)
			<-release
		}
		return &reply{records: []record{{ttl: 300, a: "192.0.2.1"}}}
	})
	ctx, cancel := context.WithCancel(t.Context())
	gaveUp, answered := make(chan error), make(chan error)
	go func() {
		_, err := s.resolver.Lookup(ctx, "far.example.")
		gaveUp <- err
	}()
	<-first
	go func() {
		_, err := s.resolver.Lookup(t.Context(), "far.example.")
		answered <- err
	}()
	cancel()
	if err := <-gaveUp; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if err := <-answered; err != nil {
		t.Error(err)
	}
	close(release)
}
