package vnet

import (
	"testing"

	"golang.org/x/sys/unix"
)

func TestHeader_kernelConstants(t *testing.T) {
	for name, v := range map[string][2]int{
		"NeedsChecksum": {NeedsChecksum, unix.VIRTIO_NET_HDR_F_NEEDS_CSUM},
		"DataValid":     {DataValid, unix.VIRTIO_NET_HDR_F_DATA_VALID},
		"GSONone":       {GSONone, unix.VIRTIO_NET_HDR_GSO_NONE},
		"GSOTCPv4":      {GSOTCPv4, unix.VIRTIO_NET_HDR_GSO_TCPV4},
		"GSOUDP":        {GSOUDP, unix.VIRTIO_NET_HDR_GSO_UDP_L4},
		"GSOECN":        {GSOECN, unix.VIRTIO_NET_HDR_GSO_ECN},
	} {
		if v[0] != v[1] {
			t.Errorf("%s is %d, the kernel's %d", name, v[0], v[1])
		}
	}
}
