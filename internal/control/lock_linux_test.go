package control

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/internal/serviceuser"
)

// nobody is the UID of another user.
const nobody = 65534

// asNobody returns a command to run as that user.
func asNobody(t *testing.T, name string, args ...string) *exec.Cmd {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: to be another user")
	}
	if _, err := exec.LookPath(name); err != nil {
		t.Skipf("needs %s (util-linux)", name)
	}
	c := exec.Command(name, args...)
	c.Dir = "/"
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}, Pdeathsig: syscall.SIGKILL}
	return c
}

// tempDir returns a directory with that mode, whose parents all users can traverse.
func tempDir(t *testing.T, mode os.FileMode) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ipipd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, mode); err != nil {
		t.Fatal(err)
	}
	return dir
}

// holdLock locks dir until the end of the test, as another ipipd would.
func holdLock(t *testing.T, dir string) {
	t.Helper()
	unlock, err := lock(t.Context(), dir, patience)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(unlock)
}

func TestLock(t *testing.T) {
	t.Run("dir-locked-by-another-user", dirLockedByAnotherUser)
	t.Run("readable-dir", readableDir)
	t.Run("untrusted-dir", untrustedDir)
	t.Run("socket-replaced-by-link", socketReplacedByLink)
	t.Run("listen-while-held", listenWhileHeld)
	t.Run("close-while-held", closeWhileHeld)
	t.Run("lock-file-in-the-way", lockFileInTheWay)
}

// Another user with read access to the directory can lock it, which must not matter.
func dirLockedByAnotherUser(t *testing.T) {
	dir := tempDir(t, 0o755)
	c := asNobody(t, "flock", "-x", dir, "sh", "-c", "echo locked; sleep 600")
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { c.Process.Kill(); c.Wait() }()
	if _, err := out.Read(make([]byte, 7)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		s, err := Listen(ctx, dir, "ipip1")
		if err == nil {
			go s.Serve(handler(status{"ipip1"}, func() { go s.Close() }))
			err = Down(dir, "ipip1", patience, patience, nil)
		}
		done <- err
	}()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(2 * patience):
		t.Fatal("it waits for the lock of another user")
	}
}

func readableDir(t *testing.T) {
	dir := tempDir(t, 0o755) // as systemd makes its RuntimeDirectory
	serve(t, dir, "ipip1")
	holdLock(t, dir)
	for file, command := range map[string]*exec.Cmd{
		filepath.Join(dir, lockFile): asNobody(t, "flock", "-n", filepath.Join(dir, lockFile), "true"),
		path(dir, "ipip1"):           asNobody(t, "rm", "-f", path(dir, "ipip1")),
	} {
		if info, err := os.Lstat(file); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v, want mode 0600", file, info, err)
		}
		if out, err := command.CombinedOutput(); err == nil || !strings.Contains(string(out), "Permission denied") {
			t.Errorf("%v as another user: %v, %s", command.Args, err, out)
		}
	}
}

func untrustedDir(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: to change the owner of a directory")
	}
	give := func(dir string) string {
		if err := os.Lchown(dir, nobody, nobody); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	link := filepath.Join(tempDir(t, 0o755), "link")
	if err := os.Symlink(tempDir(t, 0o700), link); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ name, dir, want string }{
		{"owner", give(tempDir(t, 0o700)), "belongs to uid 65534, who could replace what is in it"},
		{"link-of-others", give(link), "belongs to uid 65534, who could replace what is in it"},
		{"group-may-write", tempDir(t, 0o770), "may be written by others (mode 0770)"},
		{"others-may-write", tempDir(t, 0o707), "may be written by others (mode 0707)"},
		{"sticky", tempDir(t, 0o777|os.ModeSticky), "may be written by others (mode 0777)"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Listen(t.Context(), tt.dir, "ipip1")
			var unsafe *DirError
			if !errors.As(err, &unsafe) || err.Error() != tt.dir+" "+tt.want || (unsafe.Remedy == "") != strings.Contains(tt.want, "uid") {
				t.Errorf("Listen: %v", err)
			}
			// Sweep does not touch an untrusted directory.
			makeStale(t, tt.dir, "old")
			Sweep(tt.dir, []string{"old"})
			if _, err := os.Lstat(path(tt.dir, "old")); err != nil {
				t.Errorf("Sweep: %v", err)
			}
		})
	}
}

