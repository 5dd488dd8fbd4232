package control

import (
	"encoding/json"
	"errors"
	"io"
	"time"
)

// The actions of a Request: the paths of the protocol.
const (
	Reload  = "reload" // reads the configuration again
	Set     = "set"    // changes properties of one tunnel
	Add     = "add"
	Remove  = "remove"
	Enable  = "enable"
	Disable = "disable"
	Confirm = "confirm" // ends the wait that Request.Confirm began
)

var actions = []string{Reload, Set, Add, Remove, Enable, Disable, Confirm}

// Request is what a process is to change of its tunnels: all of it, or nothing.
type Request struct {
	Action string `json:"-"`
	// Names are the names of the tunnels, or of their interfaces.
	Names []string `json:"names,omitzero"`
	// Settings are the properties that Set and Add give the tunnel.
	Settings []Setting `json:"settings,omitzero"`
	// Confirm is how long, in ns, to wait for a confirmation before this is undone; 0: it needs none.
	Confirm time.Duration `json:"confirm,omitzero"`
}

// Setting is a property of a tunnel. A repeatable one may have several Settings, or a list with commas.
type Setting struct {
	Property string `json:"property"`
	// Value is in the notation of the flag, empty for the default. A secret need not be UTF-8.
	Value []byte `json:"value"`
}

// Result is what a change has led to.
type Result struct {
	// Name is the name of the tunnel that Add has added.
	Name string `json:"name,omitzero"`
	// UndoAt is when everything that is not confirmed is undone, this included; zero is never.
	UndoAt time.Time `json:"undo-at,omitzero"`
	// Notes are lines for the operator: what of the configuration is passed over, or should be mended.
	Notes []string `json:"notes,omitzero"`
}

// File is a file of a configuration. It is sent because the process may not be able to read it.
type File struct {
	Name string `json:"name"`
	Data []byte `json:"data"`
}

// Comparison is what Reload would do.
type Comparison struct {
	Tunnels []Difference `json:"tunnels"`
	UndoAt  time.Time    `json:"undo-at,omitzero"` // as in Result
}

// Difference is what Reload would do with one tunnel.
type Difference struct {
	Name   string `json:"name"`
	Action string `json:"action"` // nothing, in place, again, add or remove
	// Properties change, if it is in place or again.
	Properties []string `json:"properties"`
	// Why is why it is made again, or that it is disabled.
	Why string `json:"why,omitzero"`
}

// Refusal is why a process does not do what it was asked for.
type Refusal struct {
	Message string `json:"message"`
	// Input: the configuration that it was to read is wrong.
	Input bool `json:"input,omitzero"`
	// Nothing: there is nothing to reload, or nothing to confirm.
	Nothing bool `json:"nothing,omitzero"`
}

func (r *Refusal) Error() string { return r.Message }

// decode reads one JSON value, and refuses fields that this version does not know.
func decode(body io.Reader, v any) error {
	d := json.NewDecoder(body)
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); err != io.EOF {
		return errors.New("there is something behind the JSON value")
	}
	return nil
}
