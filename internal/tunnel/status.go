package tunnel

import (
	"bytes"
	"encoding/json"
	"strings"
	"time"

	"ipipd/internal/sandbox"
)

// Status is a tunnel as `print` shows it: its settings and its state.
//
// Its JSON is one flat object with RouterOS's names. First come the settings, as strings in the
// notation of the command line (repeatable ones as arrays of strings), and then the State.
type Status struct {
	// Settings are the values of Properties, in that order.
	Settings []Setting
	State
}

// Setting is the value of one Property.
type Setting struct {
	Name, Value string
	// Repeatable: Value is a list, joined with commas.
	Repeatable bool
}

// State is the read-only part of a Status.
type State struct {
	// RenamedFrom is the name that the tunnel was started with, if its interface was renamed.
	// print and down still accept it.
	RenamedFrom string `json:"renamed-from,omitzero"`
	// Interface is the name of the interface if that cannot have the tunnel's: InterfaceName.
	// print and down accept it too.
	Interface string `json:"interface,omitzero"`
	// Disabled: the tunnel is configured and not started, or its interface is set down.
	Disabled bool `json:"disabled"`
	// Running: the interface's carrier is on: the keepalive is up (or off), there has been a path,
	// the local address is present, and there is an SA if IPsec is used.
	Running bool `json:"running"`
	// WaitingFor names what is missing for packets to be sent: the local address, the underlay
	// device, a route, the address of a DNS name; "" is nothing.
	WaitingFor string `json:"waiting-for,omitzero"`
	// UndoAt is when the process undoes its last change, unless that is confirmed; zero is never. It is
	// the same in the State of each of its tunnels.
	UndoAt time.Time `json:"undo-at,omitzero"`
	// Sandbox is what the process can still do; nil before it is confined. It is the same in the State of each
	// of its tunnels.
	Sandbox *sandbox.State `json:"sandbox,omitempty"`
	// Warnings are the active warnings, in the order in which they have begun. In JSON it is never null.
	Warnings []Warning `json:"warnings"`
	// Restored maps the words address, route, program and interface to how often ipipd put back, or made again,
	// one that somebody had removed.
	Restored map[string]uint64 `json:"restored,omitzero"`
	// ActualMTU is the MTU of the interface in bytes.
	ActualMTU int `json:"actual-mtu"`
	// CurrentLocalAddress and CurrentRemoteAddress are the outer addresses in use: configured,
	// or the route's source and the resolved DNS name. "" if not started, or not known yet.
	CurrentLocalAddress  string `json:"current-local-address"`
	CurrentRemoteAddress string `json:"current-remote-address"`
	// CandidateRemoteAddress is another address of the DNS name, which is taken once the remote is
	// heard from it, or is not heard from the current one any more; "" is none.
	CandidateRemoteAddress string `json:"candidate-remote-address,omitzero"`
	// Remotes are the remotes of a tunnel with many, whose CurrentRemoteAddress is any; nil of another tunnel.
	Remotes *Remotes `json:"remotes,omitzero"`
	// PathMTU is the known path MTU to the remote in bytes, for outer packets; 0 if it is unknown, or there
	// are many remotes, each with its own.
	PathMTU int `json:"path-mtu,omitzero"`
	// KeepaliveState is the name of a keepalive.State.
	KeepaliveState string `json:"keepalive-state"`
	// FastPath is "active", or the reason why packets go through userspace.
	FastPath string `json:"fast-path,omitzero"`
	// IPsec describes the SAs, or why there are none. "" without a secret.
	IPsec string `json:"ipsec,omitzero"`
	// IPsecSPI are the SPIs of the SAs in use as tcpdump shows them, inbound/outbound.
	IPsecSPI string `json:"ipsec-spi,omitzero"`
	// IPsecRemotes are the remotes of a tunnel with many that have an SA or negotiate one, by address.
	IPsecRemotes []RemoteIPsec `json:"ipsec-remotes,omitzero"`
	// LastHeard is the time of the remote's last packet; zero is never.
	LastHeard time.Time `json:"last-heard,omitzero"`
	// RxPacket to TxByte count inner packets and their bytes, IPv4 header included.
	RxPacket uint64 `json:"rx-packet"`
	RxByte   uint64 `json:"rx-byte"`
	TxPacket uint64 `json:"tx-packet"`
	TxByte   uint64 `json:"tx-byte"`
	// Drops maps each reason to dropped packets. In JSON it is never null.
	Drops map[string]uint64 `json:"drops"`
	// ProcessDrops maps each reason to dropped packets that belong to no tunnel: the same in the
	// State of each tunnel of the process. In JSON it is never null.
	ProcessDrops map[string]uint64 `json:"process-drops"`
}

