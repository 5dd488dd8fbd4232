//go:build !linux

package tunnel

import "ipipd/internal/handover"

func openLedger(*handover.Manager, handover.Kept) (*ledger, error) { return nil, nil }

func (e *Engine) dropLedger() error { return nil }
