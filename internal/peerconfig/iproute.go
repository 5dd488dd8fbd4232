package peerconfig

import (
	"encoding/hex"
	"fmt"
	"net/netip"
	"strings"

	"ipipd/internal/tunnel"
	"ipipd/keepalive"
)

// linux returns a script for iproute2, with swanctl.conf if the tunnel is encrypted.
func (p *peer) linux() (string, error) {
	name := p.ident()
	var b strings.Builder
	b.WriteString(comments("# ", p.linuxNotes()))
	if p.IPsec.Wanted() { // first, or the tunnel would send in the clear
		file := "/etc/swanctl/conf.d/" + p.ident() + ".conf"
		b.WriteString("(umask 077; cat >" + file + ") <<'END'\n" + p.swanctl() + "END\nswanctl --load-all && ")
	}
	fmt.Fprintf(&b, "ip tunnel add %s mode ipip local %s remote %s ttl %s tos %s", name, orAny(p.LocalAddress), p.remote, p.ttl(), p.tos())
	if p.TTL == 0 {
		b.WriteString(" nopmtudisc")
	}
	b.WriteByte('\n')
	for _, a := range p.Addresses {
		if a.Peer.IsValid() {
			fmt.Fprintf(&b, "ip address add %s peer %s dev %s\n", a.Prefix.Addr(), a.Peer, name)
		} else {
			fmt.Fprintf(&b, "ip address add %s dev %s\n", a.Prefix, name)
		}
	}
	if p.MTU != 0 || p.IPsec.Wanted() { // the kernel's own choice leaves no room for ESP
		fmt.Fprintf(&b, "ip link set %s mtu %d\n", name, p.mtu)
	}
	fmt.Fprintf(&b, "ip link set %s up\n", name)
	b.WriteString(p.nftClamp())
	b.WriteString(comments("# ", p.linuxKeepalive()))
	b.WriteString(comments("# ", p.nftInput()))
	return b.String(), nil
}

// networkd returns a .netdev and a .network of systemd-networkd.
func (p *peer) networkd() (string, error) {
	name := p.ident()
	var b strings.Builder
	b.WriteString(comments("# ", p.linuxNotes()))
	fmt.Fprintf(&b, "# /etc/systemd/network/25-%s.netdev\n[NetDev]\nName=%[1]s\nKind=ipip\n", name)
	if p.MTU != 0 || p.IPsec.Wanted() {
		fmt.Fprintf(&b, "MTUBytes=%d\n", p.mtu)
	}
	fmt.Fprintf(&b, "\n[Tunnel]\nIndependent=yes\nLocal=%s\nRemote=%s\nTTL=%d\n", orAny(p.LocalAddress), p.remote, p.TTL)
	if p.DSCP == tunnel.InheritDSCP {
		b.WriteString("# 1 is inherit\nTOS=1\n")
	} else {
		fmt.Fprintf(&b, "TOS=%d\n", p.DSCP<<2)
	}
	if p.TTL == 0 {
		b.WriteString("DiscoverPathMTU=no\n")
	}
	fmt.Fprintf(&b, "\n# /etc/systemd/network/25-%s.network\n[Match]\nName=%[1]s\n", name)
	b.WriteString("\n[Network]\nLinkLocalAddressing=no\n")
	for _, a := range p.Addresses {
		fmt.Fprintf(&b, "\n[Address]\nAddress=%s\n", a.Prefix)
		if a.Peer.IsValid() {
			fmt.Fprintf(&b, "Peer=%s/32\n", a.Peer)
		}
	}
	var more []string
	if clamp := p.nftClamp(); clamp != "" {
		more = append(more, "to clamp the MSS, by nftables:")
		for line := range strings.Lines(clamp) {
			more = append(more, strings.TrimSpace(line))
		}
	}
	more = append(more, p.linuxKeepalive()...)
	more = append(more, p.nftInput()...)
	if p.IPsec.Wanted() {
		more = append(more, "in /etc/swanctl/conf.d/"+p.ident()+".conf, loaded before networkd makes the tunnel:")
		for line := range strings.Lines(p.swanctl()) {
			more = append(more, "  "+strings.TrimRight(line, "\n"))
		}
	}
	b.WriteString("\n" + comments("# ", more))
	return b.String(), nil
}

func orAny(a netip.Addr) string {
	if !a.IsValid() {
		return "any"
	}
	return a.String()
}

func (p *peer) ttl() string {
	if p.TTL == 0 {
		return "inherit"
	}
	return fmt.Sprint(p.TTL)
}

// tos returns the TOS byte in hexadecimal, as iproute2 reads it, whose default is 0, not inherit.
func (p *peer) tos() string {
	if p.DSCP == tunnel.InheritDSCP {
		return "inherit"
	}
	return fmt.Sprintf("%02x", p.DSCP<<2)
}

// linuxNotes returns the notes of p, and others where the Linux kernel differs.
func (p *peer) linuxNotes() []string {
	notes := p.notes
	switch {
	case p.TTL != 0:
		notes = append(notes, "dont-fragment="+p.get("dont-fragment")+": with a fixed TTL Linux sets DF; ttl inherit nopmtudisc copies that of the inner packet")
	case !p.DontFragment:
		notes = append(notes, "dont-fragment=no: Linux copies DF with nopmtudisc")
	}
	return notes
}