// NewStatus returns the settings of c, and the State of a tunnel that is not started. Without a secret it omits the IPsec
// settings except ipsec-secret.
func NewStatus(c *Config) Status {
	s := Status{State: State{Disabled: c.Disabled}}
	for _, p := range Properties() {
		if strings.HasPrefix(p.Name, "ipsec-") && !p.Secret && !c.IPsec.Wanted() {
			continue
		}
		s.Settings = append(s.Settings, Setting{p.Name, p.Get(c), p.Repeatable})
	}
	return s
}

// Setting returns the value of a setting by its property's name, "" if there is none.
func (s *Status) Setting(name string) string {
	for _, v := range s.Settings {
		if v.Name == name {
			return v.Value
		}
	}
	return ""
}

// Name returns the tunnel's name.
func (s *Status) Name() string { return s.Setting("name") }

// MarshalJSON returns the flat object that Status describes.
func (s Status) MarshalJSON() ([]byte, error) {
	var out bytes.Buffer
	out.WriteByte('{')
	for _, v := range s.Settings {
		var value any = v.Value
		if v.Repeatable {
			list := []string{}
			if v.Value != "" {
				list = strings.Split(v.Value, ",")
			}
			value = list
		}
		key, err := json.Marshal(v.Name)
		if err != nil {
			return nil, err
		}
		text, err := json.Marshal(value)
		if err != nil {
			return nil, err
		}
		out.Write(key)
		out.WriteByte(':')
		out.Write(text)
		out.WriteByte(',')
	}
	if s.Drops == nil {
		s.Drops = map[string]uint64{}
	}
	if s.Warnings == nil {
		s.Warnings = []Warning{}
	}
	if s.ProcessDrops == nil {
		s.ProcessDrops = map[string]uint64{}
	}
	state, err := json.Marshal(s.State)
	if err != nil {
		return nil, err
	}
	out.Write(state[1:]) // behind its own '{'
	return out.Bytes(), nil
}

// UnmarshalJSON parses the output of MarshalJSON, also of other versions of ipipd: unknown strings and
// arrays of strings are taken as settings, and other unknown members are ignored.
func (s *Status) UnmarshalJSON(data []byte) error {
	var state State
	if err := json.Unmarshal(data, &state); err != nil {
		return err
	}
	known := make(map[string]json.RawMessage)
	text, err := json.Marshal(State{RenamedFrom: "ipip1", Restored: map[string]uint64{}, Interface: "ipip1", WaitingFor: "local-address", CandidateRemoteAddress: "192.0.2.1", Remotes: &Remotes{}, PathMTU: 1, FastPath: "active", IPsec: "negotiating", IPsecSPI: "0x1/0x1", IPsecRemotes: []RemoteIPsec{{}}, LastHeard: time.Unix(1, 0), UndoAt: time.Unix(1, 0)}) // nothing omitted
	if err != nil {
		return err
	}
	if err := json.Unmarshal(text, &known); err != nil {
		return err
	}
	*s = Status{State: state}
	// A map would lose the order.
	d := json.NewDecoder(bytes.NewReader(data))
	if _, err := d.Token(); err != nil { // '{'
		return err
	}
	for d.More() {
		key, err := d.Token()
		if err != nil {
			return err
		}
		var raw json.RawMessage
		if err := d.Decode(&raw); err != nil {
			return err
		}
		name, _ := key.(string)
		if _, ok := known[name]; ok {
			continue
		}
		var one string
		var several []string
		if json.Unmarshal(raw, &one) == nil {
			s.Settings = append(s.Settings, Setting{name, one, false})
		} else if json.Unmarshal(raw, &several) == nil {
			s.Settings = append(s.Settings, Setting{name, strings.Join(several, ","), true})
		}
	}
	return nil
}
