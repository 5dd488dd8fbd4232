//go:build !linux

package tun

type iovecs struct{}
