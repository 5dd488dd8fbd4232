package page

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/url"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/net/html"

	"ipipd/internal/drop"
	"ipipd/internal/history"
	"ipipd/internal/tunnel"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var start = time.Date(2026, 11, 27, 12, 0, 0, 0, time.UTC)

// aTunnel returns the Sample of a tunnel with everything that a page shows.
func aTunnel(name string) tunnel.Sample {
	return tunnel.Sample{
		Name: name, Interface: name, Comment: "to the office", LocalAddress: "192.0.2.1", RemoteAddress: "198.51.100.1",
		Started: true, Running: true, FastPath: true, MTU: 1480, PathMTU: 1500, LastHeard: start.Add(-3 * time.Second),
		RxPackets: 3, RxBytes: 300, TxPackets: 1 << 40, TxBytes: 1 << 53, StateChanges: 5,
		ProbesSent: 9, ProbesAnswered: 8, ProbesHaveAnswers: true, RoundTrip: 1500 * time.Microsecond,
		Encrypted: true, Established: true, SAs: 2, Since: start.Add(-time.Hour), RekeyAt: start.Add(time.Hour),
		Warnings: []tunnel.Warning{
			{Code: "peer-mtu", Severity: "warning", Text: "larger packets come", Detail: "of 1,520 bytes", Remedy: "`--mtu`, at both ends", Since: start},
			{Code: "fragments", Severity: "note", Text: "it fragments", Remedy: "none needed", Since: start},
		},
	}
}

// process stands in for the process that a Page shows; reads counts how often it was read.
type process struct {
	mu      sync.Mutex
	samples *tunnel.Samples
	reads   int
}

func (p *process) set(tunnels ...tunnel.Sample) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.samples = &tunnel.Samples{Tunnels: tunnels}
}

func (p *process) read() *tunnel.Samples {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.reads++
	if p.samples == nil {
		return nil
	}
	s := *p.samples
	s.Tunnels = append([]tunnel.Sample(nil), s.Tunnels...)
	return &s
}

func newPage(tunnels ...tunnel.Sample) (*Page, *process) {
	of := &process{}
	if tunnels != nil {
		of.set(tunnels...)
	}
	return New(Options{Version: "v1.2.3", Host: "router7", Samples: of.read, Compare: strings.Compare}), of
}

// carry has all tunnels carry so many bytes and drop so many packets a second, for so many readings of the history,
// and returns the time of the last.
func carry(p *Page, of *process, from time.Time, readings int, rxBytes, txBytes, drops uint64) time.Time {
	for range readings {
		from = from.Add(Interval)
		of.mu.Lock()
		for i := range of.samples.Tunnels {
			add(&of.samples.Tunnels[i], rxBytes, txBytes, drops)
		}
		of.mu.Unlock()
		p.read(from)
	}
	return from
}

// add counts an Interval's traffic of a tunnel, in packets of 1,000 bytes; its arguments are rates per second.
func add(s *tunnel.Sample, rxBytes, txBytes, drops uint64) {
	const seconds = uint64(Interval / time.Second)
	s.RxBytes, s.RxPackets = s.RxBytes+rxBytes*seconds, s.RxPackets+rxBytes*seconds/1000
	s.TxBytes, s.TxPackets = s.TxBytes+txBytes*seconds, s.TxPackets+txBytes*seconds/1000
	s.Drops[drop.TooBig] += drops * seconds
}

// busy returns a Page of n tunnels whose rates have changed with each reading of ten minutes.
func busy(n int) *Page {
	var tunnels []tunnel.Sample
	for i := range n {
		s := aTunnel(fmt.Sprint("ipip", i))
		s.Encrypted, s.Comment = false, fmt.Sprint("to office ", i)
		tunnels = append(tunnels, s)
	}
	p, of := newPage(tunnels...)
	r := rand.New(rand.NewPCG(1, 2))
	now := start
	for range readings {
		for i := range of.samples.Tunnels {
			add(&of.samples.Tunnels[i], r.Uint64N(1e8), r.Uint64N(1e8), r.Uint64N(3))
		}
		p.read(now)
		now = now.Add(Interval)
	}
	p.now = func() time.Time { return now }
	return p
}

