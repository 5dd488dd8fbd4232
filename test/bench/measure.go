package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strconv"
	"time"
)

// sample is one tunnel's result in one round. NaN stands for "not measured".
type sample struct {
	tcp1, tcp4 float64 // goodput with 1 and 4 streams, Gb/s
	udp        float64 // received 64-byte datagrams, thousands per second
	rtt        float64 // mean of 2,000 pings 1 ms apart, us
	loaded     float64 // mean of pings during tcp1, us
	loadedP95  float64 // 95th percentile of pings during tcp1, us
}

func (s sample) String() string {
	return fmt.Sprintf("tcp1 %s Gb/s  tcp4 %s Gb/s  udp %s kpps  ping %s us  loaded %s us (95%% %s)",
		formatValue(s.tcp1), formatValue(s.tcp4), formatValue(s.udp), formatValue(s.rtt), formatValue(s.loaded), formatValue(s.loadedP95))
}

// sample measures the current tunnel. problems are the reasons of NaNs.
func (b *bench) sample(ctx context.Context) (s sample, problems []string) {
	nan := math.NaN()
	s = sample{nan, nan, nan, nan, nan, nan}
	note := func(what string, err error) {
		if err != nil {
			problems = append(problems, what+": "+err.Error())
		}
	}
	var err error

	// Ping during the middle of the transfer, without its slow start and its end.
	type pings struct {
		ms  []float64
		err error
	}
	under := make(chan pings, 1)
	go func() {
		if err := wait(ctx, 700*time.Millisecond); err != nil {
			under <- pings{err: err}
			return
		}
		const interval = 50 * time.Millisecond
		count := max(int((b.duration-time.Second)/interval), 4)
		ms, err := b.ping(ctx, count, interval)
		under <- pings{ms, err}
	}()
	s.tcp1, err = b.tcp(ctx, 1)
	note("tcp1", err)
	p := <-under
	if p.err == nil {
		s.loaded, s.loadedP95 = mean(p.ms)*1000, percentile(p.ms, 95)*1000
	}
	note("ping under load", p.err)

	s.tcp4, err = b.tcp(ctx, 4)
	note("tcp4", err)
	s.udp, err = b.udp(ctx)
	note("udp", err)
	ms, err := b.ping(ctx, 2000, time.Millisecond)
	if err == nil {
		s.rtt = mean(ms) * 1000
	}
	note("ping", err)
	return s, problems
}

// report is the part of iperf3's JSON in use.
type report struct {
	Error string `json:"error"`
	End   struct {
		SumReceived struct {
			BitsPerSecond float64 `json:"bits_per_second"`
		} `json:"sum_received"`
		Sum struct {
			Seconds float64 `json:"seconds"`
			Packets float64 `json:"packets"`
			Lost    float64 `json:"lost_packets"`
		} `json:"sum"`
	} `json:"end"`
}

// iperf3 runs one test from a to a server on b.
func (b *bench) iperf3(ctx context.Context, args ...string) (*report, error) {
	if err := b.lab.spawn("b", nil, "iperf3", "-s", "-1"); err != nil {
		return nil, err
	}
	server := b.lab.procs[len(b.lab.procs)-1]
	defer func() {
		server.end()
		b.lab.procs = b.lab.procs[:len(b.lab.procs)-1]
	}()
	if err := wait(ctx, 300*time.Millisecond); err != nil {
		return nil, err
	}
	// A stalled tunnel must not stall the run.
	limited, cancel := context.WithTimeout(ctx, b.duration+20*time.Second)
	defer cancel()
	seconds := strconv.Itoa(int(b.duration / time.Second))
	out, err := b.lab.output(limited, "a", "iperf3", append([]string{"-J", "-c", innerAddress["b"], "-t", seconds}, args...)...)
	if limited.Err() != nil && ctx.Err() == nil {
		return nil, errors.New("iperf3 did not come to an end")
	}
	var r report
	if jsonErr := json.Unmarshal(out, &r); jsonErr != nil {
		return nil, errors.Join(err, jsonErr)
	}
	if r.Error != "" {
		return nil, errors.New(r.Error)
	}
	return &r, err
}

func (b *bench) tcp(ctx context.Context, streams int) (gbps float64, err error) {
	r, err := b.iperf3(ctx, "-C", b.congestion, "-P", strconv.Itoa(streams))
	if err != nil {
		return math.NaN(), err
	}
	return r.End.SumReceived.BitsPerSecond / 1e9, nil
}

func (b *bench) udp(ctx context.Context) (kpps float64, err error) {
	r, err := b.iperf3(ctx, "-u", "-b", "0", "-l", "64")
	if err != nil {
		return math.NaN(), err
	}
	sum := r.End.Sum
	if sum.Seconds == 0 {
		return math.NaN(), errors.New("iperf3 counted no datagrams")
	}
	return (sum.Packets - sum.Lost) / sum.Seconds / 1000, nil
}

var pingTime = regexp.MustCompile(`time=([0-9.]+) ms`)

// ping returns the round-trip time of each reply in milliseconds.
func (b *bench) ping(ctx context.Context, count int, interval time.Duration) (ms []float64, err error) {
	out, err := b.lab.output(ctx, "a", "ping", "-n", "-c", strconv.Itoa(count),
		"-i", strconv.FormatFloat(interval.Seconds(), 'f', -1, 64), "-W", "2", innerAddress["b"])
	for _, m := range pingTime.FindAllSubmatch(out, -1) {
		t, err := strconv.ParseFloat(string(m[1]), 64)
		if err != nil {
			return nil, err
		}
		ms = append(ms, t)
	}
	if len(ms) == 0 {
		return nil, errors.Join(errors.New("no ping was answered"), err)
	}
	return ms, nil
}

func mean(v []float64) float64 {
	var sum float64
	for _, x := range v {
		sum += x
	}
	return sum / float64(len(v))
}

func percentile(v []float64, p int) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[(len(v)-1)*p/100]
}
