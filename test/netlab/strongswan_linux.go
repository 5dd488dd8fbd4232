package netlab

import (
	"fmt"
	"os"
	"testing"
)

// StrongSwan is a guest with Debian's strongSwan for IKE, and ESP by the guest's kernel.
type StrongSwan struct {
	*Guest
	t testing.TB
}

// modulesESP are the modules of ESP, in order of dependence. Not all are required
// (jitterentropy_rng does not load on some processors): canESP tests the result.
var modulesESP = append([]string{
	"crypto/gf128mul", "crypto/hmac", "crypto/sha512_generic", "crypto/jitterentropy_rng", "crypto/drbg",
	"crypto/cbc", "crypto/ctr", "crypto/ghash-generic", "crypto/gcm", "crypto/authenc", "crypto/authencesn", "crypto/seqiv", "crypto/echainiv",
	"net/xfrm/xfrm_algo", "net/ipv4/esp4", "net/xfrm/xfrm_user",
}, ModulesIPIP...)

const strongswanConf = `
charon {
	load = random nonce aes des sha1 sha2 hmac kdf gcm openssl curve25519 kernel-netlink socket-default vici
	threads = 16
	retransmit_timeout = 1
	retransmit_tries = 4
	filelog {
		log {
			path = /tmp/charon.log
			default = 1
			ike = 2
			cfg = 2
			knl = 2
			flush_line = yes
		}
	}
}
`

// canESP tests whether the guest's kernel accepts SAs of the suites that tests negotiate.
// Its error names the first that it rejects.
func (g *Guest) canESP() error {
	_, err := g.Run(`set -e
sa() { ip xfrm state add src 192.0.2.1 dst 192.0.2.2 proto esp spi 0x100 mode transport "$@"; ip xfrm state delete src 192.0.2.1 dst 192.0.2.2 proto esp spi 0x100; }
key() { printf 0x; head -c $1 /dev/zero | od -An -v -tx1 | tr -d ' \n'; }
sa aead 'rfc4106(gcm(aes))' $(key 36) 128
for hash in 'sha1 20 96' 'sha256 32 128' 'sha512 64 256'; do
	set -- $hash
	sa enc 'cbc(aes)' $(key 32) auth-trunc "hmac($1)" $(key $2) $3
done`)
	return err
}

// StartStrongSwan boots a guest as StartGuest does, with an address in CIDR notation, and
// starts strongSwan with that swanctl.conf. It skips the test if strongSwan is not installed
// or the guest's kernel has no ESP.
func StartStrongSwan(t testing.TB, ns *NS, ifname, address, swanctlConf string) *StrongSwan {
	t.Helper()
	for _, need := range []string{"/usr/lib/ipsec/charon", "/usr/sbin/swanctl"} {
		if _, err := os.Stat(need); err != nil {
			t.Skipf("needs %s (packages strongswan-charon, strongswan-swanctl, libstrongswan-standard-plugins, libcharon-extra-plugins)", need)
		}
	}
	s := &StrongSwan{t: t, Guest: StartGuest(t, ns, ifname, GuestOptions{Address: address, Modules: modulesESP})}
	if err := s.canESP(); err != nil {
		t.Skipf("needs ESP in the guest's kernel: %v", err)
	}
	s.MustRun(fmt.Sprintf("cat > /tmp/strongswan.conf <<'E'\n%s\nE\ncat > /tmp/swanctl.conf <<'E'\n%s\nE", strongswanConf, swanctlConf))
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := s.Run("cat /tmp/charon.log | tail -150; ip xfrm state; ip xfrm policy; ip -s link; grep -v 0$ /proc/net/xfrm_stat")
			t.Logf("strongSwan:\n%s", out)
		}
	})
	s.Charon()
	return s
}

// Charon starts the IKE daemon and loads its configuration. It waits for an answer: the
// control socket exists before charon answers on it.
func (s *StrongSwan) Charon() {
	s.t.Helper()
	// OpenSSL uses AVX registers, which the guest loses at a page fault (see noAVX): public
	// values of ecp256 would be wrong.
	s.MustRun(`export STRONGSWAN_CONF=/tmp/strongswan.conf
OPENSSL_ia32cap=0:0 /usr/lib/ipsec/charon >/tmp/charon.out 2>&1 &
until swanctl --stats >/dev/null 2>&1; do kill -0 $! || exit; sleep 0.1; done
swanctl --load-all --file /tmp/swanctl.conf`)
}

// Crash kills the daemon and removes its SAs without notifying the peer, like a crash.
func (s *StrongSwan) Crash() {
	s.t.Helper()
	s.MustRun(`pid=$(cat /run/charon.pid); kill -9 $pid; while grep -sq '^State:.[^Z]' /proc/$pid/status; do sleep 0.02; done
ip xfrm state flush; ip xfrm policy flush; rm -f /run/charon.pid /run/charon.vici`)
}

// Swanctl runs swanctl and returns its output.
func (s *StrongSwan) Swanctl(args string) string {
	s.t.Helper()
	out, err := s.Run("STRONGSWAN_CONF=/tmp/strongswan.conf swanctl " + args)
	if err != nil {
		s.t.Logf("swanctl %s: %v %s", args, err, out)
	}
	return out
}