// allocated returns the bytes of the heap in use after a collection.
func allocated() int {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC() // finalizers
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc)
}

func get(t testing.TB, h http.Handler, target string) *httptest.ResponseRecorder {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, target, nil))
	return w
}

// texts returns the text of a page without its style and script. It fails the test if the page has a second script,
// an element that pages do not have, an attribute of script or style, or a link to another host.
func texts(t testing.TB, page []byte) string {
	t.Helper()
	var text []string
	scripts := 0
	tokens := html.NewTokenizer(bytes.NewReader(page))
	inside := ""
	for {
		switch tokens.Next() {
		case html.ErrorToken:
			if scripts != 1 {
				t.Errorf("%d scripts", scripts)
			}
			return strings.Join(strings.Fields(strings.Join(text, "")), " ")
		case html.StartTagToken, html.SelfClosingTagToken:
			token := tokens.Token()
			inside = token.Data
			switch token.Data {
			case "script":
				scripts++
			case "style", "html", "head", "meta", "noscript", "link", "title", "body", "header", "h1", "h2", "p", "main", "footer", "a", "span", "code", "b", "bdi", "small",
				"input", "table", "thead", "tbody", "tr", "th", "td", "svg", "path", "section", "figure", "figcaption", "div", "dl", "dt", "dd":
			default:
				t.Errorf("an element of a name that the page has none of: %.200q", token.String())
			}
			for _, a := range token.Attr {
				switch {
				case strings.HasPrefix(a.Key, "on"), a.Key == "style", a.Key == "src", a.Key == "srcset":
					t.Errorf("attribute %s: %.200q", a.Key, a.Val)
				case a.Key == "href":
					if u, err := url.Parse(a.Val); err != nil || u.Host != "" || u.Scheme != "" && a.Val != "data:," {
						t.Errorf("a link to %.200q", a.Val)
					}
				}
			}
			text = append(text, " ")
		case html.EndTagToken:
			inside = ""
		case html.TextToken:
			if inside != "script" && inside != "style" {
				text = append(text, string(tokens.Text()))
			}
		}
	}
}

func wantAll(t *testing.T, text string, want ...string) {
	t.Helper()
	for _, w := range want {
		if !strings.Contains(text, w) {
			t.Errorf("there is no %q in:\n%s", w, text)
		}
	}
}

func TestPage(t *testing.T) {
	second := aTunnel("ipip2")
	second.Running, second.Encrypted, second.Established, second.FastPath, second.LastHeard = false, false, false, false, time.Time{}
	second.KeepaliveState = "never-heard"
	third := aTunnel("ipip3")
	third.Running, third.WaitingFor = false, "route to 198.51.100.1"
	off := tunnel.Sample{Name: "ipip4", Interface: "ipip4", RemoteAddress: "office.example", Disabled: true}
	p, of := newPage(second, off, aTunnel("ipip1"), third)
	p.read(start)
	now := carry(p, of, start, 4, 125_000, 25_000, 3)
	_, page := p.makeIndex(now)
	text := texts(t, page)
	wantAll(t, text, "ipipd on router7", "v1.2.3",
		"4 tunnels: 1 running, 1 never-heard, 1 waiting, 1 disabled, 3 with warnings; in 3.00 Mbit/s, out 600 kbit/s, 9 drops/s.",
		"ipip1 to the office running warns of peer-mtu 198.51.100.1 1.00 M 200 k 3 too-big 23 s 1.50 ms 1500 fast path established",
		"ipip2 to the office never-heard the peer was never heard warns of peer-mtu 198.51.100.1 1.00 M 200 k 3 too-big never 1.50 ms 1500 userspace",
		"waiting for route to 198.51.100.1", "ipip4 disabled office.example")
	if a, b := strings.Index(text, "ipip1 to"), strings.Index(text, "ipip2 to"); a > b {
		t.Error("they are not in order")
	}
	_, page = p.makeTunnel(now, "ipip1")
	wantAll(t, texts(t, page), "ipip1 running", "to the office", "in 1.00 Mbit/s", "out 200 kbit/s", "in 125 /s", "Drops 3 /s",
		"Local address 192.0.2.1", "Remote address 198.51.100.1", "Path MTU 1500", "Path fast path", "9 sent, 8 answered", "IPsec established",
		"peer-mtu warning "+clock(start)+" larger packets come of 1,520 bytes --mtu, at both ends fragments note ", "Drops Reason", "too-big 60 3/s now "+drop.TooBig.Why(), drop.TooBig.Remedy())
	_, page = p.makeTunnel(now, "ipip4")
	wantAll(t, texts(t, page), "ipip4 disabled", "Remote address office.example")
}

