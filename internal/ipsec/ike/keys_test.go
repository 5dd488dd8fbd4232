package ike

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"log/slog"
	"math/big"
	"strings"
	"testing"

	"filippo.io/bigmod"

	"ipipd/internal/ipsec/esp"
)

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Two captured IKEv1 handshakes between two other implementations: secret AAAA,
// aes128-sha1-modp1024.
func TestDeriveV1_recordedHandshakes(t *testing.T) {
	const sa = "00000001000000010000002c01010001000000240101000080010007800e0080800200028004000280030001800b0001800c7080"
	for i, c := range []struct {
		ckyI, ckyR, ni, nr, keI, keR, shared string
		id, d, a, iv, hashR                  string
		infoID                               uint32
		infoIV                               string
	}{
		{
			"7116900aa5c2880d", "047ad6f8b3d0abb7", "4654fdd74594982a", "3673e64987b4956dbb8b933399251a5abf88f557a723b802b345f838667e9a4e",
			"75fb75db0749d4b15d9bb067b63399f790246dd7919d0c0a88fc34dd76eb9ad204e162b261914c0966a2d32d05178d4c0f0ec3817692fca675678f2fd2a6869188b943e33ad44cc859a5af98d6d5332c538cff4174ee737c8624de910cc40bd953f7940d1b2d8a681cee03c85199fbe773bfa100ffea5fcb82eed25a399b0b3e",
			"2096a31ff922e5224d9d19f06a41e2d9aebe1180d4e5cbc3d6ea166e2b8810d5ddd048375025ae9bf895ad40c508cd8b9398bded0d00ae7e77c1a1eb31930495106892630152a926a45037606cda4651340082fc10558786b4d8c4e6d72222d580d9a30d9c3b7fe9c348a6eadc5e79a24fe4b4364297b5ff71914ef8a6980e73",
			"19B67B23EB5F792EC9D7E11D16501CA20F2A2D0B230D525CD824DFB16867B515DC2CE9560B20B2149BFB360C1662C26A5AD7FE1FAA86E66213238C80B2ED46CCB821BF5043093027EB6E32C71685A093306DF20C24190C7F93947FA21E56D10E4C5B7063B2B4DC1747F1DF0BD46975D1825EEDE335E3ACBAD71A063CECF866C7",
			"49856BC53F30DB8CE55F5BEFAE9E42431279550C", "E5D7368180A8766F09C90CC9AC15182D3CD492EE", "92DE109FE83047C95812B600820F1476CD24AA49",
			"139568606DF1337CBCBC8FA7D201C8A8", "BA8C49CFD796BDC78E63FF6B5A858FC289DAD933", 0, "",
		}, {
			"dc3f1d7452b2c376", "5f17969262b7829b", "18eeeee5b29ef938", "cf6306dcc088a94c1983462f97a3128ecdefbe4a1925cffddedd526215648099",
			"a8b04c567a6bb3ab17da6a07f3f1667e6c70fb992ffe0a01dccc0877214c1936cc13a66aa97e4cd9ebfd61f6a7119859bba763255b54364d37a59f969d230f877cce6d77ca843e5f0cb24e354d51a429aabf75238f5a17ef5801f3b02d9f35dcd3562c35e6aeff67e9c71961f9313b6306c2c1adb428d6e70e713f894d9b7eda",
			"7947cdf90ed5f07ca325c9c9e6de95a82e5728b2e1daf44866100723ad2bed0f09e8383cf89c7645c805c2942d4aebfa1b6c351a9666faa1f4988c3a557cb411a3b73fd3e094144e646ef5eb85118a61f06c6359e0f19b43a99720b49ae322155d462004be5e09140cfc843e0622c6735bc90ab730577fc311b23b25a8d283fa",
			"9FC4267E99D40EE7AA19492615990548621EBED0AE925A0810C2F4BF30A100F6B13201BAC4595281E5F2FB6FAF56F9CDA292991B40B41A48CFBA7713140DE1784DBD525C0CB88A4D3B4B46D7CABD539CDD1E79EDE000420CFFE9ED8BCA0B2FE09208D9D3145F55F68CE0E3C6C479616B64F3EB451CD4CE268310BCDC766BA8A2",
			"505E91CA4127FE30D9CAD15F6176E8C504D2D612", "571D06B00EDA6D375310377F3B3E0994A936E0F2", "1DE7B88B63DEEA0BB41374C6F9514F64B894E083",
			"0E09ED33BAC3584D1D10762A9BD026C1", "DDB2CF1067913E83EA6633B8B174BC8CE559B9D1", 0xd8029d42, "0BF60ED4C34FEA8A12077A204DFD413F",
		},
	} {
		p := Proposal{esp.AESCBC, 128, esp.HMACSHA1, MODP1024}
		s := &v1SA{initiator: true, saI: unhex(t, sa), peerKE: unhex(t, c.keR), dh: &dhKey{public: unhex(t, c.keI)}, proposal: p}
		copy(s.ckyI[:], unhex(t, c.ckyI))
		copy(s.ckyR[:], unhex(t, c.ckyR))
		var err error
		s.keys, err = deriveV1(p, Secret("AAAA"), unhex(t, c.ni), unhex(t, c.nr), unhex(t, c.shared), s.dh.public, s.peerKE, s.ckyI, s.ckyR)
		if err != nil {
			t.Fatal(err)
		}
		for name, x := range map[string][2][]byte{
			"SKEYID":   {s.keys.skeyid, unhex(t, c.id)},
			"SKEYID_d": {s.keys.skeyidD, unhex(t, c.d)},
			"SKEYID_a": {s.keys.skeyidA, unhex(t, c.a)},
			"IV":       {s.keys.phase1IV, unhex(t, c.iv)},
			"HASH_R":   {s.hash(false, unhex(t, "010000000a00030a")), unhex(t, c.hashR)},
		} {
			if !bytes.Equal(x[0], x[1]) {
				t.Errorf("handshake %d: %s = %x, want %x", i, name, x[0], x[1])
			}
		}
		if c.infoID != 0 && !bytes.Equal(s.keys.phase2IV(s.keys.phase1IV, c.infoID), unhex(t, c.infoIV)) {
			t.Errorf("handshake %d: IV of an informational exchange = %x", i, s.keys.phase2IV(s.keys.phase1IV, c.infoID))
		}
	}
}

