package tunnel

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"ipipd/internal/ipsec"
	"ipipd/internal/ipsec/ike"
	"ipipd/keepalive"
)

// IPsec configures encryption. A tunnel is encrypted only if it has a secret; the zero value is an
// unencrypted tunnel.
type IPsec struct {
	// Secret is the pre-shared key. Empty means no key, or the one in SecretFile.
	Secret ike.Secret
	// SecretFile is the path of a file with the pre-shared key, readable by its owner only.
	SecretFile string
	// Exchange is the IKE version and mode; the zero value is RouterOS's, IKEv1 main mode.
	Exchange ike.Mode
	// Phase1 and Phase2 are the proposals in order of preference; nil is package ike's default.
	Phase1, Phase2 []ike.Proposal
	// PFS is the Diffie-Hellman group of phase 2, 0 for none.
	PFS ike.Group
	// Lifetime1 and Lifetime2 are the lifetimes of the IKE SA and the ESP SAs.
	Lifetime1, Lifetime2 time.Duration
	// RemoteID is the peer's expected identity, an IPv4 address or text. "" expects its outer
	// address, or behind a NAT the identity that it presents first.
	RemoteID string
	// DPD is dead peer detection (RFC 3706): interval and retries; zero is off.
	DPD keepalive.Config
}

// defaultIPsec returns RouterOS's defaults.
func defaultIPsec() IPsec {
	return IPsec{
		PFS:       ike.MODP1024,
		Lifetime1: 24 * time.Hour, Lifetime2: 30 * time.Minute,
		DPD: keepalive.Config{Interval: 8 * time.Second, Retries: 4},
	}
}

// Wanted reports whether the tunnel is to be encrypted.
func (p *IPsec) Wanted() bool { return len(p.Secret) > 0 || p.SecretFile != "" }

// secret is Secret or the content of SecretFile; nil if there is neither.
func (p *IPsec) secret() (ike.Secret, error) {
	if p.SecretFile == "" {
		return p.Secret, nil
	}
	secret, err := ipsec.LoadSecret(p.SecretFile)
	if err != nil {
		return nil, fmt.Errorf("ipsec-secret-file: %w", err)
	}
	return secret, nil
}

// config returns the configuration for package ike, without the addresses.
func (p *IPsec) config(secret ike.Secret) ike.Config {
	return ike.Config{
		Secret: secret, Mode: p.Exchange, Phase1: p.Phase1, Phase2: p.Phase2, PFS: p.PFS,
		Lifetime1: p.Lifetime1, Lifetime2: p.Lifetime2,
		DPDInterval: p.DPD.Interval, DPDRetries: p.DPD.Retries,
		RemoteID: p.RemoteID, Remembered: new(ike.Identity), // survives changes of the addresses
	}
}

// validateIPsec rejects contradictory settings, and IPsec settings without a secret: the operator
// would believe the tunnel to be encrypted.
func (c *Config) validateIPsec() error {
	if c.IPsec.Wanted() {
		switch {
		case len(c.IPsec.Secret) > 0 && c.IPsec.SecretFile != "":
			return &ValueError{Property: "ipsec-secret", Hidden: true, Want: "either that or ipsec-secret-file"}
		case c.AllowFastPath == On:
			return &ValueError{Property: "allow-fast-path", Value: "yes", Want: "no with ipsec-secret: the fast path does not encrypt"}
		case c.LocalAddress.IsValid() && c.IPsec.RemoteID == c.LocalAddress.String():
			return &ValueError{Property: "ipsec-remote-id", Value: c.IPsec.RemoteID, Want: "the identity of the other end, not local-address"}
		}
		return nil
	}
	defaults := Config{IPsec: defaultIPsec()}
	for _, p := range ipsecProperties {
		if v := p.Get(c); v != p.Get(&defaults) {
			return &ValueError{Property: "ipsec-secret-file", Missing: true,
				Want: fmt.Sprintf("the secret for %s %q, or no %s: without a secret nothing is encrypted", p.Name, v, p.Name)}
		}
	}
	return nil
}

