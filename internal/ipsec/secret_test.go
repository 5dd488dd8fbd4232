package ipsec

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"
	"time"

	"ipipd/internal/serviceuser"
)

// LoadSecret checks content and mode of the file. An error does not contain the secret.
func TestLoadSecret_contentAndMode(t *testing.T) {
	file := filepath.Join(t.TempDir(), "secret")
	write := func(content string, mode os.FileMode) {
		t.Helper()
		_ = os.Remove(file) // only root can write one of mode 0400
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(file, mode); err != nil {
			t.Fatal(err)
		}
	}
	for _, mode := range []os.FileMode{0o600, 0o400} {
		write("correct horse\r\n", mode)
		s, err := LoadSecret(file)
		if err != nil || string(s) != "correct horse" {
			t.Errorf("mode %o: %q, %v", mode, []byte(s), err)
		}
	}
	for _, mode := range []os.FileMode{0o640, 0o604, 0o620, 0o660, 0o644, 0o777, 0o610} {
		write("correct horse", mode)
		if _, err := LoadSecret(file); err == nil || !strings.Contains(err.Error(), "chmod 600") {
			t.Errorf("mode %o: %v", mode, err)
		}
	}
	for _, content := range []string{"", "\n", "two\nlines", "nul\x00byte", strings.Repeat("x", MaxSecret+1)} {
		write(content, 0o600)
		_, err := LoadSecret(file)
		if err == nil {
			t.Errorf("%.20q was taken", content)
			continue
		}
		if content = strings.TrimSpace(content); content != "" && strings.Contains(err.Error(), content) {
			t.Errorf("the error %q has the secret", err)
		}
	}
	if _, err := LoadSecret(filepath.Dir(file)); err == nil {
		t.Error("a folder was taken")
	}
	if _, err := LoadSecret(file + "x"); !os.IsNotExist(err) {
		t.Errorf("a file that is not there: %v", err)
	}
}

func TestLoadSecret(t *testing.T) {
	secretFile := func(t *testing.T) string {
		file := filepath.Join(t.TempDir(), "secret")
		if err := os.WriteFile(file, []byte("correct horse"), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	t.Run("fifo", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "fifo")
		if err := syscall.Mkfifo(file, 0o600); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() {
			_, err := LoadSecret(file)
			done <- err
		}()
		select {
		case err := <-done:
			if err == nil || err.Error() != file+" is no regular file" {
				t.Errorf("LoadSecret: %v", err)
			}
		case <-time.After(20 * time.Second):
			t.Fatal("it waits for a writer")
		}
	})
	// The permissions of the target count.
	t.Run("link", func(t *testing.T) {
		file := secretFile(t)
		link := filepath.Join(t.TempDir(), "link")
		if err := os.Symlink(file, link); err != nil {
			t.Fatal(err)
		}
		if s, err := LoadSecret(link); err != nil || string(s) != "correct horse" {
			t.Errorf("LoadSecret: %q, %v", []byte(s), err)
		}
		if err := os.Chmod(file, 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadSecret(link); err == nil || !strings.Contains(err.Error(), "mode 0644") {
			t.Errorf("a link to a file that others may read: %v", err)
		}
	})
	t.Run("owner", func(t *testing.T) {
		if os.Geteuid() != 0 {
			t.Skip("needs root: to give a file away")
		}
		file := secretFile(t)
		if err := os.Chown(file, 65534, 65534); err != nil {
			t.Fatal(err)
		}
		want := file + " belongs to uid 65534, who can read and replace it: chown 0 " + file
		if _, err := LoadSecret(file); err == nil || err.Error() != want {
			t.Errorf("LoadSecret: %v, want %s", err, want)
		}
	})
	// A partial read must not pass as the secret.
	t.Run("read-error", func(t *testing.T) {
		r := io.MultiReader(strings.NewReader("correct"), iotest.ErrReader(syscall.EIO))
		if s, err := readSecret(r, "file"); !errors.Is(err, syscall.EIO) {
			t.Errorf("readSecret: %q, %v", []byte(s), err)
		}
	})
}

// The file may be readable for the group of the service, and for no other.
func TestLoadSecret_service(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: to change the group of a file")
	}
	before := serviceuser.GID
	t.Cleanup(func() { serviceuser.GID = before })
	serviceuser.GID = func() int { return 4242 }
	file := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(file, []byte("mellon\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		gid  int
		mode os.FileMode
		want string
	}{{4242, 0o640, ""}, {4242, 0o660, "chmod 640 "}, {4242, 0o644, "chmod 640 "}, {0, 0o640, "chmod 600 "}} {
		if err := errors.Join(os.Chown(file, 0, tt.gid), os.Chmod(file, tt.mode)); err != nil {
			t.Fatal(err)
		}
		_, err := LoadSecret(file)
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("group %d, mode %o: %v", tt.gid, tt.mode, err)
		}
	}
}
