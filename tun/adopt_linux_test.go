package tun

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ipipd/internal/handover"
	"ipipd/internal/packet"
	"ipipd/test/netlab"
)

func TestMain(m *testing.M) {
	if queues, err := strconv.Atoi(os.Getenv("TUN_PROCESS")); err == nil {
		carry(queues)
		return
	}
	os.Exit(m.Run())
}

// carry is a process that adopts the interface stored by the one before, or makes and stores one. It
// prints the interface's state, and the last byte of each packet.
func carry(queues int) {
	manager, kept, err := handover.Open()
	if err != nil {
		panic(err)
	}
	var d Device
	if fds := kept.Take("tun"); len(fds) > 0 {
		d, err = Adopt(fds, Options{Queues: queues})
	} else if d, err = Open(Options{Queues: queues}); err == nil {
		for _, q := range d.Queues() {
			err = manager.Store("tun", q.FD())
		}
	}
	if err != nil {
		panic(err)
	}
	s, err := d.State()
	fmt.Println(s.Name, s.Index, s.MTU, s.Up, s.Carrier, err)
	batch, scratch := packet.NewBatch(8, 1500), new(Scratch)
	for {
		for _, q := range d.Queues() {
			n, err := q.Read(scratch, batch)
			if err != nil {
				panic(err)
			}
			for _, b := range batch[:n] {
				p := b.Bytes()
				fmt.Println("packet", p[len(p)-1])
			}
		}
		time.Sleep(time.Millisecond)
	}
}

// startCarry starts a carry in ns, and returns its first line.
func startCarry(t *testing.T, ns *netlab.NS, m *netlab.ServiceManager, queues int) (cmd *exec.Cmd, out *bufio.Reader, first string) {
	t.Helper()
	cmd = exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), fmt.Sprintf("TUN_PROCESS=%d", queues))
	cmd.Stderr = os.Stderr
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	ns.Do(func() { m.Start(cmd) })
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	})
	out = bufio.NewReader(pipe)
	first, err = out.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return cmd, out, first
}

