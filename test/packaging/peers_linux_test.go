package packaging

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ipipd/internal/ipv4"
	"ipipd/internal/vnet"
	"ipipd/test/netlab"
)

const (
	peer     = "198.51.100.1" // has a tunnel, and the drop-in names it
	stranger = "203.0.113.1"  // has a tunnel, and the drop-in does not name it
	router   = "192.0.2.2"    // on the way to both

	frameTTL = 33 // of what is sent by packet sockets
)

// With the drop-in of docs/install.md the service sends to its peer, and by none of its sockets to another address.
func TestPeers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: namespaces")
	}
	needs(t, "unshare", "nsenter")
	dropIn := block(t, "docs/install.md", "## To the peers only\n(?s:.*?)\n```ini.*\n((?s:.*?))```")
	apply := block(t, "docs/install.md", "## To the peers only\n(?s:.*?)\n```sh.*\n((?s:.*?))```")
	replace := block(t, "docs/install.md", "\n  ```sh by TestPeers\n  (systemctl kill .*)\n")
	near, far := netlab.New(t), netlab.New(t)
	netlab.Veth(t, near, far, netlab.End{Name: "eth0", Address: "192.0.2.1/24"}, netlab.End{Name: "eth0", Address: router + "/24"})
	near.Run("ip", "route", "add", "default", "via", router)
	for i, a := range []string{peer, stranger} {
		far.Run("ip", "address", "add", a+"/32", "dev", "eth0")
		netlab.Up(t, far, fmt.Sprintf("far%d", i), "--local-address", a, "--remote-address", "192.0.2.1", "--address", fmt.Sprintf("10.255.%d.2/30", i), "--allow-fast-path", "no")
	}
	g := boot(t, near)
	g.copy(netlab.Binary(t), "/usr/bin/ipipd")
	g.run("chmod", "755", "/usr/bin/ipipd")
	g.copy("../../packaging/systemd/ipipd.service", "/usr/lib/systemd/system/ipipd.service")
	g.copy("../../packaging/systemd/ipipd.sysusers", "/usr/lib/sysusers.d/ipipd.conf")
	g.run("systemd-sysusers", "ipipd.conf")
	g.run("install", "-d", "-o", "root", "-g", "ipipd", "-m", "2750", "/etc/ipipd")
	g.write("/etc/ipipd/ipipd.yaml", `tunnels:
- {name: peer, remote-address: `+peer+`, address: 10.255.0.1/30}
- {name: stranger, remote-address: `+stranger+`, address: 10.255.1.1/30}
- {name: encrypted, remote-address: 203.0.113.2, ipsec-secret: correct horse battery staple}
`)
	g.run("chmod", "640", "/etc/ipipd/ipipd.yaml")

	ping := func(from *netlab.NS, to string) bool {
		_, err := from.Try("ping", "-c", "1", "-W", "1", to)
		return err == nil
	}
	status := func(name string) (s netlab.Status) {
		t.Helper()
		var all []netlab.Status
		if err := json.Unmarshal([]byte(g.run("ipipd", "print", name, "--json")), &all); err != nil || len(all) != 1 {
			t.Fatalf("print %s: %v, %v", name, err, all)
		}
		return all[0]
	}
	// process returns the PID of the service's ipipd up.
	process := func() int {
		t.Helper()
		all := descendants(g.pid, "ipipd")
		if len(all) == 0 {
			t.Fatal("there is no process")
		}
		return all[len(all)-1]
	}

	g.run("systemctl", "start", "ipipd.service")
	netlab.Eventually(t, "both peers answer pings", func() bool { return ping(near, "10.255.0.2") && ping(near, "10.255.1.2") })
	device := 0
	near.Do(func() {
		if i, err := net.InterfaceByName("eth0"); err == nil {
			device = i.Index
		}
	})
	if sent := send(t, process(), device, stranger); sent.frames == 0 || sent.refused != 0 {
		t.Errorf("without the drop-in: %+v", sent)
	}

	// IPAddressDeny alone is not enough: it limits neither packet sockets nor eBPF nor sockets that a restart has kept.
	const file = "/etc/systemd/system/ipipd.service.d/peers.conf"
	g.write(file, "[Service]\nUser=root\nIPAddressDeny=any\nIPAddressAllow="+peer+"\n")
	g.run("systemctl", "daemon-reload")
	g.run("systemctl", "restart", "ipipd.service")
	if out, _ := g.try("journalctl", "--no-pager", "-o", "cat"); strings.Contains(out, "configures an IP firewall, but") {
		t.Skip("systemd cannot limit addresses here: the kernel has no BPF for cgroups (CONFIG_CGROUP_BPF)")
	}
	arrives := netlab.CaptureReceived(t, far, "eth0")
	sent := send(t, process(), device, stranger)
	if sent.frames == 0 || sent.packets == 0 || sent.refused == 0 {
		t.Errorf("with a limit of addresses only: %+v", sent)
	}
	arrives.AwaitN(sent.frames, netlab.Destination(stranger), netlab.Protocol(unix.IPPROTO_UDP), netlab.TTL(frameTTL))

	if why := fastPath(g, "stranger"); why != "active" {
		t.Logf("no fast path here: %s", why)
	} else {
		netlab.Eventually(t, "the stranger answers pings on the fast path", func() bool { return ping(near, "10.255.1.2") })
	}

	g.write(file, dropIn)
	for line := range strings.Lines(apply) {
		g.run("sh", "-c", line)
	}
	netlab.Eventually(t, "the peer answers pings, and gets answers", func() bool { return ping(near, "10.255.0.2") && ping(far, "10.255.0.1") })
	wire := netlab.Capture(t, near, "eth0", nil)
	confined := func(what string) {
		t.Helper()
		for _, pid := range descendants(g.pid, "ipipd") { // of keep too, which has what it keeps
			if sent := send(t, pid, device, stranger); sent.frames+sent.packets != 0 || sent.refused == 0 {
				t.Errorf("%s, to the stranger: %+v", what, sent)
			}
			if sent := send(t, pid, device, peer); sent.packets == 0 || sent.refused != 0 {
				t.Errorf("%s, to the peer: %+v", what, sent)
			}
		}
		if text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", process())); !strings.Contains(string(text), "CapPrm:\t0000000000000000\n") {
			t.Errorf("%s: the process has\n%s", what, text)
		}
	}
	confined("after the start")
	if ping(near, "10.255.1.2") || ping(far, "10.255.1.1") {
		t.Error("the stranger answers a ping")
	}
	if s := status("stranger"); s.Drops["send-failed"] == 0 || s.RxPacket != 0 || s.TxPacket != 0 || !strings.Contains(s.FastPath, "packet sockets") {
		t.Errorf("stranger: %+v", s)
	}
	// ICMP errors of the peer are received, and those of routers are not.
	errors := func() (n uint64) {
		for name, m := range status("peer").Drops {
			if strings.HasPrefix(name, "outer-error-") {
				n += m
			}
		}
		return n
	}
	had := errors()
	sendError(t, far, router)
	sendError(t, far, peer)
	netlab.Eventually(t, "an ICMP error of the peer is received", func() bool { return errors() > had })
	if n := errors() - had; n != 1 {
		t.Errorf("%d ICMP errors are received, want that of the peer", n)
	}

	// A new binary, and then a reload, keep the interface.
	link, before := near.Run("ip", "-o", "link", "show", "peer"), process()
	g.run("sh", "-c", replace)
	netlab.Eventually(t, "another process takes over", func() bool {
		all := descendants(g.pid, "ipipd")
		return len(all) == 2 && all[1] != before && ping(near, "10.255.0.2")
	})
	confined("after SIGUSR2")
	g.run("systemctl", "reload", "ipipd.service")
	if now := near.Run("ip", "-o", "link", "show", "peer"); now != link {
		t.Errorf("the interface is\n%s, was\n%s", now, link)
	}
	netlab.Eventually(t, "the peer answers pings after a reload", func() bool { return ping(near, "10.255.0.2") })
	toPeer := wire.Matching(netlab.Source("192.0.2.1"), netlab.Destination(peer))
	if sent := wire.Matching(netlab.Source("192.0.2.1"), netlab.Not(netlab.Destination(peer)), netlab.Not(netlab.Destination(router))); len(sent) != 0 || len(toPeer) == 0 {
		for _, f := range sent {
			t.Log(netlab.Describe(f.Packet))
		}
		t.Errorf("%d packets are sent to the peer, and %d elsewhere", len(toPeer), len(sent))
	}
	// Doctor, which runs outside the service, tries to send to the stranger.
	if out, _ := g.try("ipipd", "doctor", "stranger"); !strings.Contains(out, "(send-refused)") || !strings.Contains(out, "IPAddressDeny") {
		t.Errorf("doctor: %s", out)
	}

	// The drop-in names the stranger now.
	g.write(file, strings.ReplaceAll(dropIn, peer, peer+" "+stranger))
	for line := range strings.Lines(apply) {
		g.run("sh", "-c", line)
	}
	netlab.Eventually(t, "the stranger answers pings once it is allowed", func() bool { return ping(near, "10.255.1.2") && ping(near, "10.255.0.2") })
}