// Drops that belong to no tunnel are on the page of all tunnels.
func TestPage_process(t *testing.T) {
	p, of := newPage(aTunnel("ipip1"))
	of.samples.Drops[drop.UnknownPeer] = 7
	_, page := p.makeIndex(start)
	wantAll(t, texts(t, page), "Drops that belong to no tunnel", "unknown-peer 7 "+drop.UnknownPeer.Why())
}

func TestPage_ServeHTTP(t *testing.T) {
	p, of := newPage()
	check := func(method, target string, status int, text string) http.Header {
		t.Helper()
		w := httptest.NewRecorder()
		p.ServeHTTP(w, httptest.NewRequest(method, target, nil))
		if w.Code != status || !strings.Contains(w.Body.String(), text) {
			t.Errorf("%s %s: %d, want %d with %q:\n%.2000s", method, target, w.Code, status, text, w.Body)
		}
		return w.Header()
	}
	again := func() { p.mu.Lock(); p.taken = time.Time{}; p.mu.Unlock() } // has the samples read again
	check("GET", "/", 503, starting)
	check("GET", "/tunnel/ipip1", 503, starting)
	of.set()
	again()
	check("GET", "/", 200, "0 tunnels: none")
	of.set(aTunnel("ipip1"))
	again()
	check("GET", "/", 200, "1 tunnel: 1 running, 1 with warnings")
	of.set(aTunnel("ipip1"), aTunnel("metrics"), aTunnel("tunnel"), aTunnel("a b%2F?#&\"'+;=:@\\<>"), tunnel.Sample{Name: "long", Interface: "ipip-0123456789"})
	again()
	check("GET", "/", 200, `href="tunnel/ipip1"`)
	check("GET", "/", 200, `href="metrics"`)
	check("GET", "/tunnel/ipip1", 200, `href="../"`)
	check("GET", "/tunnel/ipip1", 200, `href="../metrics"`)
	check("GET", "/tunnel/metrics", 200, "metrics")
	check("GET", "/tunnel/ipip-0123456789", 200, "long")
	check("GET", "/tunnel/ipip9", 404, "There is no tunnel ipip9")
	check("GET", "/tunnel/", 404, "")
	check("GET", "/ipip9", 404, "")
	check("GET", "/tunnel/ipip1/x", 404, "")
	check("GET", "/debug/pprof/", 404, "")
	check("GET", "/favicon.ico", 404, "")
	check("POST", "/", 405, "")
	check("DELETE", "/tunnel/ipip1", 405, "")
	check("PUT", "/ipip1", 405, "")
	for name, location := range map[string]string{"ipip1": "tunnel/ipip1", "tunnel": "tunnel/tunnel", `a b%2F?#&"'+;=:@\<>`: "tunnel/" + url.PathEscape(`a b%2F?#&"'+;=:@\<>`)} {
		h := check("GET", "/"+url.PathEscape(name), 302, "")
		if h.Get("Location") != location {
			t.Errorf("%s leads to %q", name, h.Get("Location"))
		}
		check("GET", "/"+location, 200, "")
	}
	// A link leads to its tunnel.
	w := get(t, p, "/")
	found := 0
	tokens := html.NewTokenizer(w.Body)
	for tokens.Next() != html.ErrorToken {
		for _, a := range tokens.Token().Attr {
			if a.Key == "href" && strings.HasPrefix(a.Val, "tunnel/") {
				found++
				check("GET", "/"+a.Val, 200, "")
			}
		}
	}
	if found != 5 {
		t.Errorf("%d links", found)
	}
}

