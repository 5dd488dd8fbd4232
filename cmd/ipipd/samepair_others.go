//go:build !linux

package main

import "ipipd/internal/tunnel"

func (p *process) warnOfSamePairs([]tunnel.Status) {}
