package confine

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// keptMask is keptCaps as a bit mask, by the kernel's numbers.
const keptMask = 1<<unix.CAP_NET_ADMIN | 1<<unix.CAP_NET_RAW | 1<<unix.CAP_NET_BIND_SERVICE | 1<<unix.CAP_BPF

// status returns a hexadecimal field of /proc/PID/task/TID/status.
func status(t *testing.T, pid, tid, name string) uint64 {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("/proc", pid, "task", tid, "status"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, name+":\t"); ok {
			n, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("/proc/%s/task/%s/status has no %s", pid, tid, name)
	return 0
}

// checkConfined starts a process that confines itself, and checks each of its threads from
// outside. prefix is a command to start it with, to remove capabilities.
func checkConfined(t *testing.T, credential *syscall.Credential, bounding, effective uint64, prefix ...string) {
	t.Helper()
	// A copy that another user can execute.
	dir, err := os.MkdirTemp("", "confine")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	text, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(dir, "confine.test")
	if err := os.WriteFile(binary, text, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	args := append(slices.Clone(prefix), binary, "-test.run=^TestProcess$")
	c := exec.Command(args[0], args[1:]...)
	c.Dir, c.Stderr = "/", os.Stderr
	c.Env = append(os.Environ(), "CONFINE_TEST=1")
	c.SysProcAttr = &syscall.SysProcAttr{Credential: credential}
	in, _ := c.StdinPipe()
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { in.Close(); c.Wait() }()
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "confined\n" {
		t.Fatalf("%q, %v", line, err)
	}
	pid := strconv.Itoa(c.Process.Pid)
	threads, err := os.ReadDir(filepath.Join("/proc", pid, "task"))
	if err != nil || len(threads) < 4 {
		t.Fatalf("%d threads, %v", len(threads), err)
	}
	for _, thread := range threads {
		tid := thread.Name()
		for name, want := range map[string]uint64{
			"NoNewPrivs": 1, "CapBnd": bounding, "CapEff": effective, "CapPrm": effective, "CapInh": 0, "CapAmb": 0,
		} {
			if got := status(t, pid, tid, name); got != want {
				t.Errorf("thread %s: %s is %x, want %x", tid, name, got, want)
			}
		}
	}
}

func TestProcess(t *testing.T) {
	if os.Getenv("CONFINE_TEST") != "" {
		runConfined()
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root: to have capabilities to drop")
	}
	all := status(t, "self", strconv.Itoa(os.Getpid()), "CapBnd")
	t.Run("root", func(t *testing.T) { checkConfined(t, nil, all&keptMask, all&keptMask) })
	t.Run("unprivileged", func(t *testing.T) {
		checkConfined(t, &syscall.Credential{Uid: 65534, Gid: 65534}, all, 0)
	})
	if _, err := exec.LookPath("setpriv"); err != nil {
		t.Skip("needs setpriv (util-linux)")
	}
	t.Run("container", func(t *testing.T) { // with NET_RAW, and without NET_ADMIN and BPF
		checkConfined(t, nil, 1<<unix.CAP_NET_RAW, 1<<unix.CAP_NET_RAW, "setpriv", "--bounding-set=-all,+net_raw,+setpcap,+chown")
	})
	t.Run("container-without-setpcap", func(t *testing.T) {
		checkConfined(t, nil, 1<<unix.CAP_NET_RAW|1<<unix.CAP_CHOWN, 1<<unix.CAP_NET_RAW, "setpriv", "--bounding-set=-all,+net_raw,+chown")
	})
}

// runConfined is the process that checkConfined starts. It does not return.
func runConfined() {
	for range 4 { // as in the data path
		go func() {
			runtime.LockOSThread()
			for {
				rawPoll()
			}
		}()
	}
	runtime.GOMAXPROCS(runtime.NumCPU() + 4)
	if err := Process(); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	go func() { // a thread that starts afterwards
		runtime.LockOSThread()
		select {}
	}()
	runtime.Gosched()
	fmt.Println("confined")
	os.Stdin.Read(make([]byte, 1))
	os.Exit(0)
}

// rawPoll blocks in a system call that the Go scheduler does not know of.
//
//go:noinline
func rawPoll() {
	timeout := unix.NsecToTimespec(int64(100 * time.Millisecond))
	_, _, _ = unix.RawSyscall6(unix.SYS_PPOLL, 0, 0, uintptr(unsafe.Pointer(&timeout)), 0, 0, 0)
}
