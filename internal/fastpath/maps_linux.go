package fastpath

// The structures of bpf/ipip.c. Addresses are bytes here, so that network byte
// order needs no turning round; the rest has the byte order of the machine.

type path struct {
	Local, Remote   [4]byte
	NextHop         [4]byte
	Device          uint32
	MTU             uint32
	Slot            uint32
	TOSKeep, TOSSet uint8
	TTL             uint8
	Flags           uint8
}

const (
	pathSend = 1 << iota
	pathInheritDF
)

type addresses struct {
	Source, Destination [4]byte
}

type end struct {
	Device                      uint32
	MTU                         uint32
	Slot                        uint32
	Underlay                    uint32
	EchoSource, EchoDestination [4]byte
	Flags                       uint32
}

const (
	endReceive = 1 << iota
	endClamp
)

type counters struct {
	RxPackets, RxBytes uint64
	Heard              uint64
	TxPackets, TxBytes uint64
	TxFailed           uint64
}

func (t *Tunnel) path(slot uint32) path {
	p := path{
		Local: t.Local, Remote: t.Remote, NextHop: t.NextHop,
		Device: uint32(t.Underlay), MTU: uint32(t.PathMTU), Slot: slot,
		TOSKeep: 0xff, TTL: t.TTL,
	}
	if t.DSCP >= 0 {
		p.TOSKeep, p.TOSSet = 3, uint8(t.DSCP)<<2 // ECN is copied all the same: RFC 6040, section 4.1
	}
	if t.Send {
		p.Flags |= pathSend
	}
	if t.DontFragmentInherit {
		p.Flags |= pathInheritDF
	}
	return p
}

// addresses are those of the packets that come in.
func (t *Tunnel) addresses() addresses { return addresses{Source: t.Remote, Destination: t.Local} }

func (t *Tunnel) end(slot uint32) end {
	e := end{
		Device: uint32(t.Device), MTU: uint32(t.MTU), Slot: slot, Underlay: uint32(t.Underlay),
		EchoSource: t.EchoSource, EchoDestination: t.EchoDestination,
	}
	if t.Receive {
		e.Flags |= endReceive
	}
	if t.ClampTCPMSS {
		e.Flags |= endClamp
	}
	return e
}
