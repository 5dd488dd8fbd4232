package netlab

import (
	"bufio"
	"bytes"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A Guest is a peer with another Linux kernel: user-mode Linux, an ordinary process, with the
// host's file system read-only as its root, and one NIC on an interface of a test's
// namespace.
//
//	test process ──serial line── guest kernel ── vec0 ══ ifname of ns
//
// It needs Debian's package user-mode-linux. Modules for tunnels, IPsec and netem come with
// it, so the host's kernel need not have them.
type Guest struct {
	// Kernel is the release of the guest's kernel, such as 6.1.176.
	Kernel string

	t         testing.TB
	cmd       *exec.Cmd
	line      *os.File // our end of the serial line
	share     string   // the directory that the guest may write to
	console   *Buffer
	ended     chan struct{} // closed when the guest's process has exited
	notLoaded string        // insmod's errors, one line a module

	mu      sync.Mutex
	next    int
	waiting map[int]chan int // exit status of command id
}

// GuestOptions are the options of StartGuest. The zero value is a guest without an address,
// on a raw socket, with no module loaded.
type GuestOptions struct {
	// Address of vec0 in CIDR notation; "" gives it none.
	Address string
	// MTU of vec0 in bytes; 0 leaves the kernel's 1500.
	MTU int
	// Transport is how the NIC is attached: "raw", the default, to one end of a
	// veth; "tap" to a TAP interface that StartGuest's caller made.
	Transport string
	// Modules are loaded in this order: paths below kernel/ without ".ko". A module that
	// does not load is no error, as it may be built in or optional; the error of a later
	// Run names it.
	Modules []string
}

// ModulesIPIP are the modules of an ipip tunnel, for GuestOptions.
var ModulesIPIP = []string{"net/ipv4/tunnel4", "net/ipv4/ip_tunnel", "net/ipv4/ipip"}

const (
	guestBinary  = "linux.uml"
	guestModules = "/usr/lib/uml/modules"
	guestMemory  = 256 << 20
)

// bootTimeout bounds how long a boot may take; it takes about two seconds.
func bootTimeout() time.Duration { return 3 * Timeout() }

// commandTimeout bounds a command of Run.
func commandTimeout() time.Duration { return 4 * Timeout() }

//go:embed guest_init.sh
var guestInit []byte

// StartGuest boots a guest whose NIC is on interface ifname of ns, and stops it with the
// test. It skips the test if user-mode Linux is not installed or does not boot.
//
// With the transport "raw" ifname should be one end of a veth without an address, or both
// kernels would answer.
func StartGuest(t testing.TB, ns *NS, ifname string, options GuestOptions) *Guest {
	t.Helper()
	if testing.Short() {
		t.Skip("a guest takes long, and what runs in it is not ours: see the run without -short")
	}
	binary, err := exec.LookPath(guestBinary)
	if err != nil {
		t.Skipf("needs %s (package user-mode-linux)", guestBinary)
	}
	if _, err := exec.LookPath("insmod"); err != nil {
		t.Skip("needs insmod (package kmod)")
	}
	if options.Transport == "" {
		options.Transport = "raw"
	}
	dir, share := t.TempDir(), t.TempDir()
	init := filepath.Join(dir, "init")
	if err := os.WriteFile(init, guestInit, 0o755); err != nil {
		t.Fatal(err)
	}
	line, guestLine, err := serialLine()
	if err != nil {
		t.Fatalf("make a serial line: %v", err)
	}
	defer guestLine.Close()

	g := &Guest{t: t, line: line, share: share, console: new(Buffer), ended: make(chan struct{}), waiting: make(map[int]chan int)}
	g.cmd = exec.Command(binary,
		fmt.Sprintf("mem=%dM", guestMemory>>20), "rootfstype=hostfs", "rootflags=/", "ro", "init="+init, "panic=-1",
		"umid=guest", "uml_dir="+dir+"/", "GUEST_SHARE="+share, "GLIBC_TUNABLES="+noAVX,
		"con=null", "con0=null,fd:1", "ssl=null", "ssl0=fd:3,fd:3",
		fmt.Sprintf("vec0:transport=%s,ifname=%s,depth=128", options.Transport, ifname))
	g.cmd.ExtraFiles = []*os.File{guestLine} // descriptor 3
	g.cmd.Stdout, g.cmd.Stderr = g.console, g.console
	g.cmd.WaitDelay = Timeout()
	// A process group, because the guest's processes are processes of the host.
	g.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	g.cmd.Env = append(os.Environ(), memoryDir(dir)...)
	if err := startWithoutXstate(ns, g.cmd); err != nil {
		t.Fatalf("start %s: %v", guestBinary, err)
	}
	t.Cleanup(g.stop)
	go func() {
		_ = g.cmd.Wait()
		close(g.ended)
	}()
	g.boot(options)
	return g
}

// boot waits for the guest to be ready, and configures it.
func (g *Guest) boot(options GuestOptions) {
	g.t.Helper()
	ready := make(chan string, 1)
	go g.readSerial(ready)
	select {
	case g.Kernel = <-ready:
	case <-g.ended:
		g.t.Skipf("user-mode Linux does not boot here; the end of its console:\n%s", tail(g.console.String()))
	case <-time.After(bootTimeout()):
		g.t.Skipf("user-mode Linux did not boot within %v; the end of its console:\n%s", bootTimeout(), tail(g.console.String()))
	}
	g.notLoaded = strings.TrimSpace(g.MustRun(fmt.Sprintf(`cd %s/%s/kernel
		for module in %s; do why=$(insmod $module.ko 2>&1) || echo "$module: $why"; done`, guestModules, g.Kernel, strings.Join(options.Modules, " "))))
	g.MustRun("ip link set lo up; cd /proc/sys/net/ipv6/conf && echo 1 >all/disable_ipv6 && echo 1 >default/disable_ipv6 || true")
	if options.MTU != 0 {
		g.MustRun(fmt.Sprintf("ip link set vec0 mtu %d", options.MTU))
	}
	if options.Address != "" {
		g.MustRun("ip address add " + options.Address + " dev vec0")
	}
	g.MustRun("ip link set vec0 up")
}

// stop kills the guest's process group.
func (g *Guest) stop() {
	_ = syscall.Kill(-g.cmd.Process.Pid, syscall.SIGKILL)
	<-g.ended
	g.line.Close()
	if g.t.Failed() {
		g.t.Logf("the guest's console:\n%s", tail(g.console.String()))
	}
}

// Run runs a shell script in the guest and returns its standard output. The error has the
// exit status and the standard error. A script that exceeds commandTimeout is killed (status
// 124). Run may be called concurrently. Background processes must redirect their output:
// cmd >/dev/null 2>&1 &
func (g *Guest) Run(script string) (stdout string, err error) {
	done := make(chan int, 1)
	g.mu.Lock()
	g.next++
	id := g.next
	g.waiting[id] = done
	g.mu.Unlock()

	file := filepath.Join(g.share, strconv.Itoa(id))
	if err := os.WriteFile(file+".sh", []byte(script+"\n"), 0o644); err != nil {
		return "", fmt.Errorf("guest: %w", err)
	}
	if _, err := fmt.Fprintf(g.line, "%d %.0f\n", id, commandTimeout().Seconds()); err != nil {
		return "", fmt.Errorf("guest: %w", err)
	}
	// User-mode Linux, whose epoll is edge-triggered, loses the edge of a line now and then, and
	// reads it only with the next one.
	again := time.NewTicker(5 * time.Second)
	defer again.Stop()
	timeout := time.After(commandTimeout() + Timeout())
	for {
		select {
		case <-again.C:
			_, _ = g.line.WriteString("\n")
		case status := <-done:
			return g.result(file, script, status)
		case <-g.ended:
			return "", fmt.Errorf("guest: %s: the guest has ended; the end of its console:\n%s", script, tail(g.console.String()))
		case <-timeout:
			return "", fmt.Errorf("guest: %s: no answer; the end of its console:\n%s", script, tail(g.console.String()))
		}
	}
}

// result returns what the script has written to its files in the share, and its error.
func (g *Guest) result(file, script string, status int) (stdout string, err error) {
	out, outErr := os.ReadFile(file + ".out")
	stderr, errErr := os.ReadFile(file + ".err")
	if status != 0 {
		err = fmt.Errorf("exit status %d: %s", status, bytes.TrimSpace(stderr))
	}
	if err = errors.Join(err, outErr, errErr); err != nil {
		err = fmt.Errorf("guest: %s: %w%s", script, err, g.moduleErrors())
	}
	return string(out), err
}

// moduleErrors returns the note in errors about modules that did not load.
func (g *Guest) moduleErrors() string {
	if g.notLoaded == "" {
		return ""
	}
	return "\nthe guest's kernel is without these modules:\n" + g.notLoaded
}

// MustRun is Run for a script that must succeed.
func (g *Guest) MustRun(script string) (stdout string) {
	g.t.Helper()
	stdout, err := g.Run(script)
	if err != nil {
		g.t.Fatalf("%v\n%s", err, stdout)
	}
	return stdout
}

// readSerial reads the lines of guest_init.sh until the serial line is closed: "ready
// RELEASE", then "ID STATUS" for each command.
func (g *Guest) readSerial(ready chan<- string) {
	lines := bufio.NewScanner(g.line)
	for lines.Scan() {
		first, second, _ := strings.Cut(lines.Text(), " ")
		if first == "ready" {
			ready <- second
			continue
		}
		id, idErr := strconv.Atoi(first)
		status, statusErr := strconv.Atoi(second)
		g.mu.Lock()
		done := g.waiting[id]
		delete(g.waiting, id)
		g.mu.Unlock()
		if done != nil && idErr == nil && statusErr == nil {
			done <- status
		}
	}
}

// serialLine returns the two ends of the serial line, a socket pair.
func serialLine() (ours, guests *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		return nil, nil, os.NewSyscallError("fcntl", err)
	}
	return os.NewFile(uintptr(fds[0]), "serial line"), os.NewFile(uintptr(fds[1]), "serial line"), nil
}

