package handover

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/test/netlab"
)

func TestMain(m *testing.M) {
	if os.Getenv("HANDOVER_CHILD") != "" {
		serve()
		return
	}
	os.Exit(m.Run())
}

// serve is the child process: it opens its Manager, executes the commands on its standard input, one a line, and
// answers each with a line.
func serve() {
	m, kept, err := Open()
	if err != nil {
		fmt.Println("error", err)
	} else {
		fmt.Println("opened", m != nil)
	}
	var files []int
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		args := strings.Fields(in.Text())
		var err error
		switch args[0] {
		case "store": // NAME TEXT...: a memfd for each text
			var fds []int
			for _, text := range args[2:] {
				fd, err := unix.MemfdCreate(text, unix.MFD_CLOEXEC)
				if err != nil {
					panic(err)
				}
				_, _ = unix.Write(fd, []byte(text))
				fds = append(fds, fd)
			}
			files = append(files, fds...)
			err = m.Store(args[1], fds...)
		case "again": // NAME: all files stored before
			err = m.Store(args[1], files...)
		case "socket", "polled": // NAME: a UDP socket with a pending ICMP error (POLLERR); polled: without FDPOLL=0
			fd, _ := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err = unix.Connect(fd, &unix.SockaddrInet4{Port: 9, Addr: [4]byte{127, 0, 0, 1}}); err == nil && args[0] == "socket" {
				err = m.Store(args[1], fd)
			} else if err == nil {
				err = m.sendLocked("FDSTORE=1\nFDNAME="+args[1], fd)
			}
			for has := []unix.PollFd{{Fd: int32(fd)}}; has[0].Revents&unix.POLLERR == 0; { // the kernel limits ICMP errors, of all namespaces together
				_, _ = unix.Write(fd, []byte("nobody is there"))
				_, _ = unix.Poll(has, 50)
			}
		case "raw": // MESSAGE DESCRIPTORS: \n and \0 stand for those characters, \L for 5,000 of x
			var n int
			fmt.Sscan(args[2], &n)
			err = m.sendLocked(strings.NewReplacer(`\n`, "\n", `\0`, "\x00", `\L`, strings.Repeat("x", 5000)).Replace(args[1]), slices.Repeat([]int{1}, n)...)
		case "remove":
			err = m.Remove(args[1])
		case "discard":
			err = m.Discard(kept)
		case "notify":
			err = m.Notify(args[1])
		case "sync":
			err = m.Sync(10 * time.Second)
		case "kept":
			var all []string
			for _, name := range kept.Names() {
				var texts []string
				for _, fd := range kept[name] {
					b := make([]byte, 100)
					n, err := unix.Pread(fd, b, 0)
					if flags, _ := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); flags != unix.FD_CLOEXEC {
						panic("children inherit it")
					}
					if err != nil {
						texts = append(texts, "?")
					} else {
						texts = append(texts, string(b[:n]))
					}
				}
				slices.Sort(texts)
				all = append(all, name+"="+strings.Join(texts, ","))
			}
			fmt.Println(strings.Join(all, " "))
			continue
		case "environment":
			_, listen := os.LookupEnv(countEnv)
			_, notify := os.LookupEnv(notifyEnv)
			fmt.Println(listen || notify)
			continue
		}
		if err != nil {
			fmt.Println("error", err)
		} else {
			fmt.Println("done")
		}
	}
}

