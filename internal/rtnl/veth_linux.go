package rtnl

import (
	"fmt"

	"github.com/vishvananda/netlink"
)

// AddVeth joins this network namespace to the one that the file descriptor
// peerNamespace stands for by a veth pair: name here, peer there, both down.
func AddVeth(name, peer string, peerNamespace int) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	_, err := addVeth(attrs, peer, peerNamespace)
	return err
}

// addVeth is AddVeth for an end that has more than a name. The peer has the same MTU and
// length of the queue.
func addVeth(attrs netlink.LinkAttrs, peer string, peerNamespace int) (*netlink.Veth, error) {
	pair := &netlink.Veth{LinkAttrs: attrs, PeerName: peer, PeerNamespace: netlink.NsFd(peerNamespace)}
	if err := netlink.LinkAdd(pair); err != nil {
		return nil, fmt.Errorf("cannot make the veth pair %s and %s: %w", attrs.Name, peer, err)
	}
	return pair, nil
}