// descendants returns the processes of a name among the descendants of pid, parents first.
func descendants(pid int, name string) (all []int) {
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, thread := range threads {
		children, _ := os.ReadFile(thread)
		for child := range strings.FieldsSeq(string(children)) {
			n, _ := strconv.Atoi(child)
			if comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", n)); string(comm) == name+"\n" {
				all = append(all, n)
			}
			all = append(all, descendants(n, name)...)
		}
	}
	return all
}

// sent counts what a process's sockets have sent: frames by packet sockets, packets by IPv4 sockets, and refused writes.
type sent struct{ frames, packets, refused int }

// send sends to an address by each socket of a process, as an attacker in it could; device is the underlay's index.
func send(t *testing.T, pid, device int, to string) (s sent) {
	t.Helper()
	process, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(process)
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		n, _ := strconv.Atoi(f.Name())
		fd, err := unix.PidfdGetfd(process, n, 0)
		if err != nil { // closed since
			continue
		}
		domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
		destination := [4]byte(net.ParseIP(to).To4())
		switch {
		case err != nil: // no socket
		case domain == unix.AF_PACKET:
			frame := slices.Concat(bytes.Repeat([]byte{0xff}, 6), make([]byte, 6), []byte{8, 0}, datagram(destination, frameTTL))
			if offload, _ := unix.GetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR); offload != 0 {
				frame = slices.Concat(make([]byte, vnet.HeaderLen), frame)
			}
			if err := unix.Sendto(fd, frame, unix.MSG_DONTWAIT, &unix.SockaddrLinklayer{Ifindex: device, Protocol: 8}); err != nil {
				t.Errorf("a packet socket: %v", err)
			}
			s.frames++
		case domain == unix.AF_INET:
			err = unix.Sendto(fd, datagram(destination, 64), unix.MSG_DONTWAIT, &unix.SockaddrInet4{Addr: destination, Port: 9})
			switch err {
			case nil:
				s.packets++
			case unix.EPERM:
				s.refused++
			default:
				t.Errorf("a socket of the process: %v", err)
			}
		}
		unix.Close(fd)
	}
	return s
}

