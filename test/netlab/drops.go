package netlab

// Where a drop.Reason is provoked, and seen in print, in the metrics and in the comment of a capture.
const (
	// FromOutside: by TestDrops of test/conformance, with packets, routes and rules in network namespaces, and as a
	// peer that has the keys.
	FromOutside = "test/conformance"
	// InMemory: by TestTunnelDrop of internal/tunnel: a kernel does not let it happen, or not at will.
	InMemory = "internal/tunnel"
	// ManyRemotes: by TestRemotes_drops of internal/tunnel, with remote-address any.
	ManyRemotes = "internal/tunnel, many remotes"
	// ManyEncrypted: by TestManyIPsec_cleartext of test/conformance.
	ManyEncrypted = "test/conformance, many encrypted remotes"
)

// DropProvoked has each reason, and where it is provoked.
var DropProvoked = map[string]string{
	"inner-not-ipv4": FromOutside, "inner-malformed": FromOutside, "inner-ttl-zero": FromOutside, "inner-too-long": FromOutside,
	"loop": FromOutside, "too-big": FromOutside, "no-path": FromOutside, "queue-full": FromOutside, "send-failed": FromOutside,
	"fragment-failed":  InMemory, // takes an inner header with options beyond what an MTU of 68 leaves
	"no-local-address": InMemory, // the interface has no carrier then: but for an instant the kernel drops before ipipd does

	"receive-overflow": FromOutside, "unknown-peer": FromOutside, "received-not-ipv4": FromOutside, "received-truncated": FromOutside,
	"received-malformed": FromOutside, "received-checksum": FromOutside, "received-ttl-zero": FromOutside, "received-loop": FromOutside,
	"ecn-ce-on-not-ect": FromOutside, "superpacket-size-unknown": FromOutside, "reflect-ttl-expired": FromOutside, "reflect-limited": FromOutside,
	"received-not-running": FromOutside,
	// The kernel drops these before the socket gets them.
	"outer-malformed": InMemory, "outer-not-ipip": InMemory, "outer-fragment": InMemory, "outer-checksum": InMemory,
	"write-failed": InMemory, // takes a kernel without memory

	"no-remote": ManyRemotes, "remote-not-usable": ManyRemotes, "reverse-path": ManyRemotes, "not-in-accept-from": ManyRemotes, "not-in-accept-to": ManyRemotes,

	"esp-no-gateway": ManyEncrypted,
	"esp-no-sa":      FromOutside, "esp-plain-text": FromOutside, "esp-authentication": FromOutside, "esp-replay": FromOutside,
	"esp-malformed": FromOutside, "esp-no-room": FromOutside,
	"esp-padding": FromOutside, "esp-selector": FromOutside, "esp-dummy": FromOutside,
	"esp-exhausted": FromOutside, // the 2^32 packets before are skipped
	"esp-fragment":  InMemory,    // the kernel reassembles before the socket gets them

	"icmp-forbidden": FromOutside, "icmp-limited": FromOutside, "outer-error-malformed": FromOutside, "outer-error-ignored": FromOutside,
	"outer-error-not-believed": FromOutside,
}

// DropsProvoked returns the reasons that DropProvoked has with this place.
func DropsProvoked(where string) map[string]bool {
	m := map[string]bool{}
	for reason, by := range DropProvoked {
		if by == where {
			m[reason] = true
		}
	}
	return m
}