// linuxKeepalive says what to do about the keepalive: the kernel's tunnels send no probes, and drop a reflect probe,
// whose source is their own address.
func (p *peer) linuxKeepalive() []string {
	lines := []string{"keepalive: Linux has none: its interface stays up"}
	switch conf := "net/ipv4/conf/" + p.ident(); p.probe {
	case keepalive.FormReflect:
		lines = append(lines, p.echoAdvice(), "or there, so that it answers this end's probes,",
			"  sysctl -w net/ipv4/ip_forward=1 "+conf+"/accept_local=1 "+conf+"/rp_filter=2")
	case keepalive.FormEmpty:
		lines = append(lines, p.echoAdvice())
	}
	return lines
}

// nftClamp returns commands that clamp the MSS of TCP that is received through the tunnel and forwarded.
func (p *peer) nftClamp() string {
	if !p.ClampTCPMSS {
		return ""
	}
	rule := fmt.Sprintf("add rule ip ipip clamp iifname %q tcp flags syn tcp option maxseg size > %d tcp option maxseg size set %d",
		p.ident(), p.mtu-40, p.mtu-40)
	return "nft add table ip ipip\n" +
		"nft " + shell("add chain ip ipip clamp { type filter hook forward priority mangle; }") + "\n" +
		"nft " + shell(rule) + "\n"
}

// nftInput returns commands that let the outer packets in, for a host with a firewall.
func (p *peer) nftInput() []string {
	input := "  nft add rule inet filter input ip saddr " + p.remote.String()
	if p.IPsec.Wanted() {
		return []string{"firewall:", input + " udp dport '{ 500, 4500 }' accept", input + " ip protocol 50 accept", input + " meta ipsec exists ip protocol 4 accept"}
	}
	return []string{"firewall:", input + " ip protocol 4 accept"}
}

// swanctl returns a swanctl.conf, in transport mode and for protocol 4 only.
func (p *peer) swanctl() string {
	get := p.get
	version := map[string]string{"main": "1", "ike2": "2", "auto": "0"}[get("ipsec-exchange")]
	var b strings.Builder
	line := func(indent int, format string, args ...any) {
		b.WriteString(strings.Repeat("  ", indent) + fmt.Sprintf(format, args...) + "\n")
	}
	identity := func(fallback netip.Addr) string {
		if fallback.IsValid() {
			return fallback.String()
		}
		return "%any"
	}
	local := identity(p.LocalAddress)
	if p.identity != "" {
		local = swanctlQuote(p.identity)
	}
	line(0, "connections {")
	line(1, "%s {", p.ident())
	line(2, "version = %s", version)
	if p.LocalAddress.IsValid() {
		line(2, "local_addrs = %s", p.LocalAddress)
	}
	line(2, "remote_addrs = %s", p.remote)
	line(2, "proposals = %s", strings.Join(swanctlPhase1(get("ipsec-phase1")), ","))
	line(2, "rekey_time = %ds", int(p.IPsec.Lifetime1.Seconds()))
	if p.IPsec.DPD.Interval > 0 {
		line(2, "dpd_delay = %ds", int(p.IPsec.DPD.Interval.Seconds()))
	}
	if local == "%any" {
		line(2, "local  { auth = psk }")
	} else {
		line(2, "local  { auth = psk\n             id = %s }", local)
	}
	line(2, "remote { auth = psk\n             id = %s }", p.remote)
	line(2, "children {")
	line(3, "ipip {")
	line(4, "mode = transport")
	line(4, "local_ts = dynamic[4]")
	line(4, "remote_ts = dynamic[4]")
	line(4, "esp_proposals = %s", strings.Join(swanctlPhase2(get("ipsec-phase2"), get("ipsec-pfs-group")), ","))
	line(4, "rekey_time = %ds", int(p.IPsec.Lifetime2.Seconds()))
	line(4, "# start would have the kernel send in the clear whenever there is no SA")
	line(4, "start_action = trap")
	line(3, "}")
	line(2, "}")
	line(1, "}")
	line(0, "}")
	line(0, "secrets {")
	line(1, "ike-%s { id-1 = %s", p.ident(), p.remote)
	if local != "%any" {
		line(1, "            id-2 = %s", local)
	}
	line(1, "            secret = %s }", swanctlSecret(p.IPsec.Secret))
	line(0, "}")
	return b.String()
}

// get returns a property's value in the notation of its flag.
func (p *peer) get(name string) string {
	for _, property := range tunnel.Properties() {
		if property.Name == name {
			return property.Get(&p.Config)
		}
	}
	return ""
}

// swanctlPhase1 returns proposals as strongSwan writes them: with an AEAD a PRF stands in place of the integrity.
func swanctlPhase1(proposals string) (out []string) {
	for proposal := range strings.SplitSeq(proposals, ",") {
		if strings.Contains(proposal, "gcm") {
			proposal = strings.Replace(proposal, "-sha", "-prfsha", 1)
		}
		out = append(out, proposal)
	}
	return out
}

func swanctlPhase2(proposals, group string) (out []string) {
	for proposal := range strings.SplitSeq(proposals, ",") {
		if group != "none" {
			proposal += "-" + group
		}
		out = append(out, proposal)
	}
	return out
}

func swanctlQuote(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(s) + `"`
}

// swanctlSecret returns a secret in quotes, or in hexadecimal if strongSwan would take the text for something else.
func swanctlSecret(secret []byte) string {
	text := string(secret)
	if strings.HasPrefix(text, "0x") || strings.HasPrefix(text, "0s") || strings.ContainsFunc(text, func(c rune) bool { return c < ' ' || c > '~' }) {
		return "0x" + hex.EncodeToString(secret)
	}
	return swanctlQuote(text)
}

// shell quotes word for a POSIX shell, if it has to be.
func shell(word string) string {
	if word != "" && !strings.ContainsFunc(word, func(c rune) bool {
		return !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.ContainsRune("-._/:=", c))
	}) {
		return word
	}
	return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'"
}