// child is a process that runs serve.
type child struct {
	t   *testing.T
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

// newChild returns a child, whose process start starts.
func newChild(t *testing.T, start func(*exec.Cmd)) *child {
	t.Helper()
	c := &child{t: t, cmd: exec.Command(os.Args[0])}
	c.cmd.Env = append(os.Environ(), "HANDOVER_CHILD=1")
	c.cmd.Stderr = os.Stderr
	c.in, _ = c.cmd.StdinPipe()
	out, _ := c.cmd.StdoutPipe()
	c.out = bufio.NewReader(out)
	start(c.cmd)
	t.Cleanup(c.kill)
	return c
}

func (c *child) line() string {
	c.t.Helper()
	line, err := c.out.ReadString('\n')
	if err != nil {
		c.t.Fatal(err)
	}
	return strings.TrimSuffix(line, "\n")
}

// does sends the child a command, and fails unless the answer contains want, or is empty if want is.
func (c *child) does(what, want string) {
	c.t.Helper()
	fmt.Fprintln(c.in, what)
	if got := c.line(); got != want && (want == "" || !strings.Contains(got, want)) {
		c.t.Fatalf("%s: %q, want %q", what, got, want)
	}
}

func (c *child) kill() {
	if c.cmd.ProcessState == nil {
		_ = c.cmd.Process.Kill()
		_ = c.cmd.Wait()
	}
}

// life starts children one after the other; stored returns the names of the descriptors that their manager keeps.
type life struct {
	t       *testing.T
	begin   func(*exec.Cmd)
	end     func()
	stored  func() []string
	current *child
}

func (l *life) next() *child {
	l.t.Helper()
	if l.current != nil {
		l.current.kill()
		l.end()
	}
	l.current = newChild(l.t, l.begin)
	if got := l.current.line(); got != "opened true" {
		l.t.Fatal(got)
	}
	return l.current
}

// keeping is a Keeper with what it has received from all its children.
type keeping struct {
	*Keeper
	environment []string // variables that the child gets in addition

	mu       sync.Mutex
	events   []Event
	refusals []string
	done     chan struct{}
}

func newKeeping(t *testing.T, limit int) (*life, *keeping) {
	k := &keeping{Keeper: NewKeeper(limit)}
	t.Cleanup(func() { // runs after those that kill the children
		k.end()
		k.Close()
	})
	l := &life{t: t, begin: func(cmd *exec.Cmd) { k.begin(t, cmd) }, end: k.end}
	l.stored = func() (names []string) {
		l.current.does("notify STATUS=look", "done")
		look := func() bool {
			k.mu.Lock()
			defer k.mu.Unlock()
			n := len(k.events)
			return n > 0 && k.events[n-1].State == "STATUS=look"
		}
		netlab.Eventually(t, "the message is read", look)
		k.mu.Lock()
		defer k.mu.Unlock()
		k.events = k.events[:len(k.events)-1]
		for _, d := range k.kept {
			names = append(names, d.name)
		}
		slices.Sort(names)
		return names
	}
	return l, k
}

func (k *keeping) begin(t *testing.T, cmd *exec.Cmd) {
	fds, environment, err := k.Begin(-1)
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(dup), "")
		cmd.ExtraFiles = append(cmd.ExtraFiles, f)
		defer f.Close()
	}
	unix.Close(fds[0])
	cmd.Env = append(append(Environment(cmd.Env), environment...), k.environment...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	k.done = make(chan struct{})
	go func() {
		defer close(k.done)
		for {
			e, err := k.Receive()
			k.mu.Lock()
			var refused *RefusedError
			if errors.As(err, &refused) {
				k.refusals = append(k.refusals, err.Error())
			} else if err != nil {
				k.mu.Unlock()
				return
			}
			k.events = append(k.events, e)
			k.mu.Unlock()
		}
	}()
}

func (k *keeping) refused() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(k.refusals)
}

func (k *keeping) end() {
	k.Interrupt()
	<-k.done
	k.End()
}

// eachManager runs f with a stand-in for systemd and with a Keeper, both of which keep 300 descriptors at most.
func eachManager(t *testing.T, f func(t *testing.T, l *life)) {
	t.Run("systemd", func(t *testing.T) {
		m := netlab.NewServiceManager(t, 300)
		l := &life{t: t, begin: m.Start, end: func() {}}
		l.stored = func() []string {
			l.current.does("sync", "done")
			return m.Stored()
		}
		f(t, l)
		if w := m.Warnings(); len(w) > 0 {
			t.Errorf("systemd warns: %q", w)
		}
	})
	t.Run("keeper", func(t *testing.T) {
		l, k := newKeeping(t, 300)
		f(t, l)
		if refused := k.refused(); len(refused) > 0 {
			t.Errorf("refused: %q", refused)
		}
	})
}

