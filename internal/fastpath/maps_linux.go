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
}

// TX_ENABLED and TX_INHERIT_DF.
const (
	txEnabled = 1 << iota
	txInheritDF
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
}

// RX_ENABLED and RX_CLAMP_MSS.
const (
	rxEnabled = 1 << iota
	rxClampMSS
)

// counters is one CPU's value of the map counters.
type counters struct {
	RxPackets, RxBytes uint64
	LastReceived       uint64 // CLOCK_MONOTONIC, ns
	TxPackets, TxBytes uint64
	TxFailed           uint64
}

func (t *Tunnel) txTunnel(slot uint32) txTunnel {
	v := txTunnel{
		Local: t.Local, Remote: t.Remote, NextHop: t.NextHop,
		UnderlayIfindex: uint32(t.UnderlayIfindex), PathMTU: uint32(t.PathMTU), Slot: slot,
		TOSMask: 0xff, TTL: t.TTL,
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
	return v
}

// rxKey returns the outer addresses of received packets.
func (t *Tunnel) rxKey() rxKey { return rxKey{Source: t.Remote, Destination: t.Local} }

func (t *Tunnel) rxTunnel(slot uint32) rxTunnel {
	v := rxTunnel{
		TUNIfindex: uint32(t.Ifindex), TUNMTU: uint32(t.MTU), Slot: slot, UnderlayIfindex: uint32(t.UnderlayIfindex),
		EchoSource: t.EchoSource, EchoDestination: t.EchoDestination,
	}
	if t.RxEnabled {
		v.Flags |= rxEnabled
	}
	if t.ClampTCPMSS {
		v.Flags |= rxClampMSS
	}
	return v
}
