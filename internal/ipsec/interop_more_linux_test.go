package ipsec

import (
	"strings"
	"testing"
	"time"

	"ipipd/internal/ipsec/esp"
	"ipipd/internal/ipsec/ike"
	"ipipd/test/netlab"
)

// TestSession_interopStrongSwanRekey has both ends rekey every few seconds.
func TestSession_interopStrongSwanRekey(t *testing.T) {
	t.Parallel()
	for _, c := range []peering{peerings[0], peerings[3]} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			cfg := ikeConfig(c.mode)
			cfg.Lifetime2, cfg.Lifetime1 = netlab.Slower(8*time.Second), netlab.Slower(25*time.Second)
			lifetime := func(seconds time.Duration) string { return netlab.Seconds(netlab.Slower(seconds*time.Second)) + "s" }
			// On a busy machine strongSwan now and then does not know yet of what we
			// answer to, and drops it. By default its SA of IKE ends before it has asked
			// again, and it takes the one that follows for the first.
			e, _, wire := lab(t, conf(c.version, c.phase1, "reauth_time = 0\nrekey_time = "+lifetime(14)+"\nover_time = "+lifetime(10), c.phase2, "none",
				"rekey_time = "+lifetime(5)+"\nlife_time = "+lifetime(15)+"\nrand_time = 1s", testSecret))
			if err := e.protect(cfg); err != nil {
				t.Fatal(err)
			}
			netlab.Eventually(t, "the gate is open", e.session.Established)
			e.waitForEcho("the peer has the SA too")
			spis := map[uint32]bool{}
			sent, answered := 0, 0
			for begin := time.Now(); time.Since(begin) < netlab.Slower(32*time.Second); {
				answered += e.pings(100, 5*time.Millisecond)
				sent += 100
				spis[e.session.Status().OutboundSPI] = true
			}
			t.Logf("%d of %d pings answered over %d SAs", answered, sent, len(spis))
			if answered != sent || len(spis) < 4 {
				t.Error("packets were lost, or there was no rekey")
			}
			checkNoCleartext(t, wire())
			checkNoDrops(t, e)
		})
	}
}

func TestSession_interopStrongSwanWrongSecret(t *testing.T) {
	t.Parallel()
	for _, c := range []peering{peerings[0], peerings[3]} {
		for _, who := range []string{"we", "they"} {
			t.Run(c.name+"/"+who+"-begin", func(t *testing.T) {
				t.Parallel()
				cfg := ikeConfig(c.mode)
				cfg.Passive = who == "they"
				e, s, wire := lab(t, conf(c.version, c.phase1, "", c.phase2, "none", "", "another secret"))
				if err := e.protect(cfg); err != nil {
					t.Fatal(err)
				}
				if who == "they" {
					s.Swanctl("--initiate --child ipip --timeout 3")
				}
				netlab.Eventually(t, "the reason is named", func() bool { return strings.Contains(e.session.Status().Problem, "secret") })
				for range 20 {
					if d := e.send(e.ping(1, 100)); d != esp.DropNoSA {
						t.Errorf("send: %v", d)
					}
				}
				t.Log(e.session.Status().Describe(time.Now()))
				if n := strings.Count(e.log.String(), "warning=true"); n > 3 {
					t.Errorf("%d lines in the log:\n%s", n, e.log.String())
				}
				checkNoCleartext(t, wire())
			})
		}
	}
}

func TestSession_interopStrongSwanNoCommonProposal(t *testing.T) {
	t.Parallel()
	for _, c := range []peering{
		{"IKEv1-phase1", "1", ike.Main, "aes192-sha384-modp4096", "aes128-sha1-modp1024", "", false},
		{"IKEv1-phase2", "1", ike.Main, "aes128-sha1-modp2048", "aes192-sha384-modp1024", "", false},
		{"IKEv2-phase1", "2", ike.IKE2, "aes192-sha384-modp4096", "aes128-sha1-modp1024", "", false},
		{"IKEv2-phase2", "2", ike.IKE2, "aes128-sha1-modp2048", "aes192-sha384", "", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			e, _, _ := lab(t, conf(c.version, c.phase1, "", c.phase2, "none", "", testSecret))
			if err := e.protect(ikeConfig(c.mode)); err != nil {
				t.Fatal(err)
			}
			netlab.Eventually(t, "the reason is named", func() bool { return strings.Contains(e.session.Status().Problem, "no common proposal") })
			t.Log(e.session.Status().Describe(time.Now()))
			if e.session.Established() {
				t.Error("the gate is open")
			}
		})
	}
}