// datagram returns a UDP packet from 192.0.2.1, which is also the payload where the kernel makes the header.
func datagram(to [4]byte, ttl uint8) []byte {
	b := make([]byte, ipv4.HeaderLen+8)
	h := ipv4.Header{TotalLen: len(b), TTL: ttl, Protocol: unix.IPPROTO_UDP, Source: [4]byte{192, 0, 2, 1}, Destination: to}
	h.Put(b)
	return b
}

// sendError sends an ICMP host unreachable about a packet of the tunnel to the peer.
func sendError(t *testing.T, ns *netlab.NS, from string) {
	t.Helper()
	quoted := make([]byte, ipv4.HeaderLen+ipv4.HeaderLen)
	h := ipv4.Header{TotalLen: len(quoted), TTL: 64, Protocol: unix.IPPROTO_IPIP, Source: [4]byte{192, 0, 2, 1}, Destination: [4]byte(net.ParseIP(peer).To4())}
	h.Put(quoted)
	message := append([]byte{ipv4.ICMPUnreachable, 1, 0, 0, 0, 0, 0, 0}, quoted...)
	sum := ipv4.Checksum(message, 0)
	message[2], message[3] = byte(sum>>8), byte(sum)
	ns.Do(func() {
		c, err := net.DialIP("ip4:icmp", &net.IPAddr{IP: net.ParseIP(from)}, &net.IPAddr{IP: net.IPv4(192, 0, 2, 1)})
		if err == nil {
			_, err = c.Write(message)
			c.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
	})
}
