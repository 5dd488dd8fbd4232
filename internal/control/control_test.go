package control

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"ipipd/test/netlab"
)

// patience bounds waits that must succeed, shortWait those that must time out.
var patience = netlab.Timeout()

const shortWait = 100 * time.Millisecond

type status struct {
	Name string `json:"name"`
}

// serve serves a tunnel that ends on /down.
func serve(t *testing.T, dir, name string) *Server {
	t.Helper()
	s, err := Listen(t.Context(), dir, name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	go s.Serve(handler(status{name}, func() { go s.Close() }))
	return s
}

// handler has one tunnel, whose Status is status, or ErrStarting if that is nil, and whose Down calls down.
func handler(status any, down func()) Handler {
	return Handler{
		Status: func(string) (any, error) {
			if status == nil {
				return nil, ErrStarting
			}
			return status, nil
		},
		Down: func(string) { down() },
	}
}

// makeStale creates a stale socket, as a killed process leaves it.
func makeStale(t *testing.T, dir, name string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", path(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
}

func TestDown(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	serve(t, dir, "ipip1")
	var got status
	if err := Status(dir, "ipip1", patience, &got); err != nil || got.Name != "ipip1" {
		t.Fatalf("Status = %v, %v", got, err)
	}
	if err := Down(dir, "ipip1", patience, patience, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path(dir, "ipip1")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
	if err := Status(dir, "ipip1", patience, &got); err != ErrNotRunning {
		t.Errorf("Status afterwards: %v", err)
	}
	if err := Down(dir, "ipip1", patience, patience, nil); err != ErrNotRunning {
		t.Errorf("Down afterwards: %v", err)
	}
}

// The socket is created with mode 0600, not changed to it afterwards: the umask is 0.
func TestListen_mode(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0))
	dir := filepath.Join(t.TempDir(), "run")
	s, err := Listen(t.Context(), dir, "ipip1")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for file, want := range map[string]os.FileMode{dir: 0o700, path(dir, "ipip1"): 0o600} {
		info, err := os.Lstat(file)
		if err != nil {
			t.Fatal(err)
		}
		if got := info.Mode().Perm(); got != want {
			t.Errorf("%s has mode %o, want %o", file, got, want)
		}
	}
	if s.info.Mode().Perm() != 0o600 {
		t.Errorf("born with mode %o", s.info.Mode().Perm())
	}
}

func TestListen_nameTaken(t *testing.T) {
	dir := t.TempDir()
	serve(t, dir, "ipip1")
	_, err := Listen(t.Context(), dir, "ipip1")
	var taken *TakenError
	if !errors.As(err, &taken) || taken.Name != "ipip1" {
		t.Fatalf("a second Listen: %v", err)
	}
	var got status
	if err := Status(dir, "ipip1", patience, &got); err != nil {
		t.Errorf("the first one suffered: %v", err)
	}
}

func TestListen_replacesStale(t *testing.T) {
	dir := t.TempDir()
	makeStale(t, dir, "ipip1")
	var got status
	if err := Status(dir, "ipip1", patience, &got); err != ErrNotRunning {
		t.Errorf("Status of a stale one: %v", err)
	}
	if err := Down(dir, "ipip1", patience, patience, nil); err != ErrNotRunning {
		t.Errorf("Down of a stale one: %v", err)
	}
	serve(t, dir, "ipip1")
	if err := Status(dir, "ipip1", patience, &got); err != nil {
		t.Error(err)
	}
}

