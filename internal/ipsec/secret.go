package ipsec

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"

	"ipipd/internal/ipsec/ike"
	"ipipd/internal/serviceuser"
)

// MaxSecret is the maximum length of a secret in bytes. It rejects most files that were
// named by mistake.
const MaxSecret = 4096

// WeakSecret is the length in bytes below which a secret is weak: an offline dictionary
// attack needs one negotiation with it. 20 characters of base64 are 120 random bits.
const WeakSecret = 20

// LoadSecret reads a pre-shared key from a regular file that is owned by root or the
// effective user, with no permissions for group and others, except that the service's group
// (serviceuser.GID) may read it. Symbolic links, as in Kubernetes volumes, are followed, and
// these rules hold for the target. Trailing line ends are stripped.
func LoadSecret(file string) (ike.Secret, error) {
	// O_NONBLOCK, because opening a FIFO without a writer would block.
	f, err := os.OpenFile(file, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no regular file", file)
	}
	if owner := int(info.Sys().(*syscall.Stat_t).Uid); owner != 0 && owner != os.Geteuid() {
		return nil, fmt.Errorf("%s belongs to uid %d, who can read and replace it: chown %d %s", file, owner, os.Geteuid(), file)
	}
	others, want := fs.FileMode(0o077), 600
	if int(info.Sys().(*syscall.Stat_t).Gid) == serviceuser.GID() {
		others, want = 0o037, 640 // root may let the service read it
	}
	if mode := info.Mode().Perm(); mode&others != 0 {
		return nil, fmt.Errorf("%s may be read or written by others (mode %04o): chmod %d %s", file, mode, want, file)
	}
	return readSecret(f, file)
}

func readSecret(r io.Reader, file string) (ike.Secret, error) {
	b, err := io.ReadAll(io.LimitReader(r, MaxSecret+1))
	if err != nil {
		return nil, err
	}
	if len(b) > MaxSecret {
		return nil, fmt.Errorf("%s is longer than a secret can be (%d bytes)", file, MaxSecret)
	}
	secret := bytes.TrimRight(b, "\r\n")
	if len(secret) == 0 {
		return nil, fmt.Errorf("%s is empty: it has to hold the secret", file)
	}
	if bytes.ContainsAny(secret, "\r\n\x00") {
		return nil, errors.New(file + " has more than one line")
	}
	return secret, nil
}
