package esp

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"ipipd/internal/drop"
	"ipipd/internal/packet"
)

// scapyNames are scapy's names of the integrity algorithms.
var scapyNames = map[Integrity]string{HMACSHA1: "HMAC-SHA1-96", HMACSHA256: "SHA2-256-128", HMACSHA384: "SHA2-384-192", HMACSHA512: "SHA2-512-256"}

// scapyScript takes six arguments per suite, and prints two lines for each: the decrypted
// and the encrypted packet, in hex.
const scapyScript = `
import sys
from scapy.all import IP, ESP, raw
from scapy.layers.ipsec import SecurityAssociation
for at in range(1, len(sys.argv), 6):
    crypt, ck, auth, ak, sealed, plain = sys.argv[at:at+6]
    def sa():
        a = dict(auth_algo=auth, auth_key=bytes.fromhex(ak)) if auth != "-" else {}
        return SecurityAssociation(ESP, spi=0xc0ffee01, crypt_algo=crypt, crypt_key=bytes.fromhex(ck), **a)
    print(raw(sa().decrypt(IP(bytes.fromhex(sealed)))).hex())
    print(raw(sa().encrypt(IP(bytes.fromhex(plain)))).hex())
`

// scapy decrypts what Seal encrypts, and Open decrypts what scapy encrypts.
func TestInboundOpen_interopScapy(t *testing.T) {
	const python = "/usr/bin/python3"
	if out, err := exec.Command(python, "-c", "import scapy.layers.ipsec, cryptography").CombinedOutput(); err != nil {
		t.Skipf("needs python3-scapy: %s", bytes.TrimSpace(out))
	}
	want := datagram(77)
	args := []string{"-c", scapyScript}
	var inbound []*Inbound
	for _, s := range suites {
		o, i := pair(t, Config{Suite: s})
		inbound = append(inbound, i)
		crypt, auth := "AES-CBC", "-"
		switch s.Cipher {
		case AESGCM:
			crypt = "AES-GCM"
		case TripleDESCBC:
			crypt = "3DES"
		}
		if s.Integrity != 0 {
			auth = scapyNames[s.Integrity]
		}
		k := testKeys(s)
		args = append(args, crypt, hex.EncodeToString(k.Encryption), auth, hex.EncodeToString(k.Integrity),
			hex.EncodeToString(sealed(t, o, want).Bytes()), hex.EncodeToString(want))
	}
	out, err := exec.Command(python, args...).CombinedOutput()
	lines := strings.Fields(string(out))
	if err != nil || len(lines) < 2*len(suites) {
		t.Fatalf("%v\n%s", err, out)
	}
	lines = lines[len(lines)-2*len(suites):] // after Python's warnings
	for n, s := range suites {
		if got := unhex(t, lines[2*n]); !bytes.Equal(got, want) {
			t.Errorf("%v: scapy opened\n%x, want\n%x", s, got, want)
		}
		b := packet.New(2000)
		b.Set(unhex(t, lines[2*n+1]))
		if d := inbound[n].Open(b); d != drop.None || !bytes.Equal(b.Bytes(), want) {
			t.Errorf("%v: opening scapy's packet: %v\n%x", s, d, b.Bytes())
		}
	}
}

// tshark decrypts what Seal encrypts, and finds the ICV correct.
func TestOutboundSeal_interopTshark(t *testing.T) {
	tshark, err := exec.LookPath("tshark")
	if err != nil {
		t.Skip("needs tshark")
	}
	if _, err := exec.LookPath("text2pcap"); err != nil {
		t.Skip("needs text2pcap")
	}
	for _, s := range []Suite{{AESCBC, 128, HMACSHA1}, {AESCBC, 256, HMACSHA256}, {AESCBC, 256, HMACSHA512}, {AESGCM, 256, 0}} {
		o, _ := pair(t, Config{Suite: s})
		dir := t.TempDir()
		// The inner packet is one that tshark dissects: IPv4, UDP port 53.
		inner := append(datagram(0), make([]byte, 30)...)
		copy(inner[20:], []byte{0x30, 0x39, 0x00, 0x35, 0, 30, 0, 0})
		finishIPv4(inner, 20, protocolUDP)
		p := append(datagram(0), inner...)
		finishIPv4(p, 20, 4)
		var dump strings.Builder
		for n, v := range sealed(t, o, p).Bytes() {
			if n%16 == 0 {
				fmt.Fprintf(&dump, "\n%06x", n)
			}
			fmt.Fprintf(&dump, " %02x", v)
		}
		text, pcap := filepath.Join(dir, "p.txt"), filepath.Join(dir, "p.pcap")
		if err := os.WriteFile(text, []byte(dump.String()+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("text2pcap", "-l", "101", text, pcap).CombinedOutput(); err != nil {
			t.Fatalf("text2pcap: %v\n%s", err, out)
		}
		k := testKeys(s)
		crypt, auth := "AES-CBC [RFC3602]", map[Integrity]string{HMACSHA1: "HMAC-SHA-1-96 [RFC2404]", HMACSHA256: "HMAC-SHA-256-128 [RFC4868]", HMACSHA512: "HMAC-SHA-512-256 [RFC4868]", 0: "NULL"}[s.Integrity]
		if s.Cipher == AESGCM {
			crypt = "AES-GCM with 16 octet ICV [RFC4106]"
		}
		icvKey := "0x" + hex.EncodeToString(k.Integrity)
		if s.Integrity == 0 {
			icvKey = ""
		}
		sa := fmt.Sprintf(`uat:esp_sa:"IPv4","*","*","0xc0ffee01","%s","0x%x","%s","%s","32-bit"`, crypt, k.Encryption, auth, icvKey)
		run := func(sa string) (string, error) {
			cmd := exec.Command(tshark, "-r", pcap, "-o", "esp.enable_encryption_decode:TRUE", "-o", "esp.enable_authentication_check:TRUE", "-o", sa,
				"-T", "fields", "-e", "esp.icv_good", "-e", "udp.dstport", "-e", "ip.src", "-E", "separator=;")
			cmd.Env = append(os.Environ(), "HOME="+dir)
			out, err := cmd.CombinedOutput()
			return string(out), err
		}
		out, err := run(sa)
		if err != nil && strings.Contains(out, "esp_sa") { // releases before 4.2 have no last column
			out, err = run(strings.TrimSuffix(sa, `,"32-bit"`))
		}
		if err != nil {
			t.Fatalf("tshark: %v\n%s", err, out)
		}
		if !strings.Contains(out, ";53;192.0.2.1,192.0.2.1") || s.Cipher != AESGCM && !strings.Contains(out, "1;53") && !strings.Contains(out, "True;53") {
			t.Errorf("%v: tshark saw %q", s, out)
		}
	}
}
