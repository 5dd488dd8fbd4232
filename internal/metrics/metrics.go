// Package metrics serves what a process and its tunnels count, to Prometheus and whatever else
// reads its text format: https://prometheus.io/docs/instrumenting/exposition_formats.
//
// A scrape takes one Snapshot, and makes the metrics of it anew: so the series of a tunnel end with the
// tunnel, and nothing is counted a second time. An address is no label of a counter, which would begin
// anew with each address: join them from ipipd_tunnel_info.
//
// The metrics are made without prometheus.Registry, which takes eight times as long for the 45 series of
// each of 1,000 tunnels. What it would check, a test does. The library makes the metrics of the Go runtime
// and of the operating system's process.
//
// It has neither passwords nor TLS: it is for a loopback address, a unix socket or a trusted network.
package metrics

import (
	"runtime"
	"time"

	"ipipd/internal/drop"
	"ipipd/internal/sandbox"
	"ipipd/internal/tunnel"
)

// Snapshot is what metrics are made of.
type Snapshot struct {
	tunnel.Samples
	// ReloadFailed: the last reload failed, or was undone. ReloadedAt is the time of the last that was done, or
	// of the start.
	ReloadFailed bool
	ReloadedAt   time.Time
	// Sandbox is what the process is confined by.
	Sandbox sandbox.State
}

// family is a metric: what its series have in common.
type family struct {
	name, help string
	counter    bool     // else a gauge
	labels     []string // besides tunnel
}

// processFamily is a family of the process with one series.
type processFamily struct {
	family
	value func(*Snapshot) float64
}

// tunnelFamily is a family with at most one series for each tunnel, labeled with its name.
type tunnelFamily struct {
	family
	// value returns false if there is no series: the tunnel is not started, or the metric does not apply to it.
	value func(*tunnel.Sample) (float64, bool)
}

var (
	buildInfo      = family{name: "ipipd_build_info", help: "1: the version of ipipd, and the Go that built it", labels: []string{"version", "goversion"}}
	sandboxInfo    = family{name: "ipipd_sandbox_info", help: "1: what the process is confined by: docs/security.md; landlock_abi is 0 without Landlock, capabilities are those that are left", labels: []string{"mode", "landlock_abi", "seccomp", "no_new_privs", "capabilities"}}
	tunnelInfo     = family{name: "ipipd_tunnel_info", help: "1: what a tunnel is called, and its outer addresses now; those configured while it is not started", labels: []string{"interface", "local_address", "remote_address", "comment"}}
	tunnelDrops    = family{name: "ipipd_tunnel_dropped_packets_total", help: "packets that went no further, by reason: docs/drops.md", counter: true, labels: []string{"direction", "reason"}}
	tunnelMessages = family{name: "ipipd_tunnel_dropped_icmp_messages_total", help: "ICMP errors about its packets that were not sent, or not believed, by reason", counter: true, labels: []string{"reason"}}
	tunnelWarnings = family{name: "ipipd_tunnel_warning", help: "1: a warning that is active: docs/warnings.md; no series else", labels: []string{"code", "severity"}}
	drops          = family{name: "ipipd_dropped_packets_total", help: "received packets that went no further and belong to no tunnel, by reason: docs/drops.md", counter: true, labels: []string{"reason"}}
	messages       = family{name: "ipipd_dropped_icmp_messages_total", help: "ICMP errors that belong to no tunnel and went no further, by reason", counter: true, labels: []string{"reason"}}
)

var processFamilies = []processFamily{
	{gauge("ipipd_config_last_reload_successful", "1 if the last reload was done, 0 if it was refused, or undone; 1 before the first"),
		func(s *Snapshot) float64 { return number(!s.ReloadFailed) }},
	{gauge("ipipd_config_last_reload_success_timestamp_seconds", "time of the last reload that was done, or of the start"),
		func(s *Snapshot) float64 { return seconds(s.ReloadedAt) }},
}

