package tunnel

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"ipipd/internal/drop"
	"ipipd/internal/handover"
)

// ledgerSize is how many tunnels have an entry: as many as the fast path takes. The counters of others begin anew
// with each process.
const ledgerSize = 4096

const (
	keptLedger  = "counters-" // then a hash of the layout
	ledgerBytes = int(unsafe.Sizeof(ledgerEntry{})) * ledgerSize
	ledgerSeals = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL // a file that shrinks would be a SIGBUS
)

// ledgerName returns the name under which the ledger is kept: another layout has another name.
func ledgerName() string {
	h := sha256.New()
	fmt.Fprintln(h, ledgerBytes, ledgerSize)
	for r := range drop.All() {
		fmt.Fprintln(h, r.String())
	}
	return fmt.Sprintf("%s%x", keptLedger, h.Sum(nil)[:8])
}

// openLedger takes over the ledger of the process before, or makes one. err is why the former cannot be used, or
// the latter not made.
func openLedger(manager *handover.Manager, kept handover.Kept) (l *ledger, err error) {
	if manager == nil {
		return nil, nil
	}
	var mem []byte
	anew := false
	for _, name := range kept.Names() {
		if !strings.HasPrefix(name, keptLedger) {
			continue
		}
		fds := kept.Take(name)
		if name != ledgerName() {
			err = errors.New("those of the process before have another layout")
		} else if mem, err = mapLedger(fds[0]); err != nil {
			err = fmt.Errorf("what is kept as the counters is none of this process: %w", err)
		}
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
		if err != nil {
			anew = true
			err = errors.Join(err, manager.Remove(name))
		}
	}
	if mem != nil {
		return ledgerOf(mem), nil
	}
	fd, failed := unix.MemfdCreate("ipipd-counters", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if failed != nil {
		return nil, errors.Join(err, os.NewSyscallError("memfd_create", failed))
	}
	defer unix.Close(fd)
	if failed = unix.Ftruncate(fd, int64(ledgerBytes)); failed == nil {
		_, failed = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, ledgerSeals)
	}
	if failed == nil {
		mem, failed = mapLedger(fd)
	}
	if failed != nil {
		return nil, errors.Join(err, failed)
	}
	l = ledgerOf(mem)
	l.anew = anew
	return l, errors.Join(err, manager.Store(ledgerName(), fd))
}

// mapLedger maps the memory of a descriptor, which stays the caller's.
func mapLedger(fd int) ([]byte, error) {
	var s unix.Stat_t
	if err := unix.Fstat(fd, &s); err != nil {
		return nil, os.NewSyscallError("fstat", err)
	}
	if seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0); err != nil || seals&ledgerSeals != ledgerSeals || s.Size != int64(ledgerBytes) {
		return nil, fmt.Errorf("it is not sealed, or has not %d bytes", ledgerBytes)
	}
	mem, err := unix.Mmap(fd, 0, ledgerBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	return mem, os.NewSyscallError("mmap", err)
}

// ledgerOf returns the ledger in mem, whose used entries are those of the process before.
func ledgerOf(mem []byte) *ledger {
	entries := unsafe.Slice((*ledgerEntry)(unsafe.Pointer(&mem[0])), ledgerSize)
	l := &ledger{entries: entries, old: map[*ledgerEntry]bool{}}
	for i := range entries {
		if e := &entries[i]; e.ifindex.Load() != 0 {
			l.old[e] = true
		}
	}
	return l
}

// dropLedger has the manager give up the ledger, unless the next process goes on with it.
func (e *Engine) dropLedger() error {
	if e.ledger == nil || e.leaving.Load() {
		return nil
	}
	return e.manager.Remove(ledgerName())
}