// What was stored before a kill -9 is given back under its name at each start after it.
func TestManager_killed(t *testing.T) {
	eachManager(t, func(t *testing.T, l *life) {
		c := l.next()
		c.does("kept", "")
		c.does("environment", "false")
		c.does("store tun.4 q0 q1", "done")
		c.does("store state hello", "done")
		for range 2 {
			c = l.next() // killed without a Sync before
			c.does("kept", "state=hello tun.4=q0,q1")
		}
		c.does("remove tun.4", "done")
		c.does("store tun.5 q2", "done")
		l.next().does("kept", "state=hello tun.5=q2")
	})
}

// Store takes more descriptors than one message does (SCM_MAX_FD).
func TestManager_many(t *testing.T) {
	eachManager(t, func(t *testing.T, l *life) {
		var texts []string
		for i := range 299 {
			texts = append(texts, fmt.Sprintf("file-%03d", i))
		}
		l.next().does("store many "+strings.Join(texts, " "), "done")
		l.next().does("kept", "many="+strings.Join(texts, ","))
	})
}

// A socket with a pending error stays stored (FDPOLL=0), and a file that is stored twice is kept once.
func TestManager_socketError(t *testing.T) {
	eachManager(t, func(t *testing.T, l *life) {
		c := l.next()
		c.does("socket raw", "done")
		c.does("store state hello", "done")
		c.does("again state", "done")
		if got := l.stored(); !slices.Equal(got, []string{"raw", "state"}) {
			t.Errorf("stored: %q", got)
		}
		l.next().does("kept", "raw=? state=hello")
	})
}

// Without FDPOLL=0 systemd closes a socket with a pending error.
func TestManager_polled(t *testing.T) {
	m := netlab.NewServiceManager(t, 300)
	l := &life{t: t, begin: m.Start, end: func() {}}
	l.next().does("polled raw", "done")
	netlab.Eventually(t, "the socket is closed", func() bool { return len(m.Warnings()) == 1 && len(m.Stored()) == 0 })
}

// Discard empties Kept, and has the manager close what is stored.
func TestManager_discard(t *testing.T) {
	eachManager(t, func(t *testing.T, l *life) {
		c := l.next()
		c.does("store old a b", "done")
		c = l.next()
		c.does("discard", "done")
		c.does("kept", "")
		if got := l.stored(); len(got) > 0 {
			t.Errorf("stored: %q", got)
		}
	})
}

// Store fails beyond the manager's limit, with what to raise, and for a wrong name; what is stored stays.
func TestManager_limit(t *testing.T) {
	eachManager(t, func(t *testing.T, l *life) {
		want := "want FileDescriptorStoreMax=301 or more"
		if strings.HasSuffix(t.Name(), "keeper") {
			want = "ipipd keep keeps 300 descriptors, which are 1 too few: raise the limit of open files"
		}
		c := l.next()
		c.does("store many "+strings.Repeat("a ", 300), "done")
		c.does("store more b", want)
		if got := l.stored(); len(got) != 300 {
			t.Errorf("%d are stored", len(got))
		}
		c = l.next()
		c.does("store more b", want)
		c.does("remove many", "done")
		c.does("store more b", "done")
		for _, wrong := range []string{"a:b", "ä", strings.Repeat("n", 256)} {
			c.does("store "+wrong+" b", "the name")
		}
	})
}

// Store fails where the names would not fit into one variable (LISTEN_FDNAMES).
func TestManager_names(t *testing.T) {
	l, _ := newKeeping(t, 1000)
	c := l.next()
	name := strings.Repeat("n", 200)
	c.does("store "+name+" "+strings.Repeat("a ", 640), "done")
	c.does("store "+name+" "+strings.Repeat("a ", 20), "no more have room in LISTEN_FDNAMES")
	l.next().does("store b b", "done")
}

