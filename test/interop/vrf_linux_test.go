package interop

import (
	"io"
	"os"
	"path/filepath"
	"testing"

	"ipipd/test/netlab"
)

// binaryForGuest mounts ipipd in a guest, whose /proc and /tmp are not the host's, and returns
// its command.
func binaryForGuest(t *testing.T, guest *netlab.Guest) string {
	t.Helper()
	from, err := os.Open(netlab.Binary(t))
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	path := filepath.Join(t.TempDir(), "ipipd")
	to, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	if _, err = io.Copy(to, from); err == nil {
		err = to.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	guest.MustRun("mkdir /run/bin && mount -t hostfs -o " + filepath.Dir(path) + " hostfs /run/bin")
	return "GODEBUG=cpu.all=off /run/bin/ipipd" // see noAVX of netlab
}

// The underlay may be an interface in a VRF. ipipd runs in a guest, whose NIC is in one, as
// the host's kernel need not support VRFs.
//
//	ours 192.0.2.1 eth0 ── spare ══ vec0 192.0.2.2 guest, vec0 in VRF red
func TestVRF_underlayDevice(t *testing.T) {
	t.Parallel()
	ours, spare := netlab.New(t), netlab.New(t)
	netlab.Veth(t, ours, spare, netlab.End{Name: "eth0", Address: ourOuter + "/24"}, netlab.End{Name: "guest0"})
	guest := netlab.StartGuest(t, spare, "guest0", netlab.GuestOptions{Address: peerOuter + "/24", Modules: []string{"lib/crc-ccitt", "net/ipv6/ipv6", "drivers/net/vrf", "drivers/net/tun"}})
	guest.MustRun(`mkdir /tmp/dev && mount -t devtmpfs dev /tmp/dev && mount --bind /tmp/dev /dev || true
		ip link add red type vrf table 10 && ip link set red up && ip link set vec0 master red && ip route show vrf red`)
	netlab.Up(t, ours, "t0", "--local-address", ourOuter, "--remote-address", peerOuter, "--address", ourInner+"/24", "--keepalive", "off")
	binary := binaryForGuest(t, guest)
	for _, device := range []string{"vec0", "red"} {
		for _, threads := range []string{"1", "2"} {
			t.Run(device+"/threads="+threads, func(t *testing.T) {
				log := "/tmp/" + device + threads
				guest.MustRun(binary + " up --name t0 --local-address " + peerOuter + " --remote-address " + ourOuter +
					" --address " + peerInner + "/24 --underlay-device " + device + " --threads " + threads + " --keepalive off >" + log + " 2>&1 &")
				if !netlab.WaitFor(func() bool {
					_, err := guest.Run(binary + " print t0")
					return err == nil
				}) {
					out, _ := guest.Run("cat " + log)
					t.Fatalf("the tunnel in the guest is not ready:\n%s", out)
				}
				if out, err := ours.Try("ping", "-c", "3", "-i", "0.2", "-W", "10", peerInner); err != nil {
					status, _ := guest.Run(binary + " print t0; cat " + log)
					t.Errorf("no ping: %s\n%s", out, status)
				}
				guest.MustRun(binary + " down t0")
			})
		}
	}
}
