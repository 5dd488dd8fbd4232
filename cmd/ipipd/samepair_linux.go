package main

import (
	"cmp"
	"net"
	"slices"

	"ipipd/internal/control"
	"ipipd/internal/doctor"
	"ipipd/internal/netstate"
	"ipipd/internal/tunnel"
)

// warnOfSamePairs warns of tunnels that have the same outer addresses as a tunnel of another process, or of the
// kernel: both would get each packet of the peer. What cannot be found out it leaves to doctor.
func (p *process) warnOfSamePairs(tunnels []tunnel.Status) {
	own := make([]doctor.Outer, len(tunnels))
	for i := range tunnels {
		own[i] = doctor.OuterOf(&tunnels[i])
	}
	kernel, _ := netstate.KernelTunnels()
	doctor.SamePairs(own, p.outerOfOthers(tunnels), kernel, func(i int, what, why, do string) {
		p.log.Warn(what, "name", own[i].Name, "because", why, "remedy", do)
	})
}

// outerOfOthers returns the outer addresses of other processes' tunnels in this network namespace: processes of
// several may share the folder. own are tunnels of this process.
func (p *process) outerOfOthers(own []tunnel.Status) (others []doctor.Outer) {
	links := map[string]bool{}
	for i := range own {
		links[tunnel.InterfaceName(cmp.Or(own[i].RenamedFrom, own[i].Name()))] = true
	}
	here := map[string]bool{}
	interfaces, _ := net.Interfaces()
	for _, i := range interfaces {
		here[i.Name] = true
	}
	processes, _ := control.Processes(p.options.RuntimeDir)
	for i := range processes {
		var statuses []tunnel.Status
		if slices.ContainsFunc(processes[i].Names, func(name string) bool { return links[name] }) ||
			processes[i].Statuses(p.options.RuntimeDir, answerTimeout, &statuses) != nil {
			continue
		}
		for j := range statuses {
			if s := &statuses[j]; here[cmp.Or(s.Interface, s.Name())] {
				others = append(others, doctor.OuterOf(s))
			}
		}
	}
	return others
}