// Open returns no Manager by variables for another process, and fails on wrong ones; it unsets both.
func TestOpen_notOurs(t *testing.T) {
	for _, c := range []struct{ environment, want string }{
		{"LISTEN_FDS=1 LISTEN_FDNAMES=a LISTEN_PID=1", "opened false"},
		{"LISTEN_FDS=2 LISTEN_FDNAMES=a", `error LISTEN_FDS="2" with 1 names`},
		{"LISTEN_FDS=x LISTEN_FDNAMES=a", `error LISTEN_FDS="x" with`},
		{"LISTEN_FDS=-1 LISTEN_FDNAMES=a", `error LISTEN_FDS="-1" with`},
		{"LISTEN_FDS=99999999 LISTEN_FDNAMES=a", `error LISTEN_FDS="99999999" with`},
		{"LISTEN_FDS=2 LISTEN_FDNAMES=a:b", "error LISTEN_FDS=2, and descriptor 4 was not given to this process"},
		{"LISTEN_FDS=0 LISTEN_FDNAMES=", "opened false"},
		{"NOTIFY_SOCKET=vsock:2:1234", `error NOTIFY_SOCKET="vsock:2:1234": want a path, or @name`},
	} {
		child := newChild(t, func(cmd *exec.Cmd) {
			cmd.Env = append(cmd.Env, strings.Fields(c.environment)...)
			r, w, _ := os.Pipe()
			defer r.Close()
			defer w.Close()
			cmd.ExtraFiles = []*os.File{r}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
		})
		if got := child.line(); !strings.HasPrefix(got, c.want) {
			t.Errorf("%s: %q, want %q", c.environment, got, c.want)
		}
		child.does("environment", "false")
	}
}

// Notify fails with EAGAIN where the service manager reads nothing (SO_SNDTIMEO). A nil Manager does nothing.
func TestManager_Notify(t *testing.T) {
	name := t.TempDir() + "/notify"
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv(notifyEnv, name)
	m, _, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(m.fd)
	failed := false
	for range 1000 {
		failed = failed || errors.Is(m.Notify("STATUS=there"), syscall.EAGAIN)
		if failed {
			break
		}
	}
	if !failed {
		t.Error("1000 messages that nobody reads were sent")
	}
	c.Close()
	if m.Notify("READY=1") == nil {
		t.Error("a message to nobody was sent")
	}
	var none *Manager
	if err := errors.Join(none.Notify("x"), none.Store("x", 1), none.Remove("x"), none.Sync(0)); err != nil {
		t.Error(err)
	}
}

// A removal that could not be sent is sent before the next message, or by a timer if there is none.
func TestManager_Remove(t *testing.T) {
	name := t.TempDir() + "/notify"
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	t.Setenv(notifyEnv, name)
	m, _, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(m.fd)
	soon := unix.NsecToTimeval(int64(10 * time.Millisecond))
	if err := unix.SetsockoptTimeval(m.fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &soon); err != nil {
		t.Fatal(err)
	}
	read := func() string {
		t.Helper()
		b := make([]byte, 100)
		_ = c.SetReadDeadline(time.Now().Add(netlab.Timeout()))
		for {
			n, err := c.Read(b)
			if err != nil {
				t.Fatal(err)
			}
			if string(b[:n]) != "STATUS=there" {
				return string(b[:n])
			}
		}
	}
	fail := func() {
		t.Helper()
		for m.Notify("STATUS=there") == nil {
		}
		for _, name := range []string{"a", "b"} {
			if err := m.Remove(name); !errors.Is(err, syscall.EAGAIN) {
				t.Fatal(err)
			}
		}
	}
	const a, b = "FDSTOREREMOVE=1\nFDNAME=a", "FDSTOREREMOVE=1\nFDNAME=b"
	fail()
	if one, two := read(), read(); one != a || two != b {
		t.Errorf("%q and %q", one, two)
	}
	fail()
	stored := make(chan error)
	go func() {
		for {
			if err := m.Store("a", 1); !errors.Is(err, syscall.EAGAIN) {
				stored <- err
				return
			}
		}
	}()
	if one, two, three := read(), read(), read(); one != a || two != b || !strings.HasPrefix(three, "FDSTORE=1\n") {
		t.Errorf("%q, %q and %q", one, two, three)
	}
	if err := <-stored; err != nil {
		t.Error(err)
	}
	m.mu.Lock() // waits for the timer's send, which uses the descriptor closed next
	defer m.mu.Unlock()
	if len(m.removals) > 0 {
		t.Errorf("%q again", m.removals)
	}
}