func TestPage_headers(t *testing.T) {
	p, _ := newPage(aTunnel("ipip1"))
	for _, path := range []string{"/", "/tunnel/ipip1", "/tunnel/ipip2"} {
		for _, method := range []string{"GET", "HEAD"} {
			w := httptest.NewRecorder()
			p.ServeHTTP(w, httptest.NewRequest(method, path, nil))
			for name, want := range map[string]string{
				"Content-Type": "text/html; charset=utf-8", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
				"Cross-Origin-Resource-Policy": "same-origin",
			} {
				if got := w.Header().Get(name); got != want {
					t.Errorf("%s %s: %s is %q", method, path, name, got)
				}
			}
			if got := w.Header().Get("Content-Length"); got == "" || method == "GET" && got != fmt.Sprint(w.Body.Len()) || method == "HEAD" && w.Body.Len() > 0 {
				t.Errorf("%s %s: %s of %d bytes", method, path, got, w.Body.Len())
			}
			got := w.Header().Get("Content-Security-Policy")
			wantAll(t, got, "default-src 'none'; ", "script-src 'sha256-", "style-src 'sha256-", "connect-src 'self'; ", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'")
			for _, not := range []string{"unsafe", "*", "http"} {
				if strings.Contains(got, not) {
					t.Errorf("it allows %s: %s", not, got)
				}
			}
		}
	}
}

// The policy has the hashes of each page's style and script.
func TestPage_policy(t *testing.T) {
	p, _ := newPage(aTunnel("ipip1"))
	for _, path := range []string{"/", "/tunnel/ipip1", "/tunnel/none"} {
		page := get(t, p, path).Body.Bytes()
		for _, element := range []string{"style", "script"} {
			if h := hash(page, element); !strings.Contains(policy, element+"-src '"+h+"'") {
				t.Errorf("%s: the %s has %s; the policy is %s", path, element, h, policy)
			}
			if n := bytes.Count(page, []byte("<"+element)); n != 1 {
				t.Errorf("%s: %d elements %s", path, n, element)
			}
		}
	}
}

// However many ask, the samples are read once a second at most, and the page of all tunnels is made once for them.
func TestPage_refresh(t *testing.T) {
	p, of := newPage(aTunnel("ipip1"))
	for i := range 100 {
		at := start.Add(time.Duration(i) * fresh / 50)
		p.makeIndex(at)
		p.makeTunnel(at, "ipip1")
	}
	if of.reads != 2 {
		t.Errorf("read %d times in two seconds", of.reads)
	}
	_, a := p.makeIndex(start.Add(time.Minute))
	_, b := p.makeIndex(start.Add(time.Minute))
	if &a[0] != &b[0] {
		t.Error("it is made twice")
	}
	of.set(aTunnel("ipip2"))
	_, a = p.makeIndex(start.Add(time.Minute + fresh))
	wantAll(t, texts(t, a), "ipip2")
}

// A tunnel's history is dropped with the tunnel; 1,000 histories take less than 8 MiB.
func TestPage_histories(t *testing.T) {
	p, of := newPage(aTunnel("ipip1"), aTunnel("ipip2"))
	p.read(start)
	of.set(aTunnel("ipip2"))
	p.read(start.Add(Interval))
	if len(p.histories) != 1 || p.histories["ipip2"] == nil {
		t.Errorf("%d histories", len(p.histories))
	}
	of.mu.Lock()
	of.samples = nil
	of.mu.Unlock()
	p.read(start.Add(2 * Interval))
	if len(p.histories) != 1 {
		t.Error("while nothing is known it goes")
	}
	var tunnels []tunnel.Sample
	for i := range 1000 {
		tunnels = append(tunnels, aTunnel(fmt.Sprint("ipip", i)))
	}
	of.set(tunnels...)
	before := allocated()
	for i := range 2 * readings {
		p.read(start.Add(time.Duration(3+i) * Interval))
	}
	// Without the samples of the last read only the histories count.
	p.mu.Lock()
	p.samples = nil
	p.mu.Unlock()
	if grown := allocated() - before; grown > 8<<20 || grown < 1<<20 {
		t.Errorf("1,000 histories have %d bytes", grown)
	}
	runtime.KeepAlive(p)
}

// Run reads once in Interval, less often while nothing is carried, and ends with its context.
func TestPage_Run(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, of := newPage(aTunnel("ipip1"))
		ctx, cancel := context.WithCancel(t.Context())
		begun := time.Now()
		go p.Run(ctx)
		at := func(after time.Duration, reads int) {
			t.Helper()
			time.Sleep(time.Until(begun.Add(after + time.Millisecond)))
			synctest.Wait()
			of.mu.Lock()
			defer of.mu.Unlock()
			if of.reads != reads {
				t.Errorf("after %v: read %d times, want %d", after, of.reads, reads)
			}
		}
		at(0, 1)
		at(Interval, 2) // the counters of the first read are news
		at(3*Interval, 3)
		at(7*Interval, 4)
		at(11*Interval, 5)
		of.mu.Lock()
		of.samples.Tunnels[0].Drops[drop.NoPath]++
		of.mu.Unlock()
		at(15*Interval, 6)
		at(16*Interval, 7)
		cancel()
		at(99*Interval, 7)
	})
}

