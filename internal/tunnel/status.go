package tunnel

import (
	"bytes"
	"encoding/json"
	"strings"
	"time"
)

// Status is what `print` shows of a tunnel: how it is set, and how it is doing.
//
// Its JSON is one flat object under RouterOS's names: first the settings, as
// strings in the spelling that the command line takes, those that can be given
// more than once as arrays of strings, and then the State.
type Status struct {
	// Settings are the values of Properties, in that order.
	Settings []Setting
	State
}

// Setting is the value of one Property.
type Setting struct {
	Name, Value string
	// Repeatable: Value is several, joined with commas.
	Repeatable bool
}

// State is what nobody sets.
type State struct {
	// RenamedFrom is the name that the tunnel was started with, if its interface has
	// another now. print and down go on to take it.
	RenamedFrom string `json:"renamed-from,omitzero"`
	// Disabled: the tunnel is configured and not started.
	Disabled bool `json:"disabled"`
	// Running: by the keepalive the remote is there; the interface's carrier.
	Running bool `json:"running"`
	// WaitingFor is what this host lacks for the tunnel to run: its local address. ""
	// if it lacks nothing.
	WaitingFor string `json:"waiting-for,omitzero"`
	// ActualMTU is the MTU of the interface in bytes.
	ActualMTU int `json:"actual-mtu"`
	// CurrentLocalAddress and CurrentRemoteAddress are the outer addresses in
	// use: what the route gave and what the DNS name resolved to, where those
	// were asked. "" while there is none.
	CurrentLocalAddress  string `json:"current-local-address"`
	CurrentRemoteAddress string `json:"current-remote-address"`
	// PathMTU is the largest outer packet in bytes that the path to the remote
	// takes, as far as is known; 0 is not known.
	PathMTU int `json:"path-mtu,omitzero"`
	// KeepaliveState is a keepalive.State by name.
	KeepaliveState string `json:"keepalive-state"`
	// FastPath is "active" while the kernel carries plain packets, and else why it
	// does not.
	FastPath string `json:"fast-path,omitzero"`
	// IPsec is how an encrypted tunnel is doing: established with what, or what
	// is in the way. "" for a plain one.
	IPsec string `json:"ipsec,omitzero"`
	// IPsecSPI are the SPIs of the SAs in use, as tcpdump shows them: received/sent.
	IPsecSPI string `json:"ipsec-spi,omitzero"`
	// LastHeard is when the last packet of the remote came; zero is never.
	LastHeard time.Time `json:"last-heard,omitzero"`
	// Packets and bytes of the inner packets carried, headers included.
	RxPacket uint64 `json:"rx-packet"`
	RxByte   uint64 `json:"rx-byte"`
	TxPacket uint64 `json:"tx-packet"`
	TxByte   uint64 `json:"tx-byte"`
	// Drops is reason → packets. In JSON it is an object, never null.
	Drops map[string]uint64 `json:"drops"`
}

// NewStatus has the settings of c, and an empty State. Of a plain tunnel those of
// IPsec are left out, but for ipsec-secret.
func NewStatus(c *Config) Status {
	var s Status
	for _, p := range Properties() {
		if strings.HasPrefix(p.Name, "ipsec-") && !p.Secret && !c.IPsec.Wanted() {
			continue // how nothing is encrypted
		}
		s.Settings = append(s.Settings, Setting{p.Name, p.Get(c), p.Repeatable})
	}
	return s
}

// Setting is the value of a setting by its property's name, "" if there is none.
func (s *Status) Setting(name string) string {
	for _, v := range s.Settings {
		if v.Name == name {
			return v.Value
		}
	}
	return ""
}

// Name is the tunnel's.
func (s *Status) Name() string { return s.Setting("name") }

// MarshalJSON writes the flat object.
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
	state, err := json.Marshal(s.State)
	if err != nil {
		return nil, err
	}
	out.Write(state[1:]) // behind its own '{'
	return out.Bytes(), nil
}

// UnmarshalJSON reads what MarshalJSON wrote, by this version of ipipd or by
// another: strings and arrays of strings that are no part of State are settings,
// and what else is unknown is passed over.
func (s *Status) UnmarshalJSON(data []byte) error {
	var state State
	if err := json.Unmarshal(data, &state); err != nil {
		return err
	}
	known := make(map[string]json.RawMessage)
	text, err := json.Marshal(State{RenamedFrom: "ipip1", WaitingFor: "local-address", PathMTU: 1, FastPath: "active", IPsec: "negotiating", IPsecSPI: "0x1/0x1", LastHeard: time.Unix(1, 0)}) // nothing omitted
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
