package control

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// serveTunnels serves a process with several tunnels, which Down ends one by one.
func serveTunnels(t *testing.T, dir string, names ...string) *Server {
	t.Helper()
	s, err := Listen(t.Context(), dir, names...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	go s.Serve(Handler{
		Status: func(name string) (any, error) {
			if name == "" {
				all := []status{}
				for _, n := range names {
					all = append(all, status{n})
				}
				return all, nil
			}
			if !slices.Contains(names, name) {
				return nil, ErrNotRunning
			}
			return status{name}, nil
		},
		Samples: func() (any, error) { return len(names), nil },
		Export:  func() (any, error) { return names, nil },
		Down:    func(name string) { s.Release(name) },
		Change: func(_ context.Context, r Request) (Result, error) {
			if r.Action == Reload {
				return Result{}, &Refusal{Message: "x.yaml:1:1: wrong", Input: true}
			}
			return Result{Name: fmt.Sprint(r)}, nil
		},
		Diff: func(files []File) (Comparison, error) {
			if len(files) == 0 {
				return Comparison{}, errors.New("no file")
			}
			return Comparison{Tunnels: []Difference{{Name: fmt.Sprint(files[0].Name, len(files[0].Data)), Action: "again", Properties: []string{"dscp"}, Why: "x"}}}, nil
		},
	})
	return s
}

// Processes finds each process once, although each of its tunnels has a socket file.
func TestProcesses(t *testing.T) {
	dir := t.TempDir()
	serveTunnels(t, dir, "ipip2", "ipip1")
	serveTunnels(t, dir)
	makeStale(t, dir, "old")
	processes, err := Processes(dir)
	if err != nil || len(processes) != 3 {
		t.Fatalf("%v, %v", processes, err)
	}
	var all []status
	if err := processes[0].Statuses(dir, patience, &all); err != nil || !slices.Equal(all, []status{{"ipip2"}, {"ipip1"}}) {
		t.Errorf("Statuses = %v, %v", all, err)
	}
	var exported []string
	if err := processes[0].Export(dir, patience, &exported); err != nil || !slices.Equal(exported, []string{"ipip2", "ipip1"}) {
		t.Errorf("Export = %v, %v", exported, err)
	}
	var samples int
	if err := processes[0].Samples(dir, patience, &samples); err != nil || samples != 2 {
		t.Errorf("Samples = %v, %v", samples, err)
	}
	ids := map[string]bool{processes[0].ID(): true, processes[1].ID(): true, processes[2].ID(): true}
	if len(ids) != 3 {
		t.Errorf("IDs %v", ids)
	}
	if !slices.Equal(processes[0].Names, []string{"ipip1", "ipip2"}) {
		t.Errorf("Names = %v", processes[0].Names)
	}
	if err := processes[1].Statuses(dir, patience, &all); err != ErrNotRunning || processes[1].Names[0] != "old" {
		t.Errorf("stale: %v", err)
	}
	// One without a tunnel is found, too.
	if err := processes[2].Statuses(dir, patience, &all); err != nil || len(all) != 0 {
		t.Errorf("none: %v, %v", all, err)
	}
	for i := range processes {
		processes[i].Sweep(dir)
	}
	if names, _ := List(dir); len(names) != 2 {
		t.Errorf("left: %v", names)
	}
}

// A request finds the process although the tunnel whose name was listed has ended since.
func TestProcess_tunnelEnded(t *testing.T) {
	dir := t.TempDir()
	s := serveTunnels(t, dir, "ipip1", "ipip2")
	processes, err := Processes(dir)
	if err != nil {
		t.Fatal(err)
	}
	s.Release("ipip1")
	var all []status
	if err := processes[0].Statuses(dir, patience, &all); err != nil || len(all) != 2 {
		t.Errorf("%v, %v", all, err)
	}
}

func TestProcess_refusal(t *testing.T) {
	dir := t.TempDir()
	serveTunnels(t, dir, "ipip1")
	processes, err := Processes(dir)
	if err != nil {
		t.Fatal(err)
	}
	var refused *Refusal
	if _, err := processes[0].Change(dir, patience, Request{Action: Reload}); !errors.As(err, &refused) || !refused.Input || refused.Message != "x.yaml:1:1: wrong" {
		t.Errorf("Reload: %v", err)
	}
	if c, err := processes[0].Diff(dir, patience, []File{{"a", make([]byte, 20<<20)}}); err != nil || fmt.Sprint(c.Tunnels) != "[{a20971520 again [dscp] x}]" || !c.UndoAt.IsZero() {
		t.Errorf("Diff: %v, %v", c, err)
	}
	if _, err := processes[0].Diff(dir, patience, []File{{"a", make([]byte, 25<<20)}}); err == nil || err.Error() != "what ipip1 is asked for has more than 32768 KiB: ask for it in several steps" {
		t.Errorf("too much: %v", err)
	}
	if _, err := processes[0].Diff(dir, patience, nil); !errors.As(err, &refused) || refused.Input || refused.Message != "no file" {
		t.Errorf("Diff: %v", err)
	}
}

// A process that does not answer at all is given up after hungAfter, however long a change may take.
func TestProcess_hung(t *testing.T) {
	dir := t.TempDir()
	hung, err := Listen(t.Context(), dir, "ipip1")
	if err != nil {
		t.Fatal(err)
	}
	defer hung.Close()
	defer func(before time.Duration) { hungAfter = before }(hungAfter)
	hungAfter = 50 * time.Millisecond
	processes, err := Processes(dir)
	if err != nil {
		t.Fatal(err)
	}
	var timeout *TimeoutError
	if _, err := processes[0].Change(dir, time.Hour, Request{Action: Reload}); !errors.As(err, &timeout) {
		t.Errorf("Change: %v", err)
	}
	if _, err := processes[0].Diff(dir, time.Hour, nil); !errors.As(err, &timeout) {
		t.Errorf("Diff: %v", err)
	}
}

// Each action reaches the process with all its names and settings; what is too large is not sent.
func TestProcess_change(t *testing.T) {
	dir := t.TempDir()
	serveTunnels(t, dir, "ipip1")
	processes, err := Processes(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, action := range []string{Set, Add, Remove, Enable, Disable} {
		r := Request{Action: action, Names: []string{"ipip1", "a b"}, Settings: []Setting{{"dscp", []byte("46")}, {"ipsec-secret", []byte("\xff\x00")}, {"mtu", []byte{}}}}
		if got, err := processes[0].Change(dir, patience, r); err != nil || got.Name != fmt.Sprint(r) {
			t.Errorf("%v, %v, want %v", got, err, r)
		}
	}
	r := Request{Action: Set, Settings: []Setting{{"comment", make([]byte, maxBodyBytes)}}}
	if _, err := processes[0].Change(dir, patience, r); err == nil || err.Error() != "what ipip1 is asked for has more than 64 KiB: ask for it in several steps" {
		t.Errorf("too much: %v", err)
	}
}

// Down of one of several tunnels leaves the others.
func TestDown_oneOfSeveral(t *testing.T) {
	dir := t.TempDir()
	s := serveTunnels(t, dir, "ipip1", "ipip2")
	if err := Down(dir, "ipip1", patience, patience, nil); err != nil {
		t.Fatal(err)
	}
	var got status
	if err := Status(dir, "ipip1", patience, &got); err != ErrNotRunning {
		t.Errorf("Status of it: %v", err)
	}
	if err := Status(dir, "ipip2", patience, &got); err != nil {
		t.Errorf("Status of the other: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Errorf("left: %v", entries)
	}
}

// All names are reserved, or none.
func TestServerReserve(t *testing.T) {
	dir := t.TempDir()
	serve(t, dir, "ipip2")
	s := serveTunnels(t, dir, "ipip1")
	var taken *TakenError
	if err := s.Reserve(t.Context(), "ipip1", "ipip3", "ipip2"); !errors.As(err, &taken) || taken.Name != "ipip2" {
		t.Fatalf("Reserve: %v", err)
	}
	names, _ := List(dir)
	slices.Sort(names)
	if !slices.Equal(names, []string{"ipip1", "ipip2"}) {
		t.Errorf("afterwards: %v", names)
	}
	makeStale(t, dir, "ipip3")
	if err := s.Reserve(t.Context(), "ipip1", "ipip3"); err != nil {
		t.Fatal(err)
	}
	info, err := os.Lstat(filepath.Join(dir, "ipip3.sock"))
	if err != nil || !sameSocket(info, s.info) {
		t.Errorf("ipip3: %v, %v", info, err)
	}
}

// Beside maxClients idle clients another one waits, and is served once one of them goes.
func TestServer_manyClients(t *testing.T) {
	dir := t.TempDir()
	s := serveTunnels(t, dir, "ipip1")
	var idle []net.Conn
	for range maxClients {
		c, err := net.Dial("unix", s.path)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		idle = append(idle, c)
	}
	var got status
	var timeout *TimeoutError
	if err := Status(dir, "ipip1", shortWait, &got); !errors.As(err, &timeout) {
		t.Errorf("beside them: %v", err)
	}
	idle[0].Close()
	if err := Status(dir, "ipip1", patience, &got); err != nil {
		t.Errorf("once one is gone: %v", err)
	}
}
