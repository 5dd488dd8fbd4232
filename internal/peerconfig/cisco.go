package peerconfig

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"ipipd/internal/tunnel"
	"ipipd/keepalive"
)

// cisco returns the configuration for IOS and IOS XE.
func (p *peer) cisco() (string, error) {
	var b strings.Builder
	notes := p.notes
	if p.probe != keepalive.FormEcho {
		notes = append(notes, "keepalive: IOS documents it for GRE only: "+p.echoAdvice())
	}
	if !p.LocalAddress.IsValid() {
		notes = append(notes, "tunnel source: the interface that has the outer address of this router")
	}
	b.WriteString(comments("! ", notes))
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	if p.IPsec.Wanted() {
		p.ciscoCrypto(line)
	}
	number := p.number()
	line("interface Tunnel%d", number)
	line(" description %s", strings.ReplaceAll(p.Name, "?", "_")) // a question mark asks for help
	for i, a := range p.Addresses {
		secondary := ""
		if i > 0 {
			secondary = " secondary"
		}
		line(" ip address %s %s%s", a.Prefix.Addr(), mask(a.Prefix), secondary)
	}
	line(" ip mtu %d", p.mtu)
	switch mss := p.mtu - 40; {
	case !p.ClampTCPMSS:
	case mss < 500 || mss > 1460:
		line(" ! ip tcp adjust-mss %d: IOS takes 500 to 1460", mss)
	default:
		line(" ip tcp adjust-mss %d", mss)
	}
	if p.LocalAddress.IsValid() {
		line(" tunnel source %s", p.LocalAddress)
	} else {
		line(" ! tunnel source INTERFACE")
	}
	line(" tunnel destination %s", p.remote)
	line(" tunnel mode ipip")
	if p.TTL != 0 {
		line(" tunnel ttl %d", p.TTL)
	} else {
		line(" ! ttl=inherit: IOS has a fixed TTL")
	}
	if p.DSCP != tunnel.InheritDSCP {
		line(" tunnel tos %d", p.DSCP<<2)
	}
	if p.DontFragment {
		line(" tunnel path-mtu-discovery")
	}
	for _, a := range p.Addresses {
		if a.Peer.IsValid() {
			line("ip route %s 255.255.255.255 Tunnel%d", a.Peer, number)
		}
	}
	local := "any"
	if p.LocalAddress.IsValid() {
		local = "host " + p.LocalAddress.String()
	}
	line("! in the access list of the outer interface, if it has one:")
	if p.IPsec.Wanted() {
		line("!  permit udp host %s %s eq isakmp", p.remote, local)
		line("!  permit udp host %s %s eq non500-isakmp", p.remote, local)
		line("!  permit esp host %s %s", p.remote, local)
	}
	line("!  permit ipinip host %s %s", p.remote, local)
	return b.String(), nil
}

func mask(prefix netip.Prefix) string { return net.IP(net.CIDRMask(prefix.Bits(), 32)).String() }

// ciscoGroups are the numbers of the groups in IKE (RFC 2409, 3526, 5903).
var ciscoGroups = map[string]int{
	"modp1024": 2, "modp1536": 5, "modp2048": 14, "modp3072": 15, "modp4096": 16, "ecp256": 19, "ecp384": 20, "ecp521": 21,
}

