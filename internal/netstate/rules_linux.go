package netstate

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// From linux/fib_rules.h.
const (
	sizeofRuleHeader = 12   // struct fib_rule_hdr
	ruleInvert       = 0x02 // FIB_RULE_INVERT
	fraUIDRange      = 20   // FRA_UID_RANGE
	fraIPProtocol    = 22   // FRA_IP_PROTO
	fraDSCP          = 25   // FRA_DSCP, since Linux 6.13
)

// rulesReason looks for routing rules with a selector that lookup cannot evaluate: the
// protocol (RTM_GETROUTE takes TCP, UDP and ICMP only), the TOS, which may differ from
// packet to packet, and the sender's UID. Then the kernel must route each packet.
func (r *requester) rulesReason() (string, error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETRULE, 0)
	req.AddData(nl.NewIfInfomsg(unix.AF_INET))
	rules, err := r.dump(req, unix.NETLINK_ROUTE, unix.RTM_NEWRULE)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return "", nil // a kernel without CONFIG_IP_MULTIPLE_TABLES
	}
	if err != nil {
		return "", fmt.Errorf("list the routing rules: %w", err)
	}
	for _, rule := range rules {
		selector, err := ruleSelector(rule)
		if err != nil {
			return "", fmt.Errorf("list the routing rules: %w", err)
		}
		if selector != "" {
			return "a routing rule selects by " + selector, nil
		}
	}
	return "", nil
}

// ruleSelector returns the selector of a rule for protocol 4 that lookup cannot evaluate, "" if
// there is none. b is an RTM_NEWRULE that starts at its fib_rule_hdr.
func ruleSelector(b []byte) (selector string, err error) {
	if len(b) < sizeofRuleHeader {
		return "", unix.EBADMSG
	}
	const tos, flags = 3, 8
	inverted := binary.NativeEndian.Uint32(b[flags:])&ruleInvert != 0
	if b[tos] != 0 {
		selector = "TOS"
	}
	err = eachAttr(b[sizeofRuleHeader:], func(kind uint16, value []byte) error {
		switch kind {
		case fraIPProtocol:
			if len(value) > 0 && (value[0] == unix.IPPROTO_IPIP) != inverted {
				selector = "the protocol"
			}
		case fraUIDRange:
			selector = "the user"
		case fraDSCP:
			selector = "DSCP"
		}
		return nil
	})
	return selector, err
}