// TestSession_interopStrongSwanRestart: the peer loses its memory, and the tunnel is
// there again without anybody doing anything.
func TestSession_interopStrongSwanRestart(t *testing.T) {
	t.Parallel()
	for _, c := range []peering{peerings[0], peerings[3]} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			e, s, wire := lab(t, conf(c.version, c.phase1, "", c.phase2, "none", "", testSecret))
			cfg := ikeConfig(c.mode) // DPD after 2 s, three times
			if err := e.protect(cfg); err != nil {
				t.Fatal(err)
			}
			netlab.Eventually(t, "the gate is open", e.session.Established)
			e.waitForEcho("the peer has the SA too")
			s.Die()
			s.Charon()
			for range 30 {
				e.send(e.ping(1, 100))
				time.Sleep(20 * time.Millisecond)
			}
			e.waitForEcho("the tunnel is there again")
			checkNoCleartext(t, wire())
		})
	}
}

// TestSession_interopStrongSwanSimultaneousInitiation, as two routers do that have just been
// configured alike.
func TestSession_interopStrongSwanSimultaneousInitiation(t *testing.T) {
	t.Parallel()
	for _, c := range []peering{peerings[0], peerings[3]} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			e, s, wire := lab(t, conf(c.version, c.phase1, "", c.phase2, "none", "", testSecret))
			done := make(chan string)
			go func() { done <- s.Swanctl("--initiate --child ipip --timeout 20") }()
			time.Sleep(150 * time.Millisecond)
			if err := e.protect(ikeConfig(c.mode)); err != nil {
				t.Fatal(err)
			}
			<-done
			netlab.Eventually(t, "the gate is open", e.session.Established)
			e.waitForEcho("the peer has the SA too")
			for range 4 { // in which the one that is too many may go
				if got := e.pings(100, 5*time.Millisecond); got != 100 {
					t.Errorf("%d of 100 pings answered", got)
				}
				time.Sleep(2 * time.Second)
			}
			checkNoCleartext(t, wire())
		})
	}
}

// TestSession_interopStrongSwanNAT: we are behind a NAT that gives every UDP port
// another number, and takes no ESP.
func TestSession_interopStrongSwanNAT(t *testing.T) {
	t.Parallel()
	for _, c := range []peering{peerings[0], peerings[3]} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			ours, nat, wire := netlab.New(t), netlab.New(t), netlab.New(t)
			netlab.Veth(t, ours, nat, netlab.End{Name: "u0", Address: "10.0.0.2/24"}, netlab.End{Name: "in0", Address: "10.0.0.1/24"})
			netlab.Veth(t, nat, wire, netlab.End{Name: "out0", Address: "192.0.2.1/24"}, netlab.End{Name: "guest0"})
			ours.Run("ip", "route", "add", "default", "via", "10.0.0.1")
			nat.Sysctl("net.ipv4.ip_forward", "1")
			if out, err := nat.Try("nft", `add table ip n; add chain ip n post { type nat hook postrouting priority 100; };
				add rule ip n post oifname "out0" ip protocol udp masquerade to :20000-30000;
				add chain ip n through { type filter hook forward priority 0; };
				add rule ip n through ip protocol { 4, 50 } drop`); err != nil {
				t.Skipf("needs nft with NAT: %s", out)
			}
			text := strings.Replace(conf(c.version, c.phase1, "", c.phase2, "none", "", testSecret), "id = 192.0.2.1 }", "id = %any }", 1)
			text = strings.Replace(text, "id-1 = 192.0.2.1", "id-1 = 10.0.0.2", 1)
			s := startStrongSwan(t, wire, "guest0", text)
			e := newEndpoint(t, ours, addressInside, addressB)
			captured := capture(t, ours)
			if err := e.protect(ikeConfig(c.mode)); err != nil {
				t.Fatal(err)
			}
			netlab.Eventually(t, "the gate is open", e.session.Established)
			t.Log(e.session.Status().Describe(time.Now()))
			if !e.session.Status().UDP {
				t.Fatal("not in UDP")
			}
			e.waitForEcho("the peer has the SA too")
			if got := e.pings(100, 2*time.Millisecond); got != 100 {
				t.Errorf("%d of 100 pings answered", got)
			}
			_ = s
			checkNoCleartext(t, captured())
			checkNoDrops(t, e)
		})
	}
}