// Listen in a directory of another user, who keeps replacing the socket by a symbolic link, does not change the mode
// of the file linked to.
func socketReplacedByLink(t *testing.T) {
	dir := tempDir(t, 0o755)
	victim := filepath.Join(tempDir(t, 0o755), "victim")
	if err := os.WriteFile(victim, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	attack := asNobody(t, "sh", "-c", `while :; do ln -sf "$1" "$0" 2>/dev/null; done`, path(dir, "ipip1"), victim)
	if err := os.Chown(dir, nobody, nobody); err != nil {
		t.Fatal(err)
	}
	if err := attack.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { attack.Process.Kill(); attack.Wait() }()
	for range 100 {
		if s, err := Listen(t.Context(), dir, "ipip1"); err == nil {
			s.Close()
		}
		if info, err := os.Lstat(victim); err != nil || info.Mode().Perm() != 0o644 {
			t.Fatalf("the file linked to: %v, %v", info.Mode(), err)
		}
	}
}

func listenWhileHeld(t *testing.T) {
	dir := tempDir(t, 0o700)
	holdLock(t, dir)
	_, err := Listen(t.Context(), dir, "ipip1")
	var held *LockedError
	if !errors.As(err, &held) || !strings.Contains(err.Error(), dir+"/.lock is held by another process for more than 2s: ") {
		t.Errorf("Listen: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Listen(ctx, dir, "ipip1"); !errors.Is(err, context.Canceled) {
		t.Errorf("Listen that is told to end: %v", err)
	}
}

func closeWhileHeld(t *testing.T) {
	dir := tempDir(t, 0o700)
	s := serve(t, dir, "ipip1")
	holdLock(t, dir)
	done := make(chan error, 1)
	go func() { done <- s.Close() }()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Fatal("Close waits for the lock")
	}
	if _, err := os.Lstat(path(dir, "ipip1")); !os.IsNotExist(err) {
		t.Errorf("the socket is still there: %v", err)
	}
}

// The error names the file that is in the way of the lock file; a FIFO does not block.
func lockFileInTheWay(t *testing.T) {
	for what, make := range map[string]func(string) error{
		"fifo":      func(file string) error { return unix.Mkfifo(file, 0o600) },
		"directory": func(file string) error { return os.Mkdir(file, 0o700) },
		"open-to-others": func(file string) error {
			return errors.Join(os.WriteFile(file, nil, 0o600), os.Chmod(file, 0o644))
		},
		"link": func(file string) error { return os.Symlink("/etc/passwd", file) },
	} {
		t.Run(what, func(t *testing.T) {
			dir := tempDir(t, 0o700)
			if err := make(filepath.Join(dir, lockFile)); err != nil {
				t.Fatal(err)
			}
			if _, err := lock(t.Context(), dir, patience); err == nil || !strings.Contains(err.Error(), lockFile) {
				t.Errorf("lock: %v", err)
			}
		})
	}
}

// Root trusts a folder of root and of the service's user, and of no other.
func TestTrustedOwner_service(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: to change the owner of a directory")
	}
	before := serviceuser.UID
	t.Cleanup(func() { serviceuser.UID = before })
	serviceuser.UID = func() int { return 4242 }
	dir := tempDir(t, 0o700)
	for uid, trusted := range map[int]bool{0: true, 4242: true, 4243: false} {
		if err := os.Lchown(dir, uid, uid); err != nil {
			t.Fatal(err)
		}
		if root, err := openDir(dir); (err == nil) != trusted {
			t.Errorf("uid %d: %v", uid, err)
		} else if err == nil {
			root.Close()
		}
	}
}