var tunnelFamilies = []tunnelFamily{
	{gauge("ipipd_tunnel_running", "1 if the interface has its carrier: the peer is heard (or keepalive is off), the local address is there, and an SA if it is encrypted"),
		func(s *tunnel.Sample) (float64, bool) { return number(s.Running), true }},
	{gauge("ipipd_tunnel_disabled", "1 if it is not started, or somebody has set its interface down"),
		func(s *tunnel.Sample) (float64, bool) { return number(s.Disabled), true }},
	{gauge("ipipd_tunnel_waiting", "1 if it cannot send yet: its local address, underlay device, route or the address of a name is missing"),
		func(s *tunnel.Sample) (float64, bool) { return number(s.WaitingFor != ""), s.Started }},
	{counter("ipipd_tunnel_state_changes_total", "how often the carrier has come or gone"),
		func(s *tunnel.Sample) (float64, bool) { return float64(s.StateChanges), s.Started }},
	{counter("ipipd_tunnel_receive_packets_total", "inner packets received, in userspace and by the fast path; those of a superpacket each"),
		func(s *tunnel.Sample) (float64, bool) { return float64(s.RxPackets), s.Started }},
	{counter("ipipd_tunnel_receive_bytes_total", "bytes of the inner packets received, IPv4 header included"),
		func(s *tunnel.Sample) (float64, bool) { return float64(s.RxBytes), s.Started }},
	{counter("ipipd_tunnel_transmit_packets_total", "inner packets sent, in userspace and by the fast path; those of a superpacket each"),
		func(s *tunnel.Sample) (float64, bool) { return float64(s.TxPackets), s.Started }},
	{counter("ipipd_tunnel_transmit_bytes_total", "bytes of the inner packets sent, IPv4 header included"),
		func(s *tunnel.Sample) (float64, bool) { return float64(s.TxBytes), s.Started }},
	{gauge("ipipd_tunnel_last_heard_timestamp_seconds", "time of the peer's last packet; 0 is never"),
		func(s *tunnel.Sample) (float64, bool) { return seconds(s.LastHeard), s.Started }},
	{counter("ipipd_tunnel_keepalive_probes_sent_total", "probes of the keepalive that were due"),
		func(s *tunnel.Sample) (float64, bool) { return float64(s.ProbesSent), s.Started }},
	{counter("ipipd_tunnel_keepalive_probes_answered_total", "probes of the keepalive that were answered; no series with keepalive-probe empty"),
		func(s *tunnel.Sample) (float64, bool) {
			return float64(s.ProbesAnswered), s.Started && s.ProbesHaveAnswers
		}},
	{gauge("ipipd_tunnel_keepalive_round_trip_seconds", "time from the last probe that was answered to its answer; no series before the first"),
		func(s *tunnel.Sample) (float64, bool) {
			return s.RoundTrip.Seconds(), s.Started && s.ProbesHaveAnswers && s.RoundTrip > 0
		}},
	{gauge("ipipd_tunnel_mtu_bytes", "MTU of the interface: the largest inner packet"),
		func(s *tunnel.Sample) (float64, bool) { return float64(s.MTU), s.Started }},
	{gauge("ipipd_tunnel_path_mtu_bytes", "path MTU to the remote, for outer packets; no series while it is unknown"),
		func(s *tunnel.Sample) (float64, bool) { return float64(s.PathMTU), s.Started && s.PathMTU > 0 }},
	{gauge("ipipd_tunnel_remotes", "gateways of the routes of an interface with many remotes; no series of another one"),
		func(s *tunnel.Sample) (float64, bool) { return float64(remotesOf(s).Count), s.Remotes != nil }},
	{gauge("ipipd_tunnel_remotes_not_ok", "of these, those that an ICMP error has called unreachable, or that no route leads to"),
		func(s *tunnel.Sample) (float64, bool) { return float64(remotesOf(s).NotOK), s.Remotes != nil }},
	{gauge("ipipd_tunnel_remotes_omitted", "of these, those beyond metrics-remotes, which have no series of their own; no series without metrics-remotes"),
		func(s *tunnel.Sample) (float64, bool) {
			r := remotesOf(s)
			return float64(r.Count - len(r.List)), r.List != nil
		}},
	{gauge("ipipd_tunnel_prefixes", "prefixes that an interface with many remotes has routes for"),
		func(s *tunnel.Sample) (float64, bool) { return float64(remotesOf(s).Prefixes), s.Remotes != nil }},
	{gauge("ipipd_tunnel_fast_path_active", "1 if the kernel carries plain packets by eBPF; these are not in the counters of the interface"),
		func(s *tunnel.Sample) (float64, bool) { return number(s.FastPath), s.Started }},
	{gauge("ipipd_tunnel_ipsec_established", "1 if there is an SA to send by; no series without ipsec-secret"),
		func(s *tunnel.Sample) (float64, bool) { return number(s.Established), s.Encrypted }},
	{counter("ipipd_tunnel_ipsec_sas_total", "pairs of ESP SAs that were established: the first, and one by each rekeying"),
		func(s *tunnel.Sample) (float64, bool) { return float64(s.SAs), s.Encrypted }},
	{gauge("ipipd_tunnel_ipsec_established_timestamp_seconds", "time when the SA in use was established"),
		func(s *tunnel.Sample) (float64, bool) { return seconds(s.Since), s.Established && !s.Since.IsZero() }},
	{gauge("ipipd_tunnel_ipsec_rekey_timestamp_seconds", "time when the SA in use is to be replaced"),
		func(s *tunnel.Sample) (float64, bool) {
			return seconds(s.RekeyAt), s.Established && !s.RekeyAt.IsZero()
		}},
	{gauge("ipipd_tunnel_ipsec_remotes", "remotes with an SA; no series but with remote-address any and ipsec-secret"),
		func(s *tunnel.Sample) (float64, bool) {
			if s.IPsecRemotes == nil {
				return 0, false
			}
			return float64(*s.IPsecRemotes), true
		}},
}

