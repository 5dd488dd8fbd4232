//go:build !linux

package handover

import (
	"errors"
	"sync/atomic"
)

// State needs Linux.
type State struct{ Damaged int }

// NewState returns errors.ErrUnsupported.
func NewState() (*State, error) { return nil, errors.ErrUnsupported }

// AdoptState returns errors.ErrUnsupported.
func AdoptState(int) (*State, error) { return nil, errors.ErrUnsupported }

// FD and the others are never called: there is no State.
func (*State) FD() int                                           { return -1 }
func (*State) Close() error                                      { return nil }
func (*State) Records() map[string][]byte                        { return nil }
func (*State) Put(string, []byte) error                          { return errors.ErrUnsupported }
func (*State) Delete(string)                                     {}
func (*State) TakeCounters(uint64) (int, []atomic.Uint64, bool)  { return 0, nil, false }
func (*State) AdoptCounters(int, uint64) ([]atomic.Uint64, bool) { return nil, false }
func (*State) ReleaseCounters(int)                               {}
