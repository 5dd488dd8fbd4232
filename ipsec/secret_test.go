package ipsec

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestSecretFileMustBePrivate(t *testing.T) {
	file := filepath.Join(t.TempDir(), "secret")
	write := func(content string, mode os.FileMode) {
		t.Helper()
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
