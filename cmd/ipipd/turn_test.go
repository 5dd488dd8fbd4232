package main

import (
	"context"
	"testing"
	"time"
)

// hurry has those give up that hold the turn or wait for it, and nobody who comes later.
func TestTurn_hurry(t *testing.T) {
	turn := newTurn()
	holder, end, err := turn.take(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := turn.take(t.Context(), time.Millisecond); err != errBusy {
		t.Errorf("beside it: %v", err)
	}
	why := givenUpError("down")
	waiting := make(chan error, 1)
	go func() {
		_, _, err := turn.take(t.Context(), 0)
		waiting <- err
	}()
	for err = nil; err == nil; { // until it waits
		turn.hurry(why)
		select {
		case err = <-waiting:
		case <-time.After(time.Millisecond):
		}
	}
	if err != why {
		t.Errorf("who waits: %v", err)
	}
	<-holder.Done()
	if context.Cause(holder) != why {
		t.Errorf("who holds it: %v", context.Cause(holder))
	}
	end()
	ctx, end, err := turn.take(t.Context(), 0)
	if err != nil || ctx.Err() != nil {
		t.Errorf("afterwards: %v, %v", err, ctx.Err())
	}
	end()
	turn.lock()()
}
