package main

import (
	"context"
	"errors"
	"sync"
	"time"
)

// turn is held by who changes what runs, DNS look-ups included.
type turn struct {
	held chan struct{} // of one

	mu      sync.Mutex
	hurried context.Context // canceled by hurry
	cancel  context.CancelCauseFunc
}

var errBusy = errors.New("another change is under way: try again when it is done")

// givenUpError is what hurry is called for.
type givenUpError string

func (e givenUpError) Error() string { return "given up for " + string(e) + ": try again" }

func newTurn() *turn {
	t := &turn{held: make(chan struct{}, 1)}
	t.hurried, t.cancel = context.WithCancelCause(context.Background())
	return t
}

// lock waits for the turn, however long that takes.
func (t *turn) lock() (end func()) {
	t.held <- struct{}{}
	return func() { <-t.held }
}

// take waits for the turn, for patience if that is not zero. Its context ends with ctx, and by
// hurry. It fails with errBusy, or with why that context has ended.
func (t *turn) take(ctx context.Context, patience time.Duration) (_ context.Context, end func(), err error) {
	t.mu.Lock()
	hurried := t.hurried
	t.mu.Unlock()
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(hurried, func() { cancel(context.Cause(hurried)) })
	done := func() {
		stop()
		cancel(nil)
	}
	var late <-chan time.Time
	if patience > 0 {
		late = time.After(patience)
	}
	select {
	case t.held <- struct{}{}:
		return ctx, func() { done(); <-t.held }, nil
	case <-late:
		err = errBusy
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	done()
	return nil, nil, err
}

// hurry has those who hold the turn, or wait for it, give up: a look-up may take long.
func (t *turn) hurry(why givenUpError) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.cancel(why)
	t.hurried, t.cancel = context.WithCancelCause(context.Background())
}
