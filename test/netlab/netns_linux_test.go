package netlab

import (
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
)

func TestVeth(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	before, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	a, b := New(t), New(t)
	Veth(t, a, b, End{Name: "eth0", Address: "192.0.2.1/24"}, End{Name: "eth1", Address: "192.0.2.2/24", MTU: 1400})

	if out := a.Run("ip", "-brief", "address"); !strings.Contains(out, "192.0.2.1/24") || strings.Contains(out, "eth1") {
		t.Errorf("addresses of a:\n%s", out)
	}
	if out := b.Run("ip", "link", "show", "eth1"); !strings.Contains(out, "mtu 1400") {
		t.Errorf("eth1 of b: %s", out)
	}
	// A socket stays in the namespace that it was opened in.
	var listener net.PacketConn
	b.Do(func() { listener, err = net.ListenPacket("udp4", "192.0.2.2:0") })
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	var client net.Conn
	a.Do(func() { client, err = net.Dial("udp4", listener.LocalAddr().String()) })
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if _, err := client.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 16)
	n, from, err := listener.ReadFrom(buf)
	if err != nil || string(buf[:n]) != "hello" || !strings.HasPrefix(from.String(), "192.0.2.1:") {
		t.Errorf("received %q from %v: %v", buf[:n], from, err)
	}

	a.Sysctl("net.ipv4.ip_forward", "1")
	if out := a.Run("cat", "/proc/sys/net/ipv4/ip_forward"); strings.TrimSpace(out) != "1" {
		t.Errorf("ip_forward of a is %q", out)
	}
	if out := b.Run("cat", "/proc/sys/net/ipv4/ip_forward"); strings.TrimSpace(out) != "0" {
		t.Errorf("ip_forward of b is %q", out)
	}
	if _, err := a.Try("false"); err == nil {
		t.Error("Try does not report a failed command")
	}
	if after, err := os.Readlink("/proc/thread-self/ns/net"); err != nil || after != before {
		t.Errorf("namespace after Do is %s, was %s: %v", after, before, err)
	}
}

func TestNSStart_killedWithTest(t *testing.T) {
	var cmd *exec.Cmd
	t.Run("test", func(t *testing.T) {
		ns := New(t)
		cmd = exec.Command("sleep", "1000")
		ns.Start(cmd)
	})
	if cmd == nil {
		return // skipped
	}
	if cmd.ProcessState == nil {
		t.Error("the process was not waited for")
	}
}