// The next process has the interface of one that was killed, with its index, address, routes and
// the packets that came meanwhile, each once and those of a flow in order.
func TestAdopt_killed(t *testing.T) {
	needTUN(t)
	for _, queues := range []int{1, 3} {
		ns, m := netlab.New(t), netlab.NewServiceManager(t, 10)
		cmd, _, first := startCarry(t, ns, m, queues)
		name, _, _ := strings.Cut(first, " ")
		ns.Run("ip", "address", "add", "10.9.0.1/24", "dev", name)
		ns.Run("ip", "link", "set", name, "up", "mtu", "1400")
		ns.Run("ip", "route", "add", "10.77.0.0/16", "dev", name, "metric", "7")
		show := func() string { return ns.Run("ip", "address") + ns.Run("ip", "route") }
		before := show()
		var want []byte
		send := func(from, to int) {
			c := dialIn(t, ns, fmt.Sprintf("10.9.0.1:%d", 7000+from), "10.77.0.2:7001")
			for i := from; i < to; i++ {
				if _, err := c.Write([]byte{byte(i)}); err != nil {
					t.Fatal(err)
				}
				want = append(want, byte(i))
			}
			c.Close()
		}
		for range 2 {
			want = nil
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			for flow := range 10 {
				send(flow*20, flow*20+20)
			}
			if got := show(); got != before {
				t.Errorf("without a process:\n%s\nwant\n%s", got, before)
			}
			next, out, state := startCarry(t, ns, m, queues)
			if !strings.HasPrefix(state, name+" ") || !strings.HasSuffix(state, " 1400 true true <nil>\n") {
				t.Errorf("%s, the state before was %s", state, first)
			}
			var got []byte
			for range want {
				var b byte
				line, err := out.ReadString('\n')
				if _, scanErr := fmt.Sscanf(line, "packet %d", &b); err != nil || scanErr != nil {
					t.Fatalf("%q, %v", line, err)
				}
				if i := slices.Index(got, b-1); b%20 != 0 && i < 0 {
					t.Errorf("%d comes before %d", b, b-1)
				}
				got = append(got, b)
			}
			slices.Sort(got)
			if !slices.Equal(got, want) {
				t.Errorf("%v, want %v", got, want)
			}
			if now := show(); now != before {
				t.Errorf("with the next process:\n%s\nwant\n%s", now, before)
			}
			cmd = next
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		m.Release()
		netlab.Eventually(t, "the interface is gone with the last descriptor", func() bool {
			_, err := ns.Try("ip", "link", "show", name)
			return err != nil
		})
	}
}

func needTUN(t *testing.T) {
	t.Helper()
	fd, err := unix.Open(cloneDevice, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil || os.Geteuid() != 0 {
		t.Skipf("needs /dev/net/tun and root: %v", err)
	}
	unix.Close(fd)
}

// descriptors returns duplicates of the descriptors of a Device's queues, as another process has them.
func descriptors(t *testing.T, d Device) (fds []int) {
	t.Helper()
	for _, q := range d.Queues() {
		fd, err := unix.FcntlInt(uintptr(q.FD()), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			t.Fatal(err)
		}
		fds = append(fds, fd)
	}
	return fds
}

// Descriptors that are not as Open makes them are refused, and stay the caller's.
func TestAdopt_refused(t *testing.T) {
	needTUN(t)
	ns := netlab.New(t)
	one, two, other := openIn(t, ns, Options{}), openIn(t, ns, Options{Queues: 2}), openIn(t, ns, Options{Queues: 2})
	water := openIn(t, ns, Options{NoOffload: true})
	gone := openIn(t, ns, Options{})
	ns.Run("ip", "link", "del", gone.Name())
	file, err := unix.MemfdCreate("file", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	attached := func(name string, flags uint16) int {
		fd, err := unix.Open(cloneDevice, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err == nil && name != "" {
			ns.Do(func() { err = attach(fd, name, flags) })
		}
		if err != nil {
			t.Fatal(err)
		}
		return fd
	}
	tap, plain := attached("tap0", unix.IFF_TAP|unix.IFF_NO_PI|unix.IFF_VNET_HDR), attached("tun0", unix.IFF_TUN|unix.IFF_NO_PI)
	fresh := attached("", 0)
	for _, c := range []struct {
		fds    []int
		queues int
		want   string
	}{
		{nil, 1, "it has 0 queues, want 1"},
		{descriptors(t, one), 2, "it has 1 queues, want 2"},
		{descriptors(t, two), 0, "it has 2 queues, want 1"},
		{descriptors(t, two)[:1], 1, two.Name() + " has the flags 0x5101, want 0x5001"},
		{append(descriptors(t, two)[:1], descriptors(t, other)[0]), 2, "the queues are of two interfaces"},
		{descriptors(t, water), 1, "ioctl TUNGETIFF"}, // with water FD is a pipe
		{[]int{plain}, 1, "tun0 has the flags 0x1001, want 0x5001"},
		{descriptors(t, gone), 1, "it is gone"},
		{[]int{file}, 1, "ioctl TUNGETIFF"},
		{[]int{tap}, 1, "tap0 has the flags 0x5002, want 0x5001"},
		{[]int{fresh}, 1, "it is gone"}, // or it never was
	} {
		var d Device
		ns.Do(func() { d, err = Adopt(c.fds, Options{Queues: c.queues}) })
		if err == nil || d != nil || !strings.Contains(err.Error(), c.want) || !strings.HasPrefix(err.Error(), "take over a TUN interface: ") {
			t.Errorf("%v, %v, want %s", d, err, c.want)
		}
		for _, fd := range c.fds {
			if err := unix.Close(fd); err != nil {
				t.Errorf("%s: the descriptor is closed: %v", c.want, err)
			}
		}
	}
}

// An interface that was moved to another network namespace is adopted, and stays there.
func TestAdopt_moved(t *testing.T) {
	needTUN(t)
	ns, elsewhere := netlab.New(t), netlab.New(t)
	d := openIn(t, ns, Options{})
	fds := descriptors(t, d)
	ns.Run("ip", "link", "set", d.Name(), "netns", elsewhere.Path())
	d.Close()
	var err error
	ns.Do(func() { d, err = Adopt(fds, Options{MTU: 1300}) })
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if s, err := d.State(); err == nil || !s.Moved || s.Name != d.Name() {
		t.Errorf("%+v, %v", s, err)
	}
	if got := elsewhere.Run("ip", "link", "show", d.Name()); strings.Contains(got, "mtu 1300") {
		t.Errorf("its MTU was changed: %s", got)
	}
}

// txqueuelen is set before anybody can send, on all queues.
func TestOpen_queueLength(t *testing.T) {
	needTUN(t)
	ns := netlab.New(t)
	d := openIn(t, ns, Options{Queues: 2, QueueLength: 2000})
	if got := ns.Run("ip", "link", "show", d.Name()); !strings.Contains(got, "qlen 2000\n") {
		t.Errorf("%s: want qlen 2000", got)
	}
	c := dialIn(t, ns, "10.9.0.1:7000", "10.9.0.2:7001") // one flow: one queue
	for range 2000 {
		if _, err := c.Write([]byte{1}); err != nil {
			t.Fatal(err)
		}
	}
	batch, scratch, got := packet.NewBatch(64, 1500), new(Scratch), 0
	for _, q := range d.Queues() {
		for n := 1; n > 0; got += n {
			var err error
			if n, err = q.Read(scratch, batch); err != nil {
				t.Fatal(err)
			}
		}
	}
	if got != 2000 {
		t.Errorf("%d packets are held, want 2000", got)
	}
}
