package handover

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// file returns a memfd that holds text.
func file(t *testing.T, text string) int {
	t.Helper()
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Write(fd, []byte(text)); err != nil {
		t.Fatal(err)
	}
	return fd
}

func closesOnExec(t *testing.T, fd int) bool {
	t.Helper()
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
	if err != nil {
		t.Fatal(err)
	}
	return flags&unix.FD_CLOEXEC != 0
}

func TestKeeper_Pass(t *testing.T) {
	k := NewKeeper(10)
	for i := range 3 {
		k.kept = append(k.kept, descriptor{fmt.Sprintf("tun %d", i/2), file(t, fmt.Sprint(i))})
	}
	_, undo, err := k.Pass()
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range k.kept {
		if closesOnExec(t, d.fd) {
			t.Errorf("%s is closed by execve", d.name)
		}
	}
	undo()
	for _, d := range k.kept {
		if !closesOnExec(t, d.fd) {
			t.Errorf("%s is not closed by execve after undo", d.name)
		}
	}
	variable, _, err := k.Pass()
	if err != nil {
		t.Fatal(err)
	}
	name, value, _ := strings.Cut(variable, "=")
	t.Setenv(name, value)
	next, resumed, err := ResumeKeeper(10)
	if err != nil || !resumed || fmt.Sprint(next.kept) != fmt.Sprint(k.kept) {
		t.Fatalf("%v, %v: %v, want %v", resumed, err, next, k.kept)
	}
	defer next.Close()
	for i, d := range next.kept {
		b := make([]byte, 2)
		if n, err := unix.Pread(d.fd, b, 0); err != nil || string(b[:n]) != fmt.Sprint(i) || !closesOnExec(t, d.fd) {
			t.Errorf("%s: %q, %v", d.name, b, err)
		}
	}
	if _, resumed, err := ResumeKeeper(10); resumed || err != nil {
		t.Errorf("%v, %v by a variable that is used", resumed, err)
	}
}

// ResumeKeeper takes no wrong descriptor or name from a list, and no wrong variable, which it unsets.
func TestResumeKeeper_refuses(t *testing.T) {
	good := file(t, "")
	defer unix.Close(good)
	for _, list := range []string{"x name\n", "0 name\n", "-1 name\n", "999999 name\n", "name\n", "\n", fmt.Sprintf("%d a:b\n", good), fmt.Sprintf("%d %s\n", good, KeeperName)} {
		t.Setenv(passEnv, fmt.Sprint(file(t, list)))
		if k, resumed, err := ResumeKeeper(10); !resumed || err == nil || k.Len() != 0 {
			t.Errorf("%q: %v, %v, %d kept", list, resumed, err, k.Len())
		}
	}
	for _, variable := range []string{"", "x", "0", "2", "999999", "-1"} {
		t.Setenv(passEnv, variable)
		if _, resumed, err := ResumeKeeper(10); !resumed || err == nil {
			t.Errorf("%s=%s: %v, %v", passEnv, variable, resumed, err)
		}
		if _, is := os.LookupEnv(passEnv); is {
			t.Errorf("%s stays", passEnv)
		}
	}
}