// RFC 4231 section 4.3, test case 2.
func TestPRF(t *testing.T) {
	for h, want := range map[esp.Integrity]string{
		esp.HMACSHA256: "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843",
		esp.HMACSHA384: "af45d2e376484031617f78d2b58a6b1b9c7ef464f5a01b47e42ec3736322445e8e2240ca5e69e2c78b3239ecfab21649",
		esp.HMACSHA512: "164b7a7bfcf819e2e395fbe73b56e0a387bd64222e831fd610270cd7ea2505549758bf75c05a994a6d034f65f8f0e6fdcaeab1a34d4a6b4b636e070a38bce737",
		esp.HMACSHA1:   "effcdf6ae5eb2fa2d27416d5f184df9c259a7c79", // RFC 2202, section 3, test case 2
	} {
		if got := prf(h, []byte("Jefe"), []byte("what do ya want "), []byte("for nothing?")); !bytes.Equal(got, unhex(t, want)) {
			t.Errorf("%v: %x", h, got)
		}
	}
}

// prf+ is T1 | T2 | …, each the prf of the last one, the seed and its number (RFC 7296 section
// 2.13).
func TestPRFPlus(t *testing.T) {
	key, seed := []byte("key"), []byte("seed")
	t1 := prf(esp.HMACSHA1, key, seed, []byte{1})
	t2 := prf(esp.HMACSHA1, key, t1, seed, []byte{2})
	if got := prfPlus(esp.HMACSHA1, key, 33, seed); !bytes.Equal(got, append(t1, t2...)[:33]) {
		t.Errorf("%x", got)
	}
}

// p and (p-1)/2 are prime, and p has the form that RFC 3526 gives.
func TestGroups_safePrimes(t *testing.T) {
	for _, g := range groups {
		if g.prime == "" {
			continue
		}
		b := unhex(t, g.prime)
		p := new(big.Int).SetBytes(b)
		ones := bytes.Repeat([]byte{0xff}, 8)
		if fmt.Sprintf("modp%d", p.BitLen()) != g.name || !bytes.HasPrefix(b, ones) || !bytes.HasSuffix(b, ones) {
			t.Errorf("%s has not the form of its RFC", g.name)
		}
		if testing.Short() && p.BitLen() > 2048 {
			continue
		}
		if !p.ProbablyPrime(1) || !new(big.Int).Rsh(p, 1).ProbablyPrime(1) {
			t.Errorf("%s is no safe prime", g.name)
		}
	}
}

