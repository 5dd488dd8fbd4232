package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// What observation costs a loaded tunnel: TCP through it, in turns for a while with a capture, a monitor and a scrape
// each second, and for a while without. The lab is that of -many.

// seeingSetting is what -seeing measures.
type seeingSetting struct {
	Binary  string
	Capture string // its flags, separated by spaces
	Monitor bool   // monitor and scrape, too
	Rounds  int
	For     time.Duration
}

// seen has the figures of one period, of the tunnel and of the capture.
type seen struct {
	bits             float64 // a second
	cpu              float64 // of the captured process, seconds for 1e9 bytes
	captured, missed float64 // packets a second
	client           float64 // processor time of the capture's own process, seconds for a packet
}

func seeing(s seeingSetting) error {
	text, err := json.Marshal(s)
	if err != nil {
		return err
	}
	cmd := inNamespace("seen", string(text))
	cmd.Stdout = os.Stdout
	return cmd.Run()
}

// seeingHub is the process of the hub, which sends and is captured.
func seeingHub(text string) (err error) {
	var s seeingSetting
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		return err
	}
	fmt.Printf("capture %s, monitor and scrape: %v; %d rounds of 2 × %v with and 2 × %v without\n\n", s.Capture, s.Monitor, s.Rounds, s.For, s.For)
	fmt.Println("| path | without, Gb/s | with, Gb/s | ratio of goodput (least, most) | processor, s a GB without | with | ratio | captured, packets/s | not captured, % | the client, ns a packet |")
	fmt.Println("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
	dir, err := os.MkdirTemp("", "ipipd-scale-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	for i, path := range []string{"fast", "userspace"} {
		if err := s.path(filepath.Join(dir, path), path, i == 0); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	return nil
}

// path measures one data path.
func (s *seeingSetting) path(dir, path string, first bool) (err error) {
	allow := map[string]string{"fast": "yes", "userspace": "no"}[path]
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	far := inNamespace("seenfar", s.Binary, dir, allow)
	end, err := startFar(far)
	if err != nil {
		return err
	}
	defer func() { err = cmp.Or(err, end()) }()
	metrics := filepath.Join(dir, "metrics")
	d, err := startDaemon(s.Binary, filepath.Join(dir, "hub"), "--name", "t0", "--local-address", "192.0.2.1", "--remote-address", "192.0.2.254",
		"--address", "10.255.0.1/24", "--keepalive", "off", "--allow-fast-path", allow, "--metrics-address", "unix:"+metrics)
	if err != nil {
		return err
	}
	defer d.end()
	var bytes atomic.Int64
	var writers sync.WaitGroup
	defer writers.Wait()
	for range streams {
		conn, err := net.DialTimeout("tcp4", "10.255.0.2:"+strconv.Itoa(sinkPort), 10*time.Second)
		if err != nil {
			return err
		}
		defer conn.Close() // before Wait
		writers.Go(func() { fill(conn, &bytes) })
	}
	time.Sleep(time.Second)
	var with, without []seen
	for range s.Rounds {
		for _, on := range []bool{false, true, true, false} {
			var stop func() (seen, error)
			if on {
				if stop, err = s.look(d, metrics); err != nil {
					return err
				}
				time.Sleep(200 * time.Millisecond)
			}
			before, cpu, began := bytes.Load(), d.processor(), time.Now()
			time.Sleep(s.For)
			sent, took := float64(bytes.Load()-before), time.Since(began)
			m := seen{bits: sent * 8 / took.Seconds(), cpu: (d.processor() - cpu).Seconds() / sent * 1e9}
			if !on {
				without = append(without, m)
				continue
			}
			of, err := stop()
			if err != nil {
				return err
			}
			m.captured, m.missed, m.client = of.captured/took.Seconds(), of.missed/took.Seconds(), of.client
			with = append(with, m)
		}
	}
	median := func(of []seen, figure func(i int) float64) float64 {
		all := make([]float64, len(of))
		for i := range of {
			all[i] = figure(i)
		}
		slices.Sort(all)
		return (all[(len(all)-1)/2] + all[len(all)/2]) / 2
	}
	goodput := make([]float64, len(with)) // each beside the one before or after it
	for i := range with {
		goodput[i] = with[i].bits / without[i].bits
	}
	fmt.Printf("| %s | %.2f | %.2f | %.3f (%.2f, %.2f) | %.2f | %.2f | %.2f | %.0f | %.0f | %.0f |\n", path,
		median(without, func(i int) float64 { return without[i].bits })/1e9, median(with, func(i int) float64 { return with[i].bits })/1e9,
		median(with, func(i int) float64 { return goodput[i] }), slices.Min(goodput), slices.Max(goodput),
		median(without, func(i int) float64 { return without[i].cpu }), median(with, func(i int) float64 { return with[i].cpu }),
		median(with, func(i int) float64 { return with[i].cpu / without[i].cpu }),
		median(with, func(i int) float64 { return with[i].captured }),
		median(with, func(i int) float64 { return 100 * with[i].missed / max(1, with[i].missed+with[i].captured) }),
		median(with, func(i int) float64 { return with[i].client })*1e9)
	return nil
}

// look captures the tunnel, and monitors and scrapes it each second, until stop.
func (s *seeingSetting) look(d *daemon, metrics string) (stop func() (seen, error), err error) {
	file := d.runtime + "/t0.pcapng"
	_ = os.Remove(file)
	capture := exec.Command(d.binary, append([]string{"capture", "t0", "-w", file, "--runtime-dir", d.runtime}, strings.Fields(s.Capture)...)...)
	var said strings.Builder
	capture.Stderr = &said
	monitor := exec.Command(d.binary, "monitor", "--json", "--runtime-dir", d.runtime)
	running := []*exec.Cmd{capture}
	if s.Monitor {
		running = append(running, monitor)
	}
	for _, cmd := range running {
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := cmd.Start(); err != nil {
			return nil, err
		}
	}
	done := make(chan struct{})
	var scraper sync.WaitGroup
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", metrics)
	}}}
	if s.Monitor {
		scraper.Go(func() {
			for {
				select {
				case <-done:
					return
				case <-time.After(time.Second):
				}
				if r, err := client.Get("http://t0/metrics"); err == nil {
					_, _ = io.Copy(io.Discard, r.Body)
					r.Body.Close()
				}
			}
		})
	}
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if info, err := os.Stat(file); err == nil && info.Size() > 0 {
			break
		}
		if time.Now().After(end) {
			return nil, fmt.Errorf("the capture does not begin: %s", said.String())
		}
	}
	return func() (m seen, err error) {
		close(done)
		scraper.Wait()
		for _, cmd := range running {
			_ = cmd.Process.Signal(syscall.SIGTERM)
			err = cmp.Or(err, cmd.Wait())
		}
		numbers := regexp.MustCompile(`^(\d+) packets? captured, (\d+) not written`).FindStringSubmatch(said.String())
		if numbers == nil {
			return m, fmt.Errorf("the capture: %v: %s", err, said.String())
		}
		m.captured, _ = strconv.ParseFloat(numbers[1], 64)
		m.missed, _ = strconv.ParseFloat(numbers[2], 64)
		m.client = (capture.ProcessState.UserTime() + capture.ProcessState.SystemTime()).Seconds() / max(1, m.captured)
		return m, nil
	}, nil
}

// seeingFar is the process of the far end.
func seeingFar(binary, dir, allow string) error {
	if _, err := os.Stdin.Read(make([]byte, 1)); err != nil { // until u1 is there
		return err
	}
	if err := ip("link set lo up\naddress add 192.0.2.254/24 dev u1\nlink set u1 up\n"); err != nil {
		return err
	}
	d, err := startDaemon(binary, filepath.Join(dir, "far"), "--name", "t0", "--local-address", "192.0.2.254", "--remote-address", "192.0.2.1",
		"--address", "10.255.0.2/24", "--keepalive", "off", "--allow-fast-path", allow)
	if err != nil {
		return err
	}
	defer d.end()
	return sink()
}