// Requests for a page add readings to the history, but none sooner than Interval after the last, so that those it has
// room for span ten minutes.
func TestPage_refreshHistory(t *testing.T) {
	p, _ := newPage(aTunnel("ipip1"))
	for i := range 600 {
		p.makeIndex(start.Add(time.Duration(i) * time.Second))
		p.read(start.Add(time.Duration(i)*time.Second + time.Millisecond))
	}
	h := p.histories["ipip1"]
	if rate, ok := h.Rate(Span); !ok || rate != (history.Rate{}) {
		t.Errorf("%+v, %v", rate, ok)
	}
	s := aTunnel("ipip1")
	s.RxBytes += 599_000 // 1,000 in each second, if the first reading is still there
	h.Add(history.Sample{Time: start.Add(599 * time.Second), RxPackets: s.RxPackets, RxBytes: s.RxBytes, TxPackets: s.TxPackets, TxBytes: s.TxBytes})
	if rate, _ := h.Rate(Span); math.Abs(rate.RxBytes-1000) > 1 {
		t.Errorf("%v bytes a second: the first reading is forgotten", rate.RxBytes)
	}
}

// hostile are texts that an operator's comment or the name of an interface may have.
var hostile = []string{
	`<script>alert(1)</script>`, `"><img src=x onerror=alert(1)>`, `' onmouseover='alert(1)`, `</title><script>alert(1)</script>`, `</style><script>alert(1)</script>`,
	`</bdi></main><form action=//evil.example>`, `javascript:alert(1)`, `//evil.example/x`, `..%2f..%2fmetrics`, `{{.Root}}`, `&lt;script&gt;`, `<!--`, `]]>`, `${alert(1)}`,
	"\u202egnp.exe", "\u2066\u2069\u200f", "עברית", "\x00\x1b[31m\x07", "\xff\xfe<script>", strings.Repeat("<b>", 64<<10/3), strings.Repeat("x", 64<<10),
}