// remoteFamily is a family with a series for each remote of a tunnel with many, if metrics-remotes asks for it.
type remoteFamily struct {
	family
	value func(*tunnel.Remote) (float64, bool)
}

var remoteFamilies = []remoteFamily{
	{remoteGauge("ipipd_tunnel_remote_ok", "1 if packets can be sent to a remote of many; 0 if an ICMP error has called it unreachable, or no route leads to it"),
		func(r *tunnel.Remote) (float64, bool) { return number(r.State == tunnel.RemoteOK), true }},
	{remoteGauge("ipipd_tunnel_remote_prefixes", "prefixes that are routed by this remote"),
		func(r *tunnel.Remote) (float64, bool) { return float64(r.Prefixes), true }},
	{remoteGauge("ipipd_tunnel_remote_path_mtu_bytes", "path MTU to this remote, for outer packets; no series while it is unknown"),
		func(r *tunnel.Remote) (float64, bool) { return float64(r.PathMTU), r.PathMTU > 0 }},
	{remoteGauge("ipipd_tunnel_remote_last_heard_timestamp_seconds", "time of this remote's last packet; 0 is never"),
		func(r *tunnel.Remote) (float64, bool) { return seconds(r.LastHeard), true }},
}

func remoteGauge(name, help string) family {
	return family{name: name, help: help + "; only with metrics-remotes", labels: []string{"remote_address"}}
}

// remotesOf returns the counts of many remotes; all zero for a tunnel with one.
func remotesOf(s *tunnel.Sample) tunnel.Remotes {
	if s.Remotes == nil {
		return tunnel.Remotes{}
	}
	return *s.Remotes
}

func gauge(name, help string) family   { return family{name: name, help: help} }
func counter(name, help string) family { return family{name: name, help: help, counter: true} }

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// seconds returns a time as metrics have it, in seconds since 1970; 0 for the zero time.
func seconds(t time.Time) float64 {
	if t.IsZero() {
		return 0
	}
	return float64(t.UnixMicro()) / 1e6
}

// The reasons that have series from the start, so that the first drop is seen as an increase: of packets and of ICMP
// messages, of tunnels with many remotes and a secret (all), with many remotes (many), with one remote (plain), with one
// and a secret (esp), and of no tunnel (process).
var (
	allPackets, allMessages         = reasons(func(r drop.Reason) bool { return !r.ByProcess() })
	manyPackets, manyMessages       = reasons(func(r drop.Reason) bool { return !r.ByProcess() && !r.ByESP() })
	plainPackets, plainMessages     = reasons(func(r drop.Reason) bool { return !r.ByProcess() && !r.ByManyRemotes() && !r.ByESP() })
	espPackets, espMessages         = reasons(func(r drop.Reason) bool { return !r.ByProcess() && !r.ByManyRemotes() })
	processPackets, processMessages = reasons(func(r drop.Reason) bool {
		return r.ByProcess() || r == drop.ESPNoSA || r == drop.ESPMalformed
	})
)

func reasons(of func(drop.Reason) bool) (packets, messages [drop.NumReasons]bool) {
	for r := range drop.All() {
		packets[r] = of(r) && r.Direction() != ""
		messages[r] = of(r) && r.Direction() == ""
	}
	return packets, messages
}

// sampledReasons returns the reasons that a tunnel has series of.
func sampledReasons(s *tunnel.Sample) (packets, messages *[drop.NumReasons]bool) {
	switch {
	case !s.Started:
		return new([drop.NumReasons]bool), new([drop.NumReasons]bool)
	case s.Encrypted && s.Remotes != nil:
		return &allPackets, &allMessages
	case s.Remotes != nil:
		return &manyPackets, &manyMessages
	case s.Encrypted:
		return &espPackets, &espMessages
	}
	return &plainPackets, &plainMessages
}

var goVersion = runtime.Version()