// Sweep removes stale sockets only.
func TestSweep(t *testing.T) {
	dir := t.TempDir()
	makeStale(t, dir, "old")
	serve(t, dir, "new")
	if err := os.WriteFile(filepath.Join(dir, "file.sock"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	names, err := List(dir)
	slices.Sort(names)
	if err != nil || !slices.Equal(names, []string{"new", "old"}) {
		t.Fatalf("List = %v, %v", names, err)
	}
	Sweep(dir, names)
	if names, _ := List(dir); !slices.Equal(names, []string{"new"}) {
		t.Errorf("left: %v", names)
	}
}

func TestList_noDir(t *testing.T) {
	if names, err := List(filepath.Join(t.TempDir(), "none")); err != nil || len(names) != 0 {
		t.Errorf("List = %v, %v", names, err)
	}
}

// A file that is not a socket is not removed.
func TestListen_fileInTheWay(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(path(dir, "ipip1"), []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(t.Context(), dir, "ipip1"); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("Listen: %v", err)
	}
	if text, _ := os.ReadFile(path(dir, "ipip1")); string(text) != "precious" {
		t.Error("the file was touched")
	}
}

// Status is ErrStarting until the tunnel is ready, so that scripts can wait for it.
func TestStatus_starting(t *testing.T) {
	dir := t.TempDir()
	s, err := Listen(t.Context(), dir, "ipip1")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var ready atomic.Bool
	go s.Serve(Handler{Status: func(string) (any, error) {
		if !ready.Load() {
			return nil, ErrStarting
		}
		return status{"ipip1"}, nil
	}})
	var got status
	if err := Status(dir, "ipip1", patience, &got); err != ErrStarting {
		t.Errorf("before: %v", err)
	}
	ready.Store(true)
	if err := Status(dir, "ipip1", patience, &got); err != nil {
		t.Errorf("after: %v", err)
	}
}

// The kernel accepts connections for a stopped process: only a timeout tells.
func TestStatus_hungProcess(t *testing.T) {
	dir := t.TempDir()
	s, err := Listen(t.Context(), dir, "ipip1") // and never Serve
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var got status
	var timeout *TimeoutError
	if err := Status(dir, "ipip1", shortWait, &got); !errors.As(err, &timeout) || timeout.Name != "ipip1" {
		t.Errorf("Status: %v", err)
	}
	if err := Down(dir, "ipip1", shortWait, shortWait, nil); !errors.As(err, &timeout) {
		t.Errorf("Down: %v", err)
	}
}

func TestDown_tunnelThatStays(t *testing.T) {
	dir := t.TempDir()
	s, err := Listen(t.Context(), dir, "ipip1")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	go s.Serve(handler(nil, func() {}))
	waited := time.Duration(0)
	err = Down(dir, "ipip1", patience, shortWait, func(so time.Duration) {
		if so < waited {
			t.Errorf("it has waited for %v, and then for %v", waited, so)
		}
		waited = so
	})
	if err == nil || !strings.Contains(err.Error(), "still holds "+path(dir, "ipip1")) || waited == 0 {
		t.Errorf("Down, which has said that it waits for %v: %v", waited, err)
	}
}

// Down does not wait for another tunnel that takes the name meanwhile.
func TestDown_nameReused(t *testing.T) {
	dir := t.TempDir()
	s, err := Listen(t.Context(), dir, "ipip1")
	if err != nil {
		t.Fatal(err)
	}
	next := make(chan *Server, 1)
	go s.Serve(handler(nil, func() {
		go func() {
			s.Close()
			n, err := Listen(t.Context(), dir, "ipip1")
			if err != nil {
				t.Error(err)
			}
			next <- n
		}()
	}))
	if err := Down(dir, "ipip1", patience, patience, nil); err != nil {
		t.Error(err)
	}
	if n := <-next; n != nil {
		n.Close()
	}
}

// Close does not remove the socket of another process.
func TestServerClose_replacedSocket(t *testing.T) {
	dir := t.TempDir()
	first, err := Listen(t.Context(), dir, "ipip1")
	if err != nil {
		t.Fatal(err)
	}
	os.Remove(path(dir, "ipip1")) // by hand
	serve(t, dir, "ipip1")
	if err := first.Close(); err != nil {
		t.Error(err)
	}
	var got status
	if err := Status(dir, "ipip1", patience, &got); err != nil {
		t.Errorf("the second one lost its socket: %v", err)
	}
}

// Of many concurrent processes only one gets the name.
func TestListen_concurrent(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	for range 20 {
		makeStale(t, dir, "ipip1")
		var wg sync.WaitGroup
		var mu sync.Mutex
		var got []*Server
		for range 8 {
			wg.Go(func() {
				s, err := Listen(t.Context(), dir, "ipip1")
				var taken *TakenError
				if err != nil && !errors.As(err, &taken) {
					t.Error(err)
				}
				if s != nil {
					mu.Lock()
					got = append(got, s)
					mu.Unlock()
				}
				Sweep(dir, []string{"ipip1"})
			})
		}
		wg.Wait()
		if len(got) != 1 {
			t.Fatalf("%d have the name", len(got))
		}
		got[0].Close()
	}
}

// Status of a tunnel that ends during the request succeeds, or returns ErrNotRunning.
func TestStatus_endingTunnel(t *testing.T) {
	dir := t.TempDir()
	for range 50 {
		s := serve(t, dir, "ipip1")
		done := make(chan error, 1)
		go func() {
			var got status
			done <- Status(dir, "ipip1", patience, &got)
		}()
		s.Close()
		if err := <-done; err != nil && err != ErrNotRunning {
			t.Fatalf("%v", err)
		}
	}
}

// The size of headers and bodies is limited, and only the documented requests succeed.
func TestServer_badRequests(t *testing.T) {
	dir := t.TempDir()
	serve(t, dir, "ipip1")
	for what, request := range map[string]string{
		"header": "GET /status HTTP/1.1\r\nHost: t\r\nX: " + strings.Repeat("x", 64<<10) + "\r\n\r\n",
		"body":   "POST /status HTTP/1.1\r\nHost: t\r\nContent-Length: 100000000\r\n\r\n",
		"method": "GET /down HTTP/1.1\r\nHost: t\r\n\r\n",
		"path":   "GET /../../etc/passwd HTTP/1.1\r\nHost: t\r\n\r\n",
	} {
		t.Run(what, func(t *testing.T) {
			c, err := net.Dial("unix", path(dir, "ipip1"))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(patience))
			fmt.Fprint(c, request)
			r, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err == nil && r.StatusCode < 300 {
				t.Errorf("answered %s", r.Status)
			}
		})
	}
	var got status
	if err := Status(dir, "ipip1", patience, &got); err != nil {
		t.Error(err)
	}
}

// The longest directory path leaves space for the longest name.
func TestMaxDir(t *testing.T) {
	base := t.TempDir()
	if len(base)+2 > MaxDir {
		t.Skip("the path of the temporary directory is too long")
	}
	dir := base + "/" + strings.Repeat("d", MaxDir-len(base)-1)
	s, err := Listen(t.Context(), dir, "fifteen-bytes-x")
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
}

// The socket that a process leaves after kill -9 is replaced.
func TestListen_killedProcess(t *testing.T) {
	dir := os.Getenv("CONTROL_TEST_DIR")
	if dir != "" { // the process to be killed
		s, err := Listen(t.Context(), dir, "ipip1")
		if err != nil {
			t.Fatal(err)
		}
		fmt.Println("listening")
		// Serve, since the garbage collector closes an unused listener.
		t.Fatal(s.Serve(handler(nil, func() {})))
	}
	dir = t.TempDir()
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), "CONTROL_TEST_DIR="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "listening\n" {
		t.Fatalf("%q, %v", line, err)
	}
	if _, err := Listen(t.Context(), dir, "ipip1"); err == nil {
		t.Fatal("the name was free before")
	}
	cmd.Process.Kill()
	cmd.Wait()
	if _, err := os.Lstat(path(dir, "ipip1")); err != nil {
		t.Fatalf("no stale socket: %v", err)
	}
	s, err := Listen(t.Context(), dir, "ipip1")
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
}

// Owns is true of what ends in .sock in the folder, by whatever path.
func TestOwns(t *testing.T) {
	dir := t.TempDir()
	other := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(dir, other); err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]bool{
		filepath.Join(dir, "metrics.sock"): true, filepath.Join(other, "metrics.sock"): true,
		filepath.Join(dir, "metrics"): false, filepath.Join(filepath.Dir(other), "metrics.sock"): false,
		filepath.Join(dir, "none", "metrics.sock"): false,
	} {
		if got := Owns(dir, file); got != want {
			t.Errorf("%s: %v", file, got)
		}
	}
	if Owns(filepath.Join(dir, "none"), filepath.Join(dir, "metrics.sock")) {
		t.Error("a folder that is not there owns it")
	}
}
