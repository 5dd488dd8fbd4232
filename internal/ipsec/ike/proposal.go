package ike

import (
	"fmt"
	"strings"

	"ipipd/internal/ipsec/esp"
)

// Proposal is one combination of algorithms, for IKE or for ESP.
type Proposal struct {
	Cipher  esp.Cipher
	KeyBits int
	// Hash is the integrity algorithm, and for IKE also the PRF. With AES-GCM it is 0 for ESP,
	// and only the PRF for IKE.
	Hash esp.Integrity
	// Group is the Diffie-Hellman group. In a proposal for ESP, 0 stands for the configured PFS
	// group.
	Group Group
}

// DefaultPhase1 and DefaultPhase2 are the default proposals, strongest first, down to the
// defaults of RouterOS. AES-GCM in phase 1 is for IKEv2 only.
const (
	DefaultPhase1 = "aes256gcm16-sha256-ecp256,aes256-sha256-ecp256,aes256-sha256-modp2048,aes128-sha256-modp2048,aes256-sha1-modp2048,aes128-sha1-modp2048,aes128-sha1-modp1024"
	DefaultPhase2 = "aes256gcm16,aes128gcm16,aes256-sha256,aes128-sha256,aes256-sha1,aes192-sha1,aes128-sha1"
)

var ciphers = []struct {
	name   string
	cipher esp.Cipher
	bits   int
}{
	{"aes128", esp.AESCBC, 128}, {"aes192", esp.AESCBC, 192}, {"aes256", esp.AESCBC, 256},
	{"aes128gcm16", esp.AESGCM, 128}, {"aes192gcm16", esp.AESGCM, 192}, {"aes256gcm16", esp.AESGCM, 256},
	{"3des", esp.TripleDESCBC, 192},
}

var hashes = []struct {
	name string
	hash esp.Integrity
}{
	{"sha1", esp.HMACSHA1}, {"sha256", esp.HMACSHA256}, {"sha384", esp.HMACSHA384}, {"sha512", esp.HMACSHA512},
}

// ParsePhase1 parses a comma-separated list of proposals for IKE: aes128-sha1-modp2048. The error
// is a *ProposalError.
func ParsePhase1(s string) ([]Proposal, error) { return parseProposals(s, true) }

// ParsePhase2 parses a comma-separated list of proposals for ESP: aes128-sha1,aes256gcm16. The
// error is a *ProposalError.
func ParsePhase2(s string) ([]Proposal, error) { return parseProposals(s, false) }

// ProposalError is a proposal that is not accepted.
type ProposalError struct {
	Proposal string
	// Want says what is accepted.
	Want string
}

func (e *ProposalError) Error() string {
	return fmt.Sprintf("%q is not accepted: want %s", e.Proposal, e.Want)
}

func parseProposals(s string, phase1 bool) ([]Proposal, error) {
	want := "CIPHER-HASH like aes128-sha1, or aes256gcm16"
	if phase1 {
		want = "CIPHER-HASH-GROUP like aes128-sha1-modp2048"
	}
	var ps []Proposal
	for _, one := range strings.Split(s, ",") {
		p, err := parseProposal(strings.TrimSpace(one), phase1)
		if err != nil {
			return nil, &ProposalError{Proposal: one, Want: fmt.Sprintf("%s (%v)", want, err)}
		}
		ps = append(ps, p)
	}
	if len(ps) > maxProposals/2 {
		return nil, &ProposalError{Proposal: s, Want: fmt.Sprintf("at most %d of them", maxProposals/2)}
	}
	return ps, nil
}

func parseProposal(s string, phase1 bool) (p Proposal, err error) {
	for i, word := range strings.Split(strings.ToLower(s), "-") {
		if i == 0 {
			word = strings.ReplaceAll(word, "gcm128", "gcm16")
			if strings.HasSuffix(word, "gcm") {
				word += "16"
			}
			for _, c := range ciphers {
				if c.name == word {
					p.Cipher, p.KeyBits = c.cipher, c.bits
				}
			}
			if p.Cipher == 0 {
				return p, fmt.Errorf("no cipher %q", word)
			}
			continue
		}
		if g, ok := groupByName(word); ok && p.Group == 0 {
			p.Group = g
			continue
		}
		known := false
		for _, h := range hashes {
			if h.name == strings.TrimPrefix(word, "prf") && p.Hash == 0 && p.Group == 0 {
				p.Hash, known = h.hash, true
			}
		}
		if !known {
			return p, fmt.Errorf("unknown algorithm %q", word)
		}
	}
	switch {
	case phase1 && (p.Hash == 0 || p.Group == 0):
		return p, fmt.Errorf("hash or group is missing")
	case !phase1 && p.Cipher == esp.AESGCM && p.Hash != 0:
		return p, fmt.Errorf("aes-gcm takes no hash here")
	case !phase1 && p.Cipher != esp.AESGCM && p.Hash == 0:
		return p, fmt.Errorf("hash is missing")
	}
	return p, nil
}

// String returns the proposal in the notation that ParsePhase1 and ParsePhase2 read.
func (p Proposal) String() string {
	words := make([]string, 0, 3)
	for _, c := range ciphers {
		if c.cipher == p.Cipher && c.bits == p.KeyBits {
			words = append(words, c.name)
		}
	}
	if len(words) == 0 {
		words = append(words, "?")
	}
	for _, h := range hashes {
		if h.hash == p.Hash {
			words = append(words, h.name)
		}
	}
	if p.Group != 0 {
		words = append(words, p.Group.String())
	}
	return strings.Join(words, "-")
}

func proposalList(ps []Proposal) string {
	words := make([]string, len(ps))
	for i, p := range ps {
		words[i] = p.String()
	}
	return strings.Join(words, ",")
}

// suite returns the algorithms for ESP.
func (p Proposal) suite() esp.Suite {
	s := esp.Suite{Cipher: p.Cipher, KeyBits: p.KeyBits, Integrity: p.Hash}
	if p.Cipher == esp.AESGCM {
		s.Integrity = 0
	}
	return s
}

// weak names the algorithms of the proposal that are only acceptable for lack of better ones.
func (p Proposal) weak() string {
	var words []string
	if p.Cipher == esp.TripleDESCBC {
		words = append(words, "3des")
	}
	if p.Hash == esp.HMACSHA1 {
		words = append(words, "sha1")
	}
	if p.Group == MODP1024 || p.Group == MODP1536 {
		words = append(words, p.Group.String())
	}
	return strings.Join(words, ", ")
}
