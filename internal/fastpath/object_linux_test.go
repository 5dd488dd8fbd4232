package fastpath

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// The verifier accepts the programs of a process with CAP_BPF and CAP_NET_ADMIN only, as a container has them:
// without CAP_PERFMON it takes no pointer with a variable offset.
func TestObject_capabilities(t *testing.T) {
	runtime.LockOSThread() // never unlocked: the thread ends with the test
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	if err := unix.Capget(&header, &caps[0]); err != nil {
		t.Fatal(err)
	}
	for _, c := range []uint{unix.CAP_SYS_ADMIN, unix.CAP_PERFMON} {
		caps[c/32].Effective &^= 1 << (c % 32)
	}
	if err := unix.Capset(&header, &caps[0]); err != nil {
		t.Fatal(err)
	}
	o, err := load(0)
	if errors.Is(err, unix.EPERM) {
		t.Skipf("needs CAP_BPF: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	o.close()
}

// The object in the tree is what the source compiles to. The test is skipped with another
// compiler or other kernel headers than bpf/compiler names; `make bpf` records those.
func TestObject_reproducible(t *testing.T) {
	want, err := os.ReadFile("bpf/compiler")
	if err != nil {
		t.Fatal(err)
	}
	for _, tool := range []string{"clang", "llvm-strip"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s (packages clang, llvm)", tool)
		}
	}
	path := filepath.Join(t.TempDir(), "ipip.o")
	with, err := exec.Command("bpf/build", path).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, with)
	}
	if !bytes.Equal(with, want) {
		t.Skipf("the object was made with\n%s, and here is\n%s", want, with)
	}
	made, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(made, object) {
		t.Error("bpf/ipip.o is not what bpf/ipip.c compiles to: run make bpf")
	}
}
