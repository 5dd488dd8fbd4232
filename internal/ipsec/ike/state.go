package ike

import (
	"net/netip"

	"ipipd/internal/ipsec/esp"
)

// The state with which another process continues a Peer: the established IKE SAs, with their keys, message IDs and
// exchanges under way, and the ESP SAs. Half-open IKE SAs are negotiated again. Times are nanoseconds of
// CLOCK_BOOTTIME, which nobody sets; back-off starts anew, and the peer counts as just heard.

// peerState and its parts are encoded by encoding/gob. Current, Replaces, Child, FirstChild, Old, and a child's V1 and
// V2, are an index in the list plus 1; 0 is none.
type peerState struct {
	Identity    []byte
	V1          []v1State
	V2          []v2State
	Children    []childState
	Current     int
	Renegotiate bool
}

type childState struct {
	Inbound, Outbound espState
	Version           int
	IKE               Proposal
	Group             Group
	Established       int64
	RekeyAt           int64
	ExpireAt          int64
	Active            bool
	ActivateAt        int64
	PeerSends         bool
	Replaces          int
	Rekeying          bool
	ReceiveUntil      int64
	RemoveAt          int64
	Deleting          bool
	DeleteAt          int64
	V1, V2            int
}

type espState struct {
	SPI                   uint32
	Suite                 esp.Suite
	Encryption, Integrity []byte
	ESN                   bool
	Source, Destination   uint16
}

type pathState struct {
	Local  uint16
	Remote netip.AddrPort
}

type natState struct{ Local, Remote, Forced bool }

type retransmissionState struct {
	Messages [][]byte
	Tries    int
	NextAt   int64
}

type dhState struct {
	Group   Group
	Private []byte // an exponent, or the private key of a curve
}

type v1State struct {
	Initiator           bool
	CkyI, CkyR          ikeSPI
	Path                pathState
	StartedAt, ExpireAt int64
	Proposal            Proposal
	Nat                 natState
	PeerDPD             bool
	Keys                v1KeysState
	IV                  []byte
	LastRequestHash     [32]byte
	LastReply           []byte
	Established         int64
	RekeyAt, ReplacedAt int64
	Keepalive           bool
	QuickModes          []quickState
	UsedIDs             []byte // big-endian
	DPDSequence         uint32
}

type v1KeysState struct{ SKEYID, SKEYIDd, SKEYIDa, Key, Phase1IV []byte }

type quickState struct {
	ID                  uint32
	Initiator           bool
	IV, Ni, Nr          []byte
	DH                  dhState
	Group               Group
	SPI                 uint32
	Replaces, Child     int
	Done                bool
	ExpireAt, StartedAt int64
	Retransmission      retransmissionState
	LastRequestHash     [32]byte
	LastReply           []byte
}

type v2State struct {
	Initiator                     bool
	SPII, SPIR                    ikeSPI
	Path                          pathState
	StartedAt, ExpireAt           int64
	Proposal                      Proposal
	Group                         Group
	Nat                           natState
	CanFragment                   bool
	Material                      []byte
	Counter                       uint64
	FirstChild                    int
	ConfirmAt                     int64
	SendID, RecvID, LastRequestID uint32
	LastResponse                  [][]byte
	Pending                       *requestState
	Queue                         []requestState
	Retransmission                retransmissionState
	Established, RekeyAt          int64
	Replaced, Rekeying, Keepalive bool
	Probing                       bool
	DeadAt                        int64
}

type requestState struct {
	Kind  requestKind
	SPI   uint32
	Child *childRequestState
	Rekey *rekeyState
}

type childRequestState struct {
	Old         int
	Groups      []Group
	Retries     int
	SPI         uint32
	Ni          []byte
	DH          dhState
	RequestedAt int64
}

// rekeyState is the state of a new IKE SA that the IKE SA with this request negotiates in its own place.
type rekeyState struct {
	SPI       ikeSPI
	Ni        []byte
	DH        dhState
	Group     Group
	StartedAt int64
}
