package metrics

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"ipipd/test/netlab"
)

// start serves at an address until the test ends, and returns ShownAddress.
func start(t *testing.T, address string, o Options) string {
	t.Helper()
	l, err := Listen(address)
	if err != nil {
		t.Fatal(err)
	}
	if o.Snapshot == nil {
		o.Snapshot = func() *Snapshot { return aSnapshot(aTunnel("ipip1")) }
	}
	if o.Ready == nil {
		o.Ready = func() error { return nil }
	}
	o.Page = aPage
	server := NewServer(o)
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Close()
		if err := <-ended; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
	return ShownAddress(l)
}

func TestNewServer(t *testing.T) {
	var ready atomic.Bool
	h := serve(Options{Snapshot: func() *Snapshot { return nil }, Ready: func() error {
		if ready.Load() {
			return nil
		}
		return errors.New("the tunnels are being started")
	}})
	check := func(method, path string, status int, text string) {
		t.Helper()
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(method, path, nil))
		if w.Code != status || !strings.Contains(w.Body.String(), text) {
			t.Errorf("%s %s: %d %q, want %d %q", method, path, w.Code, w.Body, status, text)
		}
	}
	check("GET", "/healthz", 200, "ok")
	check("GET", "/readyz", 503, "the tunnels are being started")
	check("GET", "/metrics", 200, "ipipd_build_info")
	ready.Store(true)
	check("GET", "/readyz", 200, "ready")
	check("GET", "/", 200, "the page at /")
	check("GET", "/ipip1", 200, "the page at /ipip1")
	check("GET", "/debug/pprof/", 200, "the page at /debug/pprof/")
	for _, path := range []string{"/", "/metrics", "/healthz", "/readyz", "/ipip1"} {
		check("POST", path, 405, "")
		check("DELETE", path, 405, "")
	}
}

// A web page whose name resolves to a loopback address cannot read what is served there (DNS rebinding).
func TestNewServer_host(t *testing.T) {
	for _, listens := range []string{"127.0.0.1:0", "0.0.0.0:0"} { // a browser at this host reaches both by loopback
		t.Run(listens, func(t *testing.T) { testHost(t, listens) })
	}
	h := serve(Options{Snapshot: func() *Snapshot { return nil }})
	r := httptest.NewRequest(http.MethodGet, "/metrics", nil)
	r = r.WithContext(context.WithValue(r.Context(), http.LocalAddrContextKey, &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1)}))
	r.Host = "router.example:9469"
	w := httptest.NewRecorder()
	if h.ServeHTTP(w, r); w.Code != 200 {
		t.Errorf("at another address a name is refused: %d", w.Code)
	}
}

func testHost(t *testing.T, listens string) {
	shown := start(t, listens, Options{Host: "router7"})
	_, port, _ := net.SplitHostPort(shown)
	address := "127.0.0.1:" + port
	for host, status := range map[string]int{
		"router7": 200, "Router7:9469": 200, "router7.page.example": 403, "router77": 403,
		address: 200, "localhost": 200, "LocalHost:9469": 200, "127.0.0.1": 200, "[::1]:9469": 200, "[::1]": 200, "10.0.0.1:80": 200,
		"page.example": 403, "page.example:9469": 403, "localhost.page.example": 403, "127.0.0.1.page.example": 403,
	} {
		r, err := http.NewRequest(http.MethodGet, "http://"+address+"/healthz", nil) // not limited as scrapes are
		if err != nil {
			t.Fatal(err)
		}
		r.Host = host
		response, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		if response.StatusCode != status {
			t.Errorf("Host %s: %d, want %d", host, response.StatusCode, status)
		}
	}
}

// Many scrapes at once are all answered, maxScrapes at a time, so that their memory is bounded; other paths wait for none.
func TestNewServer_maxScrapes(t *testing.T) {
	hold, entered := make(chan struct{}), make(chan struct{}, 100)
	var now, most atomic.Int32
	address := start(t, "127.0.0.1:0", Options{Snapshot: func() *Snapshot {
		if n := now.Add(1); n > most.Load() {
			most.Store(n)
		}
		entered <- struct{}{}
		<-hold
		now.Add(-1)
		return nil
	}})
	const n = 50 // more than maxConnections
	statuses := make(chan int, n)
	var scrapes sync.WaitGroup
	scrape := func() { statuses <- status(t, "http://"+address+"/metrics") }
	for range maxScrapes {
		scrapes.Go(scrape)
	}
	for range maxScrapes {
		<-entered
	}
	if got := status(t, "http://"+address+"/healthz"); got != 200 {
		t.Errorf("healthz beside them: %d", got)
	}
	for range n - maxScrapes {
		scrapes.Go(scrape)
	}
	close(hold)
	scrapes.Wait()
	for range n {
		if got := <-statuses; got != 200 {
			t.Errorf("one of them: %d", got)
		}
	}
	if got := most.Load(); got > maxScrapes {
		t.Errorf("%d at once", got)
	}
}

