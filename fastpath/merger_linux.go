package fastpath

import (
	"errors"

	"github.com/cilium/ebpf"
)

// OpenMerger has what comes out of m delivered to the tunnels that it was received
// for. A FastPath has one merger at a time.
func (f *FastPath) OpenMerger(m Merger) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.objects == nil {
		return ErrClosed
	}
	if f.merger != nil {
		return errors.New("there is a merger already")
	}
	near, err := attach(m.Near, f.objects.Merged, ebpf.AttachTCXIngress)
	if err != nil {
		return err
	}
	f.merger = append(f.merger, near)
	err = m.InFar(func() error {
		far, err := attach(m.Far, f.objects.Cross, ebpf.AttachTCXIngress)
		if err != nil {
			return err
		}
		f.merger = append(f.merger, far)
		return nil
	})
	if err != nil {
		_ = f.closeMerger()
	}
	return err
}

// CloseMerger lets go of the merger. No tunnel may use it any more; what is on its way
// through it is lost.
func (f *FastPath) CloseMerger() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.closeMerger()
}

// closeMerger is CloseMerger for a caller who holds mu.
func (f *FastPath) closeMerger() error {
	var errs []error
	for _, l := range f.merger {
		errs = append(errs, l.Close())
	}
	f.merger = nil
	return errors.Join(errs...)
}
