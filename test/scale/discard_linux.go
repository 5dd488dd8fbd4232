package main

import (
	"fmt"
	"io"
	"net"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
)

// discardUDP drops IPIP packets with UDP inside as they arrive at an interface, before any other program and before
// the kernel looks up their route, until it is closed: what a remote does with them is no cost of the sender.
func discardUDP(device string) (io.Closer, error) {
	const (
		protocol      = 14 + 9 // of the outer header, behind Ethernet's
		innerProtocol = 14 + 20 + 9
		next, drop    = -1, 2 // TCX_NEXT, TCX_DROP
	)
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "discard_udp", Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{
			asm.Mov.Reg(asm.R6, asm.R1),
			asm.LoadAbs(protocol, asm.Byte),
			asm.JNE.Imm(asm.R0, 4, "next"),
			asm.LoadAbs(innerProtocol, asm.Byte),
			asm.JNE.Imm(asm.R0, 17, "next"),
			asm.Mov.Imm(asm.R0, drop),
			asm.Return(),
			asm.Mov.Imm(asm.R0, next).WithSymbol("next"),
			asm.Return(),
		},
	})
	if err != nil {
		return nil, fmt.Errorf("load the program that discards packets: %w", err)
	}
	defer program.Close()
	at, err := net.InterfaceByName(device)
	if err != nil {
		return nil, err
	}
	l, err := link.AttachTCX(link.TCXOptions{Interface: at.Index, Program: program, Attach: ebpf.AttachTCXIngress, Anchor: link.Head()})
	if err != nil {
		return nil, fmt.Errorf("attach the program that discards packets to %s: %w", device, err)
	}
	return l, nil
}
