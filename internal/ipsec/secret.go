package ipsec

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"ipipd/internal/ipsec/ike"
)

// MaxSecret is the longest secret in bytes: far more than anybody types, and less
// than a mistaken file.
const MaxSecret = 4096

// WeakSecret is the length in bytes below which a secret can be guessed by whoever has
// one negotiation with it, offline: fewer than 120 random bits in base64.
const WeakSecret = 20

// LoadSecret reads a pre-shared key from a file that belongs to root or to the user of
// this process, and that nobody but its owner may read or write. A link is followed, as
// Kubernetes makes them: what is asked is about the file that is opened. A line end
// after the secret does not belong to it.
func LoadSecret(file string) (ike.Secret, error) {
	// A FIFO, which nobody may ever write to, is opened at once too.
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
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return nil, fmt.Errorf("%s may be read or written by others (mode %04o): chmod 600 %s", file, mode, file)
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
