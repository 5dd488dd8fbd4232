package fastpath

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

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
