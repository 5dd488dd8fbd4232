package netstate

import (
	"fmt"

	"github.com/vishvananda/netlink"
)

// AddVeth joins this network namespace to the one that the file descriptor
// peerNamespace stands for by a veth pair: name here, peer there, both down.
func AddVeth(name, peer string, peerNamespace int) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	pair := &netlink.Veth{LinkAttrs: attrs, PeerName: peer, PeerNamespace: netlink.NsFd(peerNamespace)}
	if err := netlink.LinkAdd(pair); err != nil {
		return fmt.Errorf("cannot make the veth pair %s and %s: %w", name, peer, err)
	}
	return nil
}
