package tunnel

import (
	"testing"

	"golang.org/x/sys/unix"

	"ipipd/internal/drop"
)

// The entry of an adopted interface goes on. Others begin at zero, in an entry that is free or was given up.
func TestLedger(t *testing.T) {
	fd := ledgerFile(t, ledgerBytes, ledgerSeals)
	open := func() *ledger {
		t.Helper()
		mem, err := mapLedger(fd)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Munmap(mem) })
		return ledgerOf(mem)
	}
	first := open()
	for ifindex := 1; ifindex <= 3; ifindex++ {
		entry, old := first.take(ifindex, true)
		if entry == nil || old {
			t.Fatalf("%v, old: %v", entry, old)
		}
		entry.rx.add(ifindex, 100)
		entry.drops.Add(drop.Loop, uint64(ifindex))
	}
	next := open()
	total := func(e *ledgerEntry) uint64 { n, _ := e.rx.load(); return n + e.drops.Load(drop.Loop) }
	if entry, old := next.take(1, true); !old || total(entry) != 2 {
		t.Errorf("adopted: %v, %d", old, total(entry))
	}
	another, old := next.take(2, false) // an interface made with that index
	if old || total(another) != 0 {
		t.Errorf("not adopted: %v, %d", old, total(another))
	}
	next.settle()
	used := 0
	for i := range next.entries {
		if next.entries[i].ifindex.Load() != 0 {
			used++
		}
	}
	if used != 2 {
		t.Errorf("%d entries are used", used)
	}
	another.rx.add(1, 100)
	for ifindex := 4; ifindex <= 6; ifindex++ { // as many as were freed, and one
		if entry, old := next.take(ifindex, false); old || entry == another || total(another) != 1 {
			t.Errorf("interface %d: %v, the entry of another: %v, which has %d", ifindex, old, entry == another, total(another))
		}
	}
	var none *ledger
	if entry, _ := none.take(1, true); entry != nil {
		t.Error("there is an entry of none")
	}
	none.settle()
}

// A file that could shrink, or is of another size, is not mapped.
func TestMapLedger_damaged(t *testing.T) {
	for name, fd := range map[string]int{
		"no seals":     ledgerFile(t, ledgerBytes, 0),
		"another size": ledgerFile(t, ledgerBytes-1, ledgerSeals),
		"empty":        ledgerFile(t, 0, ledgerSeals),
		"a socket": func() int {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = unix.Close(fd) })
			return fd
		}(),
		"closed": -1,
	} {
		if _, err := mapLedger(fd); err == nil {
			t.Errorf("%s: it is mapped", name)
		}
	}
}

func ledgerFile(t *testing.T, size, seals int) int {
	t.Helper()
	fd, err := unix.MemfdCreate("ledger", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
		t.Fatal(err)
	}
	return fd
}