// Wrong messages of a child are refused or ignored, and their descriptors closed; right ones are taken after them.
func TestKeeper_hostile(t *testing.T) {
	l, k := newKeeping(t, 4)
	c := l.next()
	before := openFiles(t)
	for _, message := range []string{
		`FDSTORE=1 3`,                       // no name
		`FDSTORE=1\nFDNAME= 3`,              // an empty name
		`FDSTORE=1\nFDNAME=a:b 3`,           // two names in LISTEN_FDNAMES
		`FDSTORE=1\nFDNAME=\L 3`,            // too long
		`FDSTORE=1\nFDNAME=a\0b 3`,          // a zero byte
		`FDSTORE=1\nFDNAME=ipipd-keeper 3`,  // the name of the Keeper's socket
		`FDSTOREREMOVE=1 3`,                 // no name
		`READY=1 253`,                       // descriptors with no FDSTORE=1
		`BARRIER=1 253`,                     // as before
		`FDSTORE=1\nFDNAME=many 253`,        // one file, again and again
		`FDSTORE=0\nFDNAME=zero 3`,          // not stored
		`nonsense 3`,                        //
		`FDSTORE=1\nFDNAME=a\nFDNAME=b:c 1`, // the first name counts
		`FDSTOREREMOVE=1\nFDNAME=none 3`,    // there is none
	} {
		c.does("raw "+message, "done")
	}
	if got := l.stored(); !slices.Equal(got, []string{"a", "many"}) {
		t.Errorf("kept: %q", got)
	}
	for range 5 {
		c.does("raw FDSTORE=1\\nFDNAME=many 1", "done")
	}
	l.stored() // all of it is read
	if got := openFiles(t); got != before+2 {
		t.Errorf("%d descriptors are open, want %d", got, before+2)
	}
	if refused := k.refused(); len(refused) != 7 {
		t.Errorf("refused: %q", refused)
	}
	l.next().does("kept", "a=? many=?")
	l.current.kill()
	k.end()
	k.Close()
	if got := openFiles(t); got > before {
		t.Errorf("%d descriptors are open at the end, want %d at most", got, before)
	}
}

