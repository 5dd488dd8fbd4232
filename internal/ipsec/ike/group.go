package ike

import (
	"crypto/ecdh"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"

	"filippo.io/bigmod"
)

// Group is a Diffie-Hellman group by its IANA number, the same in IKEv1 and IKEv2. The zero value
// is none.
type Group uint16

// The groups.
const (
	MODP1024   Group = 2
	MODP1536   Group = 5
	MODP2048   Group = 14
	MODP3072   Group = 15
	MODP4096   Group = 16
	ECP256     Group = 19
	ECP384     Group = 20
	ECP521     Group = 21
	Curve25519 Group = 31
)

// groups is sorted by strength, weakest first.
var groups = []struct {
	group Group
	name  string
	prime string
	curve func() ecdh.Curve
}{
	{MODP1024, "modp1024", prime1024, nil},
	{MODP1536, "modp1536", prime1536, nil},
	{MODP2048, "modp2048", prime2048, nil},
	{MODP3072, "modp3072", prime3072, nil},
	{Curve25519, "curve25519", "", ecdh.X25519},
	{ECP256, "ecp256", "", ecdh.P256},
	{MODP4096, "modp4096", prime4096, nil},
	{ECP384, "ecp384", "", ecdh.P384},
	{ECP521, "ecp521", "", ecdh.P521},
}

// rank is the group's index in groups plus 1; 0 for none and unknown groups.
func (g Group) rank() int {
	for i := range groups {
		if groups[i].group == g {
			return i + 1
		}
	}
	return 0
}

// String returns the group's name in proposals, such as modp2048.
func (g Group) String() string {
	if r := g.rank(); r != 0 {
		return groups[r-1].name
	}
	if g == 0 {
		return "none"
	}
	return fmt.Sprintf("group%d", uint16(g))
}

func groupByName(name string) (Group, bool) {
	switch name {
	case "x25519":
		name = "curve25519"
	}
	for _, g := range groups {
		if g.name == name {
			return g.group, true
		}
	}
	return 0, false
}

// GroupNames returns the names that ParseGroup takes besides none, weakest first.
func GroupNames() []string {
	names := make([]string, len(groups))
	for i, g := range groups {
		names[i] = g.name
	}
	return names
}

// ParseGroup parses the name of a group; "none" is 0.
func ParseGroup(name string) (Group, error) {
	if name == "none" {
		return 0, nil
	}
	if g, ok := groupByName(name); ok {
		return g, nil
	}
	return 0, fmt.Errorf("%q is not accepted: want none or one of %s", name, strings.Join(GroupNames(), ", "))
}

// dhKey is our private key of one Diffie-Hellman exchange, with its public value.
type dhKey struct {
	group  Group
	public []byte // big-endian, as in a KE payload
	// One of these is set: MODP or curve.
	exponent []byte
	private  *ecdh.PrivateKey
}

var errPublicValue = errors.New("ike: the peer's public value is none of its group")

// modulus caches each group's modulus, which takes as long as a few exponentiations.
var modulus = func() map[Group]func() *bigmod.Modulus {
	m := make(map[Group]func() *bigmod.Modulus)
	for _, g := range groups {
		if g.prime == "" {
			continue
		}
		m[g.group] = sync.OnceValue(func() *bigmod.Modulus {
			b, err := hex.DecodeString(g.prime)
			if err != nil {
				panic(err)
			}
			n, err := bigmod.NewModulus(b)
			if err != nil {
				panic(err)
			}
			return n
		})
	}
	return m
}()

// exponentLen is the length of private exponents in bytes: more than twice the strength of the
// largest group (RFC 3526 section 8).
const exponentLen = 64

// newDHKey generates a key from random.
func newDHKey(g Group, random io.Reader) (*dhKey, error) {
	r := g.rank()
	if r == 0 {
		return nil, fmt.Errorf("ike: no group %s", g)
	}
	e := &dhKey{group: g}
	if curve := groups[r-1].curve; curve != nil {
		var err error
		if e.private, err = newCurveKey(curve(), random); err != nil {
			return nil, err
		}
		e.public = publicOf(e.private, g)
		return e, nil
	}
	e.exponent = make([]byte, exponentLen)
	if _, err := io.ReadFull(random, e.exponent); err != nil {
		return nil, err
	}
	e.public = powerOfTwo(e.exponent, g)
	return e, nil
}

// publicOf returns the public value of a key on a curve.
func publicOf(k *ecdh.PrivateKey, g Group) []byte {
	b := k.PublicKey().Bytes()
	if g != Curve25519 {
		b = b[1:] // RFC 5903 section 7: x and y without the 0x04 prefix
	}
	return b
}

// powerOfTwo returns the public value of a MODP group.
func powerOfTwo(exponent []byte, g Group) []byte {
	m := modulus[g]()
	return bigmod.NewNat().Exp(bigmod.NewNat().SetUint(2).ExpandFor(m), exponent, m).Bytes(m)
}

// newCurveKey uses exactly the bytes that it reads, so that tests are reproducible; GenerateKey
// does not promise that.
func newCurveKey(curve ecdh.Curve, random io.Reader) (*ecdh.PrivateKey, error) {
	size := map[ecdh.Curve]int{ecdh.P256(): 32, ecdh.P384(): 48, ecdh.P521(): 66, ecdh.X25519(): 32}[curve]
	for {
		b := make([]byte, size)
		if _, err := io.ReadFull(random, b); err != nil {
			return nil, err
		}
		if curve == ecdh.P521() {
			b[0] &= 1
		}
		if k, err := curve.NewPrivateKey(b); err == nil { // fails for zero and values beyond the order
			return k, nil
		}
	}
}

// shared returns the shared secret for the peer's public value. Its length depends on the group
// only.
func (e *dhKey) shared(peer []byte) ([]byte, error) {
	if e.private != nil {
		if e.group != Curve25519 {
			peer = append([]byte{4}, peer...)
		}
		public, err := e.private.Curve().NewPublicKey(peer)
		if err != nil {
			return nil, errPublicValue
		}
		secret, err := e.private.ECDH(public)
		if err != nil {
			return nil, errPublicValue
		}
		return secret, nil
	}
	m := modulus[e.group]()
	if len(peer) != m.Size() {
		return nil, errPublicValue
	}
	y, err := bigmod.NewNat().SetBytes(peer, m)
	// 0, 1 and p-1 give a predictable secret; with a safe prime no other value does (RFC 6989
	// section 2.1).
	if err != nil || y.IsZero()|y.IsOne()|y.IsMinusOne(m) == 1 {
		return nil, errPublicValue
	}
	return bigmod.NewNat().Exp(y, e.exponent, m).Bytes(m), nil
}
