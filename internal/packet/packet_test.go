package packet

import (
	"bytes"
	"testing"
)

func TestNew(t *testing.T) {
	for _, b := range append(NewBatch(3, 1500), New(1500)) {
		if b.Len() != 0 || len(b.Bytes()) != 0 {
			t.Errorf("it holds %d bytes", b.Len())
		}
		if n := len(b.Space()); n != 1500 {
			t.Errorf("Space has %d bytes", n)
		}
	}
}

// Push and Pull move the start, and Trim the end, in place.
func TestBufferPush(t *testing.T) {
	b := New(100)
	b.Set([]byte("payload"))
	copy(b.Push(6), "outer ")
	if got := string(b.Bytes()); got != "outer payload" {
		t.Errorf("%q", got)
	}
	b.Pull(6)
	b.Trim(3)
	if got := string(b.Bytes()); got != "pay" {
		t.Errorf("%q", got)
	}
	b.SetLen(7) // Trim keeps the bytes
	if got := string(b.Bytes()); got != "payload" {
		t.Errorf("%q", got)
	}
}

func TestBufferPush_headroom(t *testing.T) {
	b := New(10)
	b.Set(make([]byte, 10))
	b.Push(Headroom)
	if b.Len() != Headroom+10 {
		t.Errorf("%d bytes", b.Len())
	}
	mustPanic(t, "Push without headroom", func() { b.Push(1) })
}

func TestBufferSetLen_tailroom(t *testing.T) {
	b := New(10)
	b.Set(make([]byte, 10))
	b.SetLen(10 + Tailroom)
	mustPanic(t, "SetLen beyond the tailroom", func() { b.SetLen(10 + Tailroom + 1) })
}

func TestBuffer_outOfRange(t *testing.T) {
	b := New(10)
	b.Set(make([]byte, 4))
	mustPanic(t, "Pull", func() { b.Pull(5) })
	mustPanic(t, "Trim", func() { b.Trim(5) })
	mustPanic(t, "Set", func() { b.Set(make([]byte, 11)) })
}

func TestBufferSpace(t *testing.T) {
	b := New(10)
	b.Set([]byte{1})
	b.Push(4)
	b.Offload = Offload{Checksum: ChecksumPartial, SegmentSize: 1}
	b.Space()
	if b.Len() != 0 || b.Offload != (Offload{}) {
		t.Errorf("%d bytes, %+v", b.Len(), b.Offload)
	}
}

func TestNewBatch(t *testing.T) {
	batch := NewBatch(3, 50)
	for i, b := range batch {
		b.Set(bytes.Repeat([]byte{byte(i + 1)}, 50))
		for j := range b.Push(Headroom) {
			b.Bytes()[j] = byte(i + 1)
		}
		b.SetLen(Headroom + 50 + Tailroom)
		for j := Headroom + 50; j < b.Len(); j++ {
			b.Bytes()[j] = byte(i + 1)
		}
	}
	for i, b := range batch {
		if !bytes.Equal(b.Bytes(), bytes.Repeat([]byte{byte(i + 1)}, Headroom+50+Tailroom)) {
			t.Errorf("buffer %d was written by another", i)
		}
	}
}

func mustPanic(t *testing.T, what string, f func()) {
	t.Helper()
	defer func() {
		if recover() == nil {
			t.Errorf("%s did not panic", what)
		}
	}()
	f()
}
