package lab

import (
	"errors"
	"net"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// namespaces makes two for the duration of the test.
func namespaces(t *testing.T) (a, b *Namespace) {
	t.Helper()
	for _, n := range []**Namespace{&a, &b} {
		var err error
		if *n, err = NewNamespace(); errors.Is(err, unix.EPERM) {
			t.Skip("needs root (CAP_SYS_ADMIN) to make a network namespace")
		} else if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { (*n).Close() })
	}
	return a, b
}

func interfaces(t *testing.T, n *Namespace) (names []string) {
	t.Helper()
	if err := n.Do(func() error {
		all, err := net.Interfaces()
		for _, i := range all {
			names = append(names, i.Name)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return names
}

func TestRemedy(t *testing.T) {
	for _, err := range []error{unix.EPERM, unix.ENOSPC, unix.EINVAL, unix.ENOSYS} {
		if remedy(os.NewSyscallError("unshare", err)) == "" {
			t.Errorf("%v: no remedy", err)
		}
	}
	if r := remedy(unix.ENOMEM); r != "" {
		t.Errorf("of ENOMEM it is %q", r)
	}
}

func TestVeth(t *testing.T) {
	a, b := namespaces(t)
	if err := Veth(End{a, "x"}, End{b, "y"}); err != nil {
		t.Fatal(err)
	}
	if names := interfaces(t, a); !slices.Contains(names, "x") || slices.Contains(names, "y") {
		t.Errorf("in a there are %q", names)
	}
	if names := interfaces(t, b); !slices.Contains(names, "y") || slices.Contains(names, "x") {
		t.Errorf("in b there are %q", names)
	}
	if err := Veth(End{a, "x"}, End{b, "z"}); !errors.Is(err, unix.EEXIST) {
		t.Errorf("a second one of that name: %v", err)
	}
}

// A goroutine that ends in Do leaves no thread in the wrong namespace that others run on, and an error of
// f comes back.
func TestNamespaceDo(t *testing.T) {
	a, b := namespaces(t)
	here := func() (inode uint64) {
		var s unix.Stat_t
		if err := unix.Stat("/proc/thread-self/ns/net", &s); err != nil {
			t.Error(err)
		}
		return s.Ino
	}
	home := here()
	if err := a.Do(func() error {
		inA := here()
		if err := b.Do(func() error {
			if inB := here(); inB == inA || inB == home {
				t.Error("in b it is another namespace's")
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
		if here() != inA || inA == home {
			t.Error("Do in Do does not return to a")
		}
		return unix.EXFULL
	}); err != unix.EXFULL {
		t.Errorf("Do: %v", err)
	}
	ended := make(chan bool)
	go func() {
		defer close(ended)
		t.Run("goexit", func(t *testing.T) { _ = a.Do(func() error { t.SkipNow(); return nil }) })
	}()
	<-ended
	for range 100 {
		at := make(chan uint64)
		go func() { at <- here() }()
		if <-at != home {
			t.Fatal("a goroutine runs in another namespace")
		}
	}
}

// A cable loses about the share of IPv4 frames that it is told to, and no ARP frame, and changes none.
func TestJoinLossy(t *testing.T) {
	a, b := namespaces(t)
	cable, err := JoinLossy(End{a, "wire"}, End{b, "wire"}, 0.5)
	if err != nil {
		t.Fatal(err)
	}
	const frames = 400
	up := func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		request, err := unix.NewIfreq("wire")
		if err != nil {
			return err
		}
		request.SetUint16(unix.IFF_UP)
		return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, request)
	}
	socket := func() (fd int, err error) {
		device, err := net.InterfaceByName("wire")
		if err != nil {
			return -1, err
		}
		const all = unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8 // network byte order
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, all); err == nil {
			err = unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: device.Index})
		}
		return fd, err
	}
	var from, to int
	for n, fd := range map[*Namespace]*int{a: &from, b: &to} {
		if err := n.Do(func() (err error) {
			if err = up(); err == nil {
				*fd, err = socket()
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		defer unix.Close(*fd)
	}
	send := func(etherType uint16, payload byte) {
		frame := make([]byte, 60)
		copy(frame, []byte{2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, byte(etherType >> 8), byte(etherType), payload})
		for {
			if _, err := unix.Write(from, frame); err == nil {
				return
			} else if err != unix.ENOBUFS && err != unix.ENETDOWN {
				t.Fatal(err)
			}
			time.Sleep(time.Millisecond)
		}
	}
	for i := range frames {
		send(unix.ETH_P_IP, byte(i))
	}
	send(unix.ETH_P_ARP, 0) // the last one
	if err := unix.SetsockoptTimeval(to, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 60}); err != nil {
		t.Fatal(err)
	}
	arrived, buf := 0, make([]byte, 2048)
	for {
		n, err := unix.Read(to, buf)
		if err != nil {
			t.Fatalf("after %d frames: %v", arrived, err)
		}
		if n == 60 && buf[12] == unix.ETH_P_ARP>>8 && buf[13] == unix.ETH_P_ARP&0xff && buf[6] == 2 && buf[11] == 1 {
			break
		}
		if n == 60 && buf[12] == unix.ETH_P_IP>>8 && buf[13] == 0 {
			arrived++
		}
	}
	carried, lost := cable.Counts()
	// Fair coins: fewer than 100 or more than 300 of 400 are as likely as 1 to 10^24.
	if int(carried) != arrived || carried+lost != frames || arrived < frames/4 || arrived > frames*3/4 {
		t.Errorf("of %d frames %d arrived, and the cable says that it carried %d and lost %d", frames, arrived, carried, lost)
	}
	if err := cable.Close(); err != nil {
		t.Error(err)
	}
	for _, n := range []*Namespace{a, b} {
		if slices.Contains(interfaces(t, n), "wire") {
			t.Error("the interface is left behind")
		}
	}
}