func TestDHKeyShared(t *testing.T) {
	for _, g := range groups {
		a, err := newDHKey(g.group, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		b, err := newDHKey(g.group, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		x, errX := a.shared(b.public)
		y, errY := b.shared(a.public)
		if errX != nil || errY != nil || !bytes.Equal(x, y) || len(x) == 0 {
			t.Errorf("%s: %v %v, %x and %x", g.name, errX, errY, x, y)
		}
		if a.exponent != nil { // compare with math/big
			p := new(big.Int).SetBytes(unhex(t, g.prime))
			want := new(big.Int).Exp(new(big.Int).SetBytes(b.public), new(big.Int).SetBytes(a.exponent), p)
			if new(big.Int).SetBytes(x).Cmp(want) != 0 {
				t.Errorf("%s: bigmod and math/big differ", g.name)
			}
		}
	}
}

func TestDHKeyShared_invalidPublicValue(t *testing.T) {
	for _, g := range groups {
		e, err := newDHKey(g.group, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		bad := [][]byte{nil, {}, e.public[1:], append([]byte{0}, e.public...), make([]byte, len(e.public))}
		if g.prime != "" {
			m := modulus[g.group]()
			one := bigmod.NewNat().SetUint(1).ExpandFor(m)
			p := unhex(t, g.prime)
			minusOne := bytes.Clone(p)
			minusOne[len(p)-1]--
			bad = append(bad, one.Bytes(m), p, minusOne, bytes.Repeat([]byte{0xff}, len(p)))
		} else if g.group != Curve25519 {
			off := bytes.Clone(e.public)
			off[len(off)-1] ^= 1
			bad = append(bad, off)
		}
		for _, b := range bad {
			if _, err := e.shared(b); err == nil {
				t.Errorf("%s: %x was taken", g.name, b)
			}
		}
	}
}

func TestParsePhase1(t *testing.T) {
	for in, want := range map[string]string{
		"aes128-sha1-modp2048":                     "aes128-sha1-modp2048",
		"AES256-SHA256-ecp256, 3des-sha1-modp1024": "aes256-sha256-ecp256,3des-sha1-modp1024",
		"aes256gcm-prfsha256-x25519":               "aes256gcm16-sha256-curve25519",
		"aes128gcm128-sha384-ecp384":               "aes128gcm16-sha384-ecp384",
		DefaultPhase1:                              DefaultPhase1,
	} {
		ps, err := ParsePhase1(in)
		if err != nil || proposalList(ps) != want {
			t.Errorf("%q: %q, %v", in, proposalList(ps), err)
		}
	}
	for in, want := range map[string]string{
		"aes128-sha1": "aes128-sha1", "aes256gcm16": "aes256gcm16", "aes128-sha512-modp2048": "aes128-sha512-modp2048",
		DefaultPhase2: DefaultPhase2,
	} {
		ps, err := ParsePhase2(in)
		if err != nil || proposalList(ps) != want {
			t.Errorf("%q: %q, %v", in, proposalList(ps), err)
		}
	}
	for _, in := range []string{"", "aes128", "aes128-sha1", "aes128-modp2048", "sha1-aes128-modp2048", "des-md5-modp768", "aes128-sha1-modp2048-modp2048", "aes128-sha1-modp2048,", "aes128-modp2048-sha1", "null-sha1-modp2048"} {
		if _, err := ParsePhase1(in); err == nil {
			t.Errorf("phase 1 took %q", in)
		} else if strings.Contains(err.Error(), "\n") || !strings.Contains(err.Error(), "aes128-sha1-modp2048") {
			t.Errorf("error %q does not say what is accepted", err)
		}
	}
	for _, in := range []string{"aes128", "aes256gcm16-sha1", "null", "aes128-sha1-sha1"} {
		if _, err := ParsePhase2(in); err == nil {
			t.Errorf("phase 2 took %q", in)
		}
	}
	if _, err := ParsePhase1(strings.Repeat("aes128-sha1-modp2048,", 30) + "aes128-sha1-modp2048"); err == nil {
		t.Error("31 proposals were taken")
	}
}

func TestProposal_roundTrip(t *testing.T) {
	all := "aes128-sha1-modp1024,aes192-sha256-modp1536,aes256-sha384-modp2048,aes128-sha512-modp3072,3des-sha1-modp4096,aes128-sha1-ecp256,aes128-sha1-ecp384,aes128-sha1-ecp521,aes128-sha1-curve25519"
	ps, err := ParsePhase1(all)
	if err != nil {
		t.Fatal(err)
	}
	sas, err := parseSAV1(appendSAV1(encodePhase1(ps, 86400e9)))
	if err != nil || len(sas) != 1 || len(sas[0].transforms) != len(ps) {
		t.Fatalf("%v %v", sas, err)
	}
	for i, tr := range sas[0].transforms {
		if got, life, ok := decodePhase1(tr); !ok || got != ps[i] || life != 86400e9 {
			t.Errorf("phase 1: %v became %v %v %v", ps[i], got, life, ok)
		}
	}
	children, err := ParsePhase2("aes128-sha1,aes192-sha256,aes256-sha384,aes128-sha512,3des-sha1,aes128gcm16,aes192gcm16,aes256gcm16")
	if err != nil {
		t.Fatal(err)
	}
	for _, udp := range []bool{false, true} {
		sas, err = parseSAV1(appendSAV1(encodePhase2(children, 0x12345678, MODP1024, udp, 1800e9)))
		if err != nil || !bytes.Equal(sas[0].spi, be32(0x12345678)) {
			t.Fatalf("%v %v", sas, err)
		}
		for i, tr := range sas[0].transforms {
			got, life, ok := decodePhase2(tr, udp)
			if !ok || !sameAlgorithms(got, children[i]) || got.Group != MODP1024 || life != 1800e9 {
				t.Errorf("phase 2: %v became %v %v %v", children[i], got, life, ok)
			}
			if _, _, ok := decodePhase2(tr, !udp); ok {
				t.Error("the other encapsulation mode was taken")
			}
		}
	}
	ps = append(ps, Proposal{esp.AESGCM, 256, esp.HMACSHA256, ECP256})
	v2, err := parseSAV2(appendSAV2(offerIKE(ps, nil)))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range ps {
		if got, _, ok := chooseIKE([]Proposal{p}, v2); !ok || got != p {
			t.Errorf("IKEv2: %v became %v %v", p, got, ok)
		}
	}
	if _, _, ok := chooseIKE([]Proposal{{esp.AESCBC, 256, esp.HMACSHA512, ECP521}}, v2); ok {
		t.Error("a proposal that was not offered was chosen")
	}
	v2, err = parseSAV2(appendSAV2(offerESP(children, 4711, []Group{ECP256, MODP2048})))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range children {
		got, esn, answer, ok := chooseESP([]Proposal{p}, v2, []Group{MODP2048})
		if !ok || !esn || got.Group != MODP2048 || !sameAlgorithms(got, p) || answer.covers(nil) {
			t.Errorf("IKEv2: %v became %v %v", p, got, ok)
		}
		if _, _, _, ok := chooseESP([]Proposal{p}, v2, nil); ok {
			t.Error("an offer that insists on PFS was taken without")
		}
	}
}

// A transform with an unknown attribute, such as extended sequence numbers, must not be chosen. A
// second lifetime, in kilobytes, is common and ignored.
func TestDecodePhase2_unknownAttributes(t *testing.T) {
	ps, err := ParsePhase2("aes128-sha1")
	if err != nil {
		t.Fatal(err)
	}
	tr := encodePhase2(ps, 4711, MODP1024, false, 1800e9).transforms[0]
	for _, c := range []struct {
		kind, value uint16
		ok          bool
	}{{11, 1, false}, {7, 12, false}, {attr2Group, 14, false}, {attr2Group, 2, true}} {
		x := tr
		x.raw = appendAttribute(bytes.Clone(tr.raw), c.kind, uint32(c.value))
		if _, _, ok := decodePhase2(x, false); ok != c.ok {
			t.Errorf("attribute %d = %d: %v", c.kind, c.value, ok)
		}
	}
	tr.raw = appendAttribute(appendAttribute(tr.raw, attr2LifeType, 2), attr2Life, 4_000_000)
	if _, life, ok := decodePhase2(tr, false); !ok || life != 1800e9 {
		t.Errorf("with kilobytes: %v %v", life, ok)
	}
}

func TestSecret_neverFormatted(t *testing.T) {
	const secret = "correct horse"
	cfg := testConfig(t, fastPhase1, fastPhase2)
	cfg.Local, cfg.Remote = addressA, addressB
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "config", cfg, "secret", cfg.Secret)
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "config", cfg, "secret", cfg.Secret)
	all := fmt.Sprintf("%v %+v %#v %s", cfg, cfg, cfg, cfg.Secret) + fmt.Sprintf("%x %q %d", cfg.Secret, cfg.Secret, cfg.Secret) + log.String()
	for _, s := range []string{secret, hex.EncodeToString([]byte(secret)), "99 111 114", "0x63, 0x6f", "Y29ycmVjd"} {
		if strings.Contains(all, s) {
			t.Errorf("%q in %s", s, all)
		}
	}
}