// ciscoCrypto writes phase 1 with the key, phase 2, and a crypto map, in transport mode and for protocol 4 only.
func (p *peer) ciscoCrypto(line func(string, ...any)) {
	key := strings.ReplaceAll(placeholder, " ", "-")
	if text := string(p.IPsec.Secret); p.shown {
		if key = text; strings.ContainsFunc(text, func(c rune) bool { return c <= ' ' || c > '~' || c == '?' }) {
			key = "SECRET"
			line("! the secret has characters in it that IOS does not take in a key: want another at both ends")
		}
	}
	ike2 := p.get("ipsec-exchange") == "ike2"
	cipher, hash, group, ok := ciscoPhase1(p.get("ipsec-phase1"), ike2)
	if !ok {
		line("! ipsec-phase1: none of %s is IOS's: the next lines are a guess", p.get("ipsec-phase1"))
	}
	if ike2 {
		line("crypto ikev2 proposal %s", p.ident())
		line(" encryption %s", cipher)
		if strings.Contains(cipher, "gcm") {
			line(" prf %s", hash)
		} else {
			line(" integrity %s", hash)
		}
		line(" group %d", group)
		line("crypto ikev2 policy %s", p.ident())
		line(" proposal %s", p.ident())
		line("crypto ikev2 keyring %s", p.ident())
		line(" peer %s", p.ident())
		line("  address %s", p.remote)
		line("  pre-shared-key %s", key)
		line("crypto ikev2 profile %s", p.ident())
		line(" match identity remote address %s 255.255.255.255", p.remote)
		line(" authentication remote pre-share")
		line(" authentication local pre-share")
		line(" keyring local %s", p.ident())
		line(" lifetime %d", int(p.IPsec.Lifetime1.Seconds()))
	} else {
		line("crypto isakmp policy 10")
		line(" encryption %s", cipher)
		line(" hash %s", hash)
		line(" authentication pre-share")
		line(" group %d", group)
		line(" lifetime %d", int(p.IPsec.Lifetime1.Seconds()))
		line("crypto isakmp key %s address %s", key, p.remote)
		if dpd := p.IPsec.DPD; dpd != (keepalive.Config{}) {
			line("crypto isakmp keepalive %d", max(10, int(dpd.Interval.Seconds())))
		}
	}
	transform, ok := ciscoPhase2(p.get("ipsec-phase2"))
	if !ok {
		line("! ipsec-phase2: none of %s is IOS's: the next lines are a guess", p.get("ipsec-phase2"))
	}
	line("crypto ipsec transform-set %s %s", p.ident(), transform)
	line(" mode transport")
	local := "any"
	if p.LocalAddress.IsValid() {
		local = "host " + p.LocalAddress.String()
	}
	line("ip access-list extended %s", p.ident())
	line(" permit ipinip %s host %s", local, p.remote)
	line("crypto map %s 10 ipsec-isakmp", p.ident())
	line(" set peer %s", p.remote)
	line(" set transform-set %s", p.ident())
	if n, known := ciscoGroups[p.get("ipsec-pfs-group")]; known {
		line(" set pfs group%d", n)
	} else if group := p.get("ipsec-pfs-group"); group != "none" {
		line(" ! ipsec-pfs-group=%s: IOS has no such group", group)
	}
	if ike2 {
		line(" set ikev2-profile %s", p.ident())
	}
	line(" set security-association lifetime seconds %d", max(120, int(p.IPsec.Lifetime2.Seconds())))
	line(" match address %s", p.ident())
	line("! the interface that the outer packets leave by gets: crypto map %s", p.ident())
}

// ciscoPhase1 returns the first of the proposals that IOS has, whose IKEv1 has no AEAD; not ok: it has none.
func ciscoPhase1(proposals string, ike2 bool) (cipher, hash string, group int, ok bool) {
	for proposal := range strings.SplitSeq(proposals, ",") {
		words := strings.Split(proposal, "-")
		if len(words) != 3 {
			continue
		}
		bits := strings.TrimSuffix(strings.TrimPrefix(words[0], "aes"), "gcm16")
		switch gcm := strings.HasSuffix(words[0], "gcm16"); {
		case gcm && (!ike2 || bits == "192"):
			continue
		case gcm:
			cipher = "aes-gcm-" + bits
		case words[0] == "3des":
			cipher = "3des"
		case ike2:
			cipher = "aes-cbc-" + bits
		default:
			cipher = "aes " + bits
		}
		hash = words[1]
		if !ike2 && hash == "sha1" {
			hash = "sha"
		}
		if group, ok = ciscoGroups[words[2]]; ok {
			return cipher, hash, group, true
		}
	}
	if ike2 {
		return "aes-cbc-256", "sha256", 19, false
	}
	return "aes 256", "sha256", 19, false
}

// ciscoPhase2 returns the first of the proposals that IOS has; not ok: it has none.
func ciscoPhase2(proposals string) (transform string, ok bool) {
	for proposal := range strings.SplitSeq(proposals, ",") {
		cipher, hash, _ := strings.Cut(proposal, "-")
		bits := strings.TrimSuffix(strings.TrimPrefix(cipher, "aes"), "gcm16")
		hash = map[string]string{"sha1": "esp-sha-hmac", "sha256": "esp-sha256-hmac", "sha384": "esp-sha384-hmac", "sha512": "esp-sha512-hmac"}[hash]
		switch {
		case strings.HasSuffix(cipher, "gcm16"):
			return "esp-gcm " + bits, true
		case hash == "":
		case cipher == "3des":
			return "esp-3des " + hash, true
		default:
			return "esp-aes " + bits + " " + hash, true
		}
	}
	return "esp-aes 256 esp-sha-hmac", false
}

// number returns the number at the end of the tunnel's name, or 1.
func (p *peer) number() uint64 {
	n, err := strconv.ParseUint(p.Name[len(strings.TrimRight(p.Name, "0123456789")):], 10, 31)
	if err != nil {
		return 1
	}
	return n
}