// memoryDir returns environment variables that put the guest's memory file into dir if
// /dev/shm, the default, is too small (64 MB in containers).
func memoryDir(dir string) []string {
	var fs unix.Statfs_t
	if err := unix.Statfs("/dev/shm", &fs); err == nil && fs.Bavail*uint64(fs.Bsize) > 2*guestMemory {
		return nil
	}
	return []string{"TMPDIR=" + dir}
}

// noAVX keeps the guest's C library, and with it nearly every program, from using the
// registers that are lost at a page fault: see startWithoutXstate.
const noAVX = "glibc.cpu.hwcaps=-AVX,-AVX2,-AVX_Fast_Unaligned_Load,-AVX512F,-AVX512VL,-AVX512BW"

// startWithoutXstate starts cmd in ns with a seccomp filter that fails ptrace's requests for
// the extended processor state (NT_X86_XSTATE). User-mode Linux saves that state in a buffer
// of fixed size, too small on processors with AMX, and crashes. Without the request it uses
// FXSAVE, which saves the SSE registers but not AVX's.
//
// A seccomp filter cannot be removed from a thread, so the thread ends with the goroutine.
func startWithoutXstate(ns *NS, cmd *exec.Cmd) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if err := refuseXstate(); err != nil {
			result <- err
			return
		}
		result <- ns.namespace.Start(cmd)
	}()
	return <-result
}

func refuseXstate() error {
	const (
		number, argument = 0, 16 // offsets in struct seccomp_data, little endian
		getRegset        = 0x4204
		setRegset        = 0x4205
	)
	load := func(offset uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset}
	}
	jumpIf := func(value uint32, yes, no uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: value, Jt: yes, Jf: no}
	}
	ret := func(value uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: value}
	}
	program := []unix.SockFilter{
		load(number), jumpIf(unix.SYS_PTRACE, 0, 3),
		load(argument), jumpIf(getRegset, 2, 0), jumpIf(setRegset, 1, 0),
		ret(unix.SECCOMP_RET_ALLOW),
		ret(unix.SECCOMP_RET_ERRNO | uint32(unix.EIO)),
	}
	fprog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	// Required without CAP_SYS_ADMIN, harmless with it.
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl", err)
	}
	if err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&fprog)), 0, 0); err != nil {
		return os.NewSyscallError("prctl", err)
	}
	return nil
}

// tail returns the last 25 lines of a process's output.
func tail(output string) string {
	lines := strings.Split(strings.TrimSpace(output), "\n")
	return strings.Join(lines[max(0, len(lines)-25):], "\n")
}