const remadeSecret = "between a secret and none: no part of an encrypted tunnel can send plain text"

// ipsecProperties are the IPsec properties. In RouterOS the first is of the interface; the others
// correspond to /ip ipsec profile and proposal.
var ipsecProperties = []Property{
	{
		Name: "ipsec-secret", Values: "text", Default: "none", Secret: true, Remade: remadeSecret,
		Help:  "pre-shared key: encrypts the tunnel by IKE and ESP, with remote-address any the same for all remotes; every user of this host can read it here, ipsec-secret-file is better",
		reset: func(c *Config) { c.IPsec.Secret = nil },
		get: func(c *Config) string {
			if len(c.IPsec.Secret) == 0 {
				return ""
			}
			return c.IPsec.Secret.String()
		},
		set: func(c *Config, v string) string {
			c.IPsec.Secret = ike.Secret(v)
			if v == "" || len(v) > ipsec.MaxSecret || strings.ContainsAny(v, "\r\n\x00") {
				return fmt.Sprintf("1 to %d bytes of text on one line", ipsec.MaxSecret)
			}
			return ""
		},
	},
	{
		Name: "ipsec-secret-file", Values: "file", Default: "none", Remade: remadeSecret,
		Help:  "file with the pre-shared key, which nobody but its owner may read (mode 0600)",
		reset: func(c *Config) { c.IPsec.SecretFile = "" },
		get:   func(c *Config) string { return c.IPsec.SecretFile },
		set: func(c *Config, v string) string {
			c.IPsec.SecretFile = v
			if v == "" || strings.ContainsRune(v, 0) {
				return "the path of a file"
			}
			return ""
		},
	},
	{
		Name: "ipsec-exchange", Values: "`main`, `ike2` or `auto`", Default: "main",
		Help:  "version of IKE: main is IKEv1 main mode, as RouterOS does here; auto begins with IKEv2 and takes either",
		Words: []string{"main", "ike2", "auto"},
		get:   func(c *Config) string { return c.IPsec.Exchange.String() },
		set: func(c *Config, v string) string {
			m, err := ike.ParseMode(v)
			if err != nil {
				return "main, ike2 or auto"
			}
			c.IPsec.Exchange = m
			return ""
		},
	},
	{
		Name: "ipsec-remote-id", Values: "IPv4, FQDN or text", Default: "the remote's outer address; behind a NAT what it says first",
		Help:  "identity that the peer has to have in IKE; without it, what a peer behind a NAT says first is kept until the tunnel ends or its IPsec settings change, and by a restart that keeps its SAs; none with remote-address any",
		reset: func(c *Config) { c.IPsec.RemoteID = "" },
		get:   func(c *Config) string { return c.IPsec.RemoteID },
		set: func(c *Config, v string) string {
			c.IPsec.RemoteID = v
			if _, err := netip.ParseAddr(v); err == nil || strings.Trim(v, "0123456789.") == "" {
				_, want := parseUnicast(v, "an IPv4 address, an FQDN or other text of up to 255 bytes")
				return want
			}
			if !utf8.ValidString(v) || strings.ContainsFunc(v, unicode.IsControl) || len(v) > 255 {
				return "an IPv4 address, an FQDN or other text of up to 255 bytes"
			}
			return ""
		},
	},
	{
		Name: "ipsec-phase1", Values: "CIPHER-HASH-GROUP,…", Default: ike.DefaultPhase1,
		Help:  "proposals for IKE itself, the best first; no others are accepted, 3des only if it is named",
		reset: func(c *Config) { c.IPsec.Phase1 = nil },
		get:   func(c *Config) string { return formatProposals(c.IPsec.Phase1, ike.DefaultPhase1) },
		set: func(c *Config, v string) string {
			return parseProposals(&c.IPsec.Phase1, v, ike.ParsePhase1)
		},
	},
	{
		Name: "ipsec-phase2", Values: "CIPHER-HASH or CIPHER,…", Default: ike.DefaultPhase2,
		Help:  "proposals for ESP, the best first; no others are accepted, 3des only if it is named",
		reset: func(c *Config) { c.IPsec.Phase2 = nil },
		get:   func(c *Config) string { return formatProposals(c.IPsec.Phase2, ike.DefaultPhase2) },
		set: func(c *Config, v string) string {
			return parseProposals(&c.IPsec.Phase2, v, ike.ParsePhase2)
		},
	},
	{
		Name: "ipsec-pfs-group", Values: "`none`, modp1024, modp2048, ecp256, …", Default: "modp1024",
		Help:  "Diffie-Hellman group of phase 2; a stronger one of the peer is accepted",
		Words: append([]string{"none"}, ike.GroupNames()...),
		get:   func(c *Config) string { return c.IPsec.PFS.String() },
		set: func(c *Config, v string) string {
			g, err := ike.ParseGroup(v)
			if err != nil {
				return "none, " + strings.Join(ike.GroupNames(), ", ")
			}
			c.IPsec.PFS = g
			return ""
		},
	},
	{
		Name: "ipsec-lifetime", Values: "`1d,30m`, or `30m`", Default: "1d,30m",
		Help: "how long the keys of phase 1 and of phase 2 are used; one time is that of phase 2",
		get: func(c *Config) string {
			return keepalive.FormatTime(c.IPsec.Lifetime1) + "," + keepalive.FormatTime(c.IPsec.Lifetime2)
		},
		set: parseLifetimes,
	},
	{
		Name: "ipsec-dpd", Values: "`8s,4`, `8s` or `off`", Default: "8s,4",
		Help: "dead peer detection: how long the peer's IKE may be silent before it is asked, and how often it is asked",
		get:  func(c *Config) string { return c.IPsec.DPD.String() },
		set: func(c *Config, v string) string {
			if v != "off" && !strings.Contains(v, ",") {
				v += ",4"
			}
			dpd, err := keepalive.Parse(v)
			if err != nil {
				return "off, INTERVAL or INTERVAL,RETRIES, 8s,4"
			}
			c.IPsec.DPD = dpd
			return ""
		},
	},
}

