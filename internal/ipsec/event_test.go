package ipsec

import (
	"strings"
	"testing"
	"time"

	"ipipd/internal/ipsec/esp"
	"ipipd/internal/ipsec/ike"
)

// A problem is reported once, not at every attempt.
func TestNegotiatorIsNew(t *testing.T) {
	n := &negotiator{}
	mismatch := ike.Problem{Kind: ike.SecretMismatch}
	for i, want := range []bool{true, false, false} {
		mismatch.Detail = strings.Repeat("x", i) // Detail does not count
		if got := n.isNew(mismatch); got != want {
			t.Errorf("try %d: %v", i, got)
		}
		if n.isNew(ike.Problem{}) {
			t.Error("no problem is news")
		}
	}
	if !n.isNew(ike.Problem{Kind: ike.NoAnswer}) {
		t.Error("another problem is no news")
	}
}

func TestStatusDescribe(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	suite := esp.Suite{Cipher: esp.AESCBC, KeyBits: 256, Integrity: esp.HMACSHA1}
	for want, s := range map[string]Status{
		"negotiating":                                         {},
		"not established: it does not work":                   {Problem: "it does not work"},
		"established aes-256-cbc/sha1 modp2048, rekey in 11m": {Established: true, Suite: suite, Group: ike.MODP2048, RekeyAt: now.Add(11*time.Minute + 20*time.Second)},
		"established aes-256-cbc/sha1 none in UDP, rekeying":  {Established: true, Suite: suite, UDP: true, RekeyAt: now},
	} {
		if got := s.Describe(now); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
