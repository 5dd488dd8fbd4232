package netstate

import (
	"fmt"
	"strconv"
	"strings"
)

// Reassembly returns ReasmOKs and ReasmFails of the network namespace: the IPv4 packets that
// were reassembled from fragments, and those given up for a missing fragment.
func (r *requester) Reassembly() (done, failed uint64, err error) {
	text, err := r.netFile(fileCounters)
	if err != nil {
		return 0, 0, fmt.Errorf("read the kernel's counters: %w", err)
	}
	return parseReassembly(string(text))
}

// parseReassembly reads the two lines that begin with "Ip: ", names over values.
func parseReassembly(snmp string) (done, failed uint64, err error) {
	var names []string
	for line := range strings.Lines(snmp) {
		fields, ok := strings.CutPrefix(line, "Ip: ")
		if !ok {
			continue
		}
		values := strings.Fields(fields)
		if names == nil {
			names = values
			continue
		}
		for i, name := range names[:min(len(names), len(values))] {
			var into *uint64
			switch name {
			case "ReasmOKs":
				into = &done
			case "ReasmFails":
				into = &failed
			default:
				continue
			}
			if *into, err = strconv.ParseUint(values[i], 10, 64); err != nil {
				return 0, 0, fmt.Errorf("kernel counter %s: %w", name, err)
			}
		}
		return done, failed, nil
	}
	return 0, 0, fmt.Errorf("the kernel's counters have no line of IP")
}