// Clients that do not read their answers keep no other client from its answer.
func TestNewServer_slow(t *testing.T) {
	long := aTunnel(strings.Repeat("x", 200_000)) // a label of each series: the answer is more than socket buffers hold
	address := start(t, "127.0.0.1:0", Options{Snapshot: func() *Snapshot { return aSnapshot(long) }})
	for range 2 * maxScrapes {
		c, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err = fmt.Fprint(c, "GET /metrics HTTP/1.0\r\n\r\n"); err == nil {
			_, err = io.ReadFull(c, make([]byte, 1))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if got := status(t, "http://"+address+"/metrics"); got != 200 {
		t.Errorf("beside them: %d", got)
	}
}

func status(t *testing.T, url string) int {
	response, err := http.Get(url)
	if err != nil {
		t.Error(err)
		return 0
	}
	defer response.Body.Close()
	io.Copy(io.Discard, response.Body)
	return response.StatusCode
}

// The size of a request's headers is limited.
func TestNewServer_headers(t *testing.T) {
	address := start(t, "127.0.0.1:0", Options{})
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	go fmt.Fprintf(c, "GET /metrics HTTP/1.1\r\nHost: localhost\r\nX: %s\r\n\r\n", strings.Repeat("x", 64<<10))
	if line, err := bufio.NewReader(c).ReadString('\n'); err == nil && !strings.Contains(line, " 431 ") {
		t.Errorf("64 KiB of headers: %q", line)
	}
}

func TestListen_taken(t *testing.T) {
	address := start(t, "127.0.0.1:0", Options{})
	if l, err := Listen(address); err == nil || !errors.Is(err, syscall.EADDRINUSE) || !strings.Contains(err.Error(), "another process has the port") {
		t.Errorf("%v, %v", l, err)
	}
	if l, err := Listen("192.0.2.77:9469"); err == nil || !strings.Contains(err.Error(), "no interface of this host has the address") {
		t.Errorf("%v, %v", l, err)
	}
}

// Listen at 0.0.0.0 is for IPv4 only.
func TestListen_ipv4(t *testing.T) {
	l, err := Listen("0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if a := l.Addr().(*net.TCPAddr); a.IP.To4() == nil {
		t.Errorf("it listens at %v", a)
	}
}

// A unix socket has mode 0660, replaces a stale socket and nothing else, and is removed at the end.
func TestListen_unix(t *testing.T) {
	path := filepath.Join(t.TempDir(), "metrics.sock")
	left, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	left.SetUnlinkOnClose(false)
	left.Close()
	defer syscall.Umask(syscall.Umask(0o077))
	t.Run("served", func(t *testing.T) {
		if got := start(t, "unix:"+path, Options{}); got != "unix:"+path {
			t.Errorf("it is shown as %s", got)
		}
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o660 {
			t.Errorf("%v, %v", info.Mode(), err)
		}
		if _, err := Listen("unix:" + path); err == nil || !strings.Contains(err.Error(), "another process listens there") {
			t.Errorf("a second one: %v", err)
		}
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		fmt.Fprint(c, "GET /metrics HTTP/1.0\r\nHost: router.example\r\n\r\n")
		if text, err := io.ReadAll(c); err != nil || !strings.Contains(string(text), `ipipd_tunnel_running{tunnel="ipip1"} 1`) {
			t.Errorf("%v %s", err, text)
		}
	})
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen("unix:" + path); err == nil || !strings.Contains(err.Error(), "is no socket: file already exists") {
		t.Errorf("in place of a file: %v", err)
	}
	if text, err := os.ReadFile(path); err != nil || string(text) != "precious" {
		t.Errorf("%q, %v", text, err)
	}
	if _, err := Listen("unix:" + filepath.Join(path, "x")); err == nil {
		t.Error("below a file it listens")
	}
}

// Close does not remove a socket that has replaced the listener's own.
func TestUnixListener_replaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "metrics.sock")
	l, err := Listen("unix:" + path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path, path+".old"); err != nil {
		t.Fatal(err)
	}
	other, err := Listen("unix:" + path)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	l.Close()
	if _, err := os.Lstat(path); err != nil {
		t.Error(err)
	}
}

// Clients beyond maxConnections wait, and are served when another goes.
func TestListen_maxConnections(t *testing.T) {
	address := start(t, "127.0.0.1:0", Options{})
	var idle []net.Conn
	for range maxConnections {
		c, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		idle = append(idle, c)
	}
	answered := make(chan int, 1)
	go func() { answered <- status(t, "http://"+address+"/healthz") }()
	idle[0].Close()
	select {
	case got := <-answered:
		if got != 200 {
			t.Errorf("%d", got)
		}
	case <-time.After(netlab.Timeout()):
		t.Error("the one that waits is not served")
	}
}
