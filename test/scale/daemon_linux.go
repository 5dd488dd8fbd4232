package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// daemon is an `ipipd up`.
type daemon struct {
	cmd     *exec.Cmd
	binary  string
	runtime string
	log     bytes.Buffer
}

// startDaemon starts an ipipd up, and returns when its tunnel is there. dir is for its control socket.
func startDaemon(binary, dir string, args ...string) (*daemon, error) {
	if err := os.MkdirAll(dir, 0700); err != nil {
		return nil, err
	}
	d := &daemon{binary: binary, runtime: dir}
	d.cmd = exec.Command(binary, append([]string{"up", "--runtime-dir", dir}, args...)...)
	d.cmd.Stderr = &d.log
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := d.cmd.Start(); err != nil {
		return nil, err
	}
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if _, err := d.status(); err == nil {
			return d, nil
		}
		if time.Now().After(end) || d.cmd.Process.Signal(syscall.Signal(0)) != nil {
			d.end()
			return nil, fmt.Errorf("ipipd has not started: %s", bytes.TrimSpace(d.log.Bytes()))
		}
	}
}

// end terminates the process, which removes its interface, and waits for its end.
func (d *daemon) end() {
	_ = d.cmd.Process.Signal(syscall.SIGTERM)
	_ = d.cmd.Wait()
}

// daemonStatus is the part of print --json that is used.
type daemonStatus struct {
	Running  bool              `json:"running"`
	FastPath string            `json:"fast-path"`
	TxPacket uint64            `json:"tx-packet"`
	RxPacket uint64            `json:"rx-packet"`
	Drops    map[string]uint64 `json:"drops"`
}

func (d *daemon) status() (s daemonStatus, err error) {
	out, err := exec.Command(d.binary, "print", "--json", "--runtime-dir", d.runtime).Output()
	if err != nil {
		return s, err
	}
	var all []daemonStatus
	if err := json.Unmarshal(out, &all); err != nil {
		return s, err
	}
	if len(all) != 1 || !all[0].Running {
		return s, fmt.Errorf("the tunnel is not running: %s", out)
	}
	return all[0], nil
}

// resident returns the process's resident memory in bytes.
func (d *daemon) resident() (int, error) {
	status, err := fields(fmt.Sprintf("/proc/%d/status", d.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	n, err := strconv.Atoi(strings.TrimSuffix(status["VmRSS"], " kB"))
	return n * 1024, err
}

// processor returns the processor time of the process's threads so far.
func (d *daemon) processor() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^d.cmd.Process.Pid<<3|2), &ts); err != nil { // clock_getcpuclockid(3)
		return 0
	}
	return time.Duration(ts.Nano())
}