// formatProposals returns ps in the notation that parseProposals takes, or defaults if ps is nil.
func formatProposals(ps []ike.Proposal, defaults string) string {
	if ps == nil {
		return defaults
	}
	words := make([]string, len(ps))
	for i, p := range ps {
		words[i] = p.String()
	}
	return strings.Join(words, ",")
}

func parseProposals(to *[]ike.Proposal, v string, parse func(string) ([]ike.Proposal, error)) (want string) {
	ps, err := parse(v)
	var wrong *ike.ProposalError
	switch {
	case errors.As(err, &wrong):
		return wrong.Want
	case err != nil:
		return err.Error()
	}
	*to = ps
	return ""
}

// The accepted lifetimes. With a shorter one rekeying would never pause.
const (
	minLifetime = 10 * time.Second
	maxLifetime = 30 * 24 * time.Hour
)

func parseLifetimes(c *Config, v string) (want string) {
	want = "PHASE1,PHASE2 or PHASE2, each a time of 10s..30d: 1d,30m"
	first, second, both := strings.Cut(v, ",")
	if !both {
		first, second = "", first
	}
	for _, l := range []struct {
		text string
		to   *time.Duration
	}{{first, &c.IPsec.Lifetime1}, {second, &c.IPsec.Lifetime2}} {
		if l.text == "" && !both {
			continue
		}
		d, ok := keepalive.ParseTime(l.text)
		if !ok || d < minLifetime || d > maxLifetime {
			return want
		}
		*l.to = d
	}
	return ""
}