// Keeping another file costs O(log n) comparisons, and a file that is kept is not kept twice.
func TestKeeper_keep(t *testing.T) {
	const files = 200
	k := NewKeeper(2 * files)
	defer k.Close()
	compared := 0
	k.compare = func(a, b int) int { compared++; return compareFiles(a, b) }
	open := func() int {
		fd, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		return fd
	}
	for range files {
		if kept, err := k.keep("a", open()); !kept || err != nil {
			t.Fatal(kept, err)
		}
	}
	for _, d := range slices.Clone(k.kept) {
		again, err := unix.FcntlInt(uintptr(d.fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		if kept, err := k.keep("a", again); kept || err != nil {
			t.Errorf("twice: %v, %v", kept, err)
			continue
		}
		unix.Close(again)
	}
	if want := 8 * files * bits.Len(files); k.Len() != files || compared > want {
		t.Errorf("%d are kept, by %d comparisons, want %d by %d at most", k.Len(), compared, files, want)
	}
	k.remove("a")
	if kept, err := k.keep("a", open()); !kept || err != nil || k.Len() != 1 {
		t.Errorf("after all are removed: %v, %v, %d kept", kept, err, k.Len())
	}
}

// The Keeper holds its limit although the child is told a higher one.
func TestKeeper_limit(t *testing.T) {
	l, k := newKeeping(t, 2)
	k.environment = []string{limitEnv + "=1000"}
	c := l.next()
	c.does("store a 1 2 3 4", "done")
	c.does("store b 5", "done")
	if got, refused := l.stored(), k.refused(); !slices.Equal(got, []string{"a", "a"}) || len(refused) != 2 {
		t.Errorf("kept: %q, refused %q", got, refused)
	}
}

// An Event's State has the lines of a message that can be passed on: none about descriptors, the PID or the watchdog.
func TestKeeper_Receive(t *testing.T) {
	l, k := newKeeping(t, 4)
	c := l.next()
	c.does(`raw READY=1\nSTATUS=2_tunnels\nFDSTORE=1\nFDNAME=a\nMAINPID=1 1`, "done")
	c.does("notify STOPPING=1", "done")
	c.does("notify STATUS=x", "done")
	c.does("notify WATCHDOG=1", "done")
	if got := l.stored(); !slices.Equal(got, []string{"a"}) {
		t.Errorf("kept: %q", got)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	want := []Event{{Ready: true, State: "READY=1\nSTATUS=2_tunnels"}, {Stopping: true}, {State: "STATUS=x"}, {Alive: true}}
	if !slices.Equal(k.events, want) {
		t.Errorf("%+v, want %+v", k.events, want)
	}
}

// Interrupt ends Receive, after what was sent before, even while a process holds the child's end of the pair.
func TestKeeper_Interrupt(t *testing.T) {
	k := &keeping{Keeper: NewKeeper(4)}
	defer k.Close()
	fds, _, err := k.Begin(-1)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0])
	if err := unix.Sendmsg(fds[0], []byte("FDSTORE=1\nFDNAME=a"), unix.UnixRights(1), nil, 0); err != nil {
		t.Fatal(err)
	}
	k.Interrupt()
	if _, err := k.Receive(); err != nil || k.Len() != 1 {
		t.Errorf("what was sent before: %v, %d kept", err, k.Len())
	}
	if _, err := k.Receive(); err != io.EOF {
		t.Errorf("%v, want EOF", err)
	}
	if err := unix.Sendmsg(fds[0], []byte("READY=1"), nil, nil, unix.MSG_NOSIGNAL); err != unix.EPIPE {
		t.Errorf("it can still send: %v", err)
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// Whatever a child sends, the Keeper leaks no descriptor, and the next child can parse what it is given.
func FuzzKeeper(f *testing.F) {
	for _, message := range []string{"FDSTORE=1\nFDNAME=a", "FDSTORE=1\nFDNAME=a:b", "FDSTOREREMOVE=1\nFDNAME=a", "BARRIER=1", "READY=1\nSTATUS=x\n", "FDNAME=\xff\nFDSTORE=1", "FDSTORE=1\nFDNAME=" + strings.Repeat("\xff", 300), "=\n\n=FDSTORE"} {
		f.Add([]byte(message), []byte("FDSTORE=1\nFDNAME=b"), uint8(2))
	}
	f.Fuzz(func(t *testing.T, a, b []byte, rights uint8) {
		before := openFiles(t)
		k := NewKeeper(5)
		defer func() {
			k.Close()
			if now := openFiles(t); now != before {
				t.Errorf("%d descriptors are open, want %d", now, before)
			}
		}()
		for _, message := range [][]byte{a, b} {
			fds, _, err := k.Begin(-1)
			if err != nil {
				t.Fatal(err)
			}
			err = unix.Sendmsg(fds[0], message, unix.UnixRights(slices.Repeat([]int{0}, int(rights%4))...), nil, 0)
			unix.Close(fds[0])
			for err == nil {
				_, err = k.Receive()
				var refused *RefusedError
				if errors.As(err, &refused) {
					if text := refused.Error(); strings.ContainsAny(text, "\n\x00\x1b") || len(text) > 300 {
						t.Errorf("no line of a log: %q", text)
					}
					err = nil
				}
			}
			k.End()
		}
		fds, environment, err := k.Begin(-1)
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(fds[0])
		values := map[string]string{}
		for _, v := range environment {
			name, value, _ := strings.Cut(v, "=")
			values[name] = value
		}
		names, err := inherited(func(name string) string { return values[name] })
		if err != nil || len(names) != len(fds) || len(fds) > 6 {
			t.Errorf("%d descriptors, %q: %v", len(fds), names, err)
		}
		for i, d := range k.kept {
			if names[i+1] != d.name || checkName(d.name) != nil {
				t.Errorf("%q is given as %q", d.name, names[i+1])
			}
		}
	})
}
