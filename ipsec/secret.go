package ipsec

import (
	"bytes"
	"errors"
	"fmt"
	"os"

	"ipipd/ipsec/ike"
)

// MaxSecret is the longest secret in bytes: far more than anybody types, and less
// than a mistaken file.
const MaxSecret = 4096

// LoadSecret reads a pre-shared key from a file that nobody but its owner may
// read or write. A line end after it does not belong to it.
func LoadSecret(file string) (ike.Secret, error) {
	f, err := os.Open(file)
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
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return nil, fmt.Errorf("%s may be read or written by others (mode %04o): chmod 600 %s", file, mode, file)
	}
	b := make([]byte, MaxSecret+1)
	n := 0
	for n < len(b) {
		m, err := f.Read(b[n:])
		n += m
		if err != nil {
			break
		}
	}
	if n > MaxSecret {
		return nil, fmt.Errorf("%s is longer than a secret can be (%d bytes)", file, MaxSecret)
	}
	secret := bytes.TrimRight(b[:n], "\r\n")
	if len(secret) == 0 {
		return nil, fmt.Errorf("%s is empty: it has to hold the secret", file)
	}
	if bytes.ContainsAny(secret, "\r\n\x00") {
		return nil, errors.New(file + " has more than one line")
	}
	return secret, nil
}
