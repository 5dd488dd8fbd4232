package fastpath

// Mirrors of the map keys and values in bpf/ipip.c; TestObject_mapLayouts compares the
// two. IPv4 addresses are byte arrays, so in network byte order; integers are in host
// byte order.

// txTunnel is a value of the map tx_tunnels.
type txTunnel struct {
	Local, Remote   [4]byte
	NextHop         [4]byte
	UnderlayIfindex uint32
	PathMTU         uint32
	Slot            uint32
	TOSMask, TOSSet uint8
	TTL             uint8
	Flags           uint8
	Capture         uint32
	Table           uint32
}

// TX_ENABLED and so on.
const (
	txEnabled = 1 << iota
	txInheritDF
	txMany
)

// rxKey is a key of the map rx_tunnels.
type rxKey struct {
	Source, Destination [4]byte
}

// rxTunnel is a value of the map rx_tunnels.
type rxTunnel struct {
	TUNIfindex                  uint32
	TUNMTU                      uint32
	Slot                        uint32
	UnderlayIfindex             uint32
	EchoSource, EchoDestination [4]byte
	Flags                       uint32
	Capture                     uint32
	Table                       uint32
}

// RX_ENABLED and so on.
const (
	rxEnabled = 1 << iota
	rxClampMSS
	rxMany
	rxAnyPeer
	rxAcceptFrom
	rxAcceptTo
	rxRefuse
)

// counters is one CPU's value of the map counters.
type counters struct {
	RxPackets, RxBytes uint64
	LastReceived       uint64 // CLOCK_MONOTONIC, ns
	TxPackets, TxBytes uint64
	TxFailed           uint64

	ReversePath, NotInAcceptFrom, NotInAcceptTo uint64
	Orphaned                                    uint64 // skbs

	NotCaptured, DropsNotCaptured uint64
	NoRoom                        uint64
}

// captureDrops is CAPTURE_DROPS.
const captureDrops = 0x10000

// value returns the encoding of tx_tunnel.capture and rx_tunnel.capture.
func (c Capture) value() uint32 {
	v := uint32(c.Snaplen)
	if c.Drops {
		v |= captureDrops
	}
	return v
}

// prefixKey is a key of the maps accept_from and accept_to.
type prefixKey struct {
	Length  uint32 // in bits: the 32 of Ifindex, and those of the prefix
	Ifindex uint32
	Address [4]byte
}

// remoteKey is a key of the map numbers.
type remoteKey struct {
	Table  uint32
	Remote [4]byte
}

// remoteValue is a value of the map remotes.
type remoteValue struct {
	Lock            uint32
	Address         [4]byte
	LastReceived    uint64
	Source, NextHop [4]byte
	UnderlayIfindex uint32
	PathMTU, Flags  uint16
}

// REMOTE_TX and REMOTE_RX.
const (
	remoteTx = 1 << iota
	remoteRx
)

func (t *Tunnel) txTunnel(slot, table uint32) txTunnel {
	v := txTunnel{
		Local: t.Local, Remote: t.Remote, NextHop: t.NextHop,
		UnderlayIfindex: uint32(t.UnderlayIfindex), PathMTU: uint32(t.PathMTU), Slot: slot,
		TOSMask: 0xff, TTL: t.TTL, Capture: t.Capture.value(), Table: table,
	}
	if t.DSCP >= 0 {
		v.TOSMask, v.TOSSet = 3, uint8(t.DSCP)<<2 // ECN is always copied: RFC 6040, section 4.1
	}
	if t.TxEnabled {
		v.Flags |= txEnabled
	}
	if t.DontFragmentInherit {
		v.Flags |= txInheritDF
	}
	if t.Many {
		v.Flags |= txMany
	}
	return v
}

// rxKey returns the outer addresses of received packets.
func (t *Tunnel) rxKey() rxKey { return rxKey{Source: t.Remote, Destination: t.Local} }

func (t *Tunnel) rxTunnel(slot, table uint32) rxTunnel {
	v := rxTunnel{
		TUNIfindex: uint32(t.Ifindex), TUNMTU: uint32(t.MTU), Slot: slot, UnderlayIfindex: uint32(t.UnderlayIfindex),
		EchoSource: t.EchoSource, EchoDestination: t.EchoDestination, Capture: t.Capture.value(), Table: table,
	}
	if t.RxEnabled {
		v.Flags |= rxEnabled
	}
	for flag, set := range map[uint32]bool{
		rxClampMSS: t.ClampTCPMSS, rxMany: t.Many, rxAnyPeer: t.AnyPeer, rxAcceptFrom: t.AcceptFrom, rxAcceptTo: t.AcceptTo, rxRefuse: t.Refuse,
	} {
		if set {
			v.Flags |= flag
		}
	}
	return v
}