func TestPage_hostile(t *testing.T) {
	for _, text := range hostile {
		s := aTunnel(text)
		s.Comment, s.Interface, s.RemoteAddress, s.WaitingFor = text, text+"i", text, text
		s.Warnings[0].Detail, s.Warnings[0].Remedy, s.Warnings[0].Text = text, text, text
		p, of := newPage(s)
		p.read(start)
		now := carry(p, of, start, 2, 1, 1, 1)
		_, page := p.makeIndex(now)
		got := texts(t, page)
		if shown := strings.Join(strings.Fields(strings.ToValidUTF8(text, "\ufffd")), " "); !strings.Contains(text, "\x00") && !strings.Contains(got, shown) {
			t.Errorf("%.100q is not shown", text)
		}
		status, page := p.makeTunnel(now, text)
		if texts(t, page); status != 200 {
			t.Errorf("%.100q: %d", text, status)
		}
		status, page = p.makeTunnel(now, text+"?")
		if texts(t, page); status != 404 {
			t.Errorf("%.100q: %d", text, status)
		}
	}
}

// Whatever is asked for, and whatever a tunnel is named, the page is harmless; that of a valid name is found.
func FuzzPage(f *testing.F) {
	for _, text := range hostile {
		f.Add(text, text, "")
		f.Add("ipip1", "", "/tunnel/"+text)
		f.Add("ipip1", "", "/?"+text)
	}
	f.Fuzz(func(t *testing.T, name, comment, target string) {
		s := aTunnel(name)
		s.Comment, s.WaitingFor = comment, comment
		p, _ := newPage(s)
		link := "/tunnel/" + url.PathEscape(name)
		for _, of := range []string{target, "/", "/" + url.PathEscape(name), link} {
			u, err := url.ParseRequestURI(of)
			if err != nil || !strings.HasPrefix(of, "/") {
				continue
			}
			r := httptest.NewRequest(http.MethodGet, "/", nil)
			r.URL = u
			w := httptest.NewRecorder()
			p.ServeHTTP(w, r)
			if strings.HasPrefix(w.Header().Get("Content-Type"), "text/html") && w.Code != 301 && w.Code != 307 && w.Code != 308 {
				texts(t, w.Body.Bytes())
			}
			if of == link && tunnel.CheckName(name) == nil && w.Code != 200 {
				t.Errorf("%q: %d", link, w.Code)
			}
		}
	})
}

// For the race detector: requests while the samples are read, and tunnels come and go.
func TestPage_concurrent(t *testing.T) {
	p, of := newPage(aTunnel("ipip1"))
	var all sync.WaitGroup
	for i := range 4 {
		all.Go(func() {
			for j := range 50 {
				switch i {
				case 0:
					of.set(aTunnel("ipip1"), aTunnel(fmt.Sprint("ipip", rand.IntN(5))))
					p.read(start.Add(time.Duration(j) * Interval))
				default:
					get(t, p, []string{"/", "/tunnel/ipip1", "/ipip1"}[i-1])
				}
			}
		})
	}
	all.Wait()
}

func TestStateOf(t *testing.T) {
	for want, s := range map[string]tunnel.Sample{
		"disabled": {Disabled: true},
		"disabled: somebody has set its interface down": {Disabled: true, Started: true, Running: true},
		"down: it is not started":                       {},
		"running":                                       {Started: true, Running: true},
		"running: for route to 192.0.2.1":               {Started: true, Running: true, WaitingFor: "route to 192.0.2.1"},
		"waiting: for route to 192.0.2.1":               {Started: true, WaitingFor: "route to 192.0.2.1", KeepaliveState: "waiting"},
		"no-sa: IKE has no SA with the peer":            {Started: true, Encrypted: true},
		"lost: the peer is not heard any more":          {Started: true, Encrypted: true, Established: true, KeepaliveState: "lost"},
		"never-heard: the peer was never heard":         {Started: true, KeepaliveState: "never-heard"},
		"down: its interface has no carrier":            {Started: true, KeepaliveState: "up"},
	} {
		got := stateOf(&s)
		if text := strings.TrimSuffix(got.Word+": "+got.Why, ": "); text != want {
			t.Errorf("%s, want %s", text, want)
		}
	}
}
