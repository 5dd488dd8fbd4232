package netstate

import (
	"fmt"

	"github.com/vishvananda/netlink"
)

// AddVeth makes a veth pair, both ends down: name in this network namespace, peer in that
// of the file descriptor peerNamespace.
func AddVeth(name, peer string, peerNamespace int) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	pair := &netlink.Veth{LinkAttrs: attrs, PeerName: peer, PeerNamespace: netlink.NsFd(peerNamespace)}
	if err := netlink.LinkAdd(pair); err != nil {
		return fmt.Errorf("cannot make the veth pair %s and %s: %w", name, peer, err)
	}
	return nil
}
