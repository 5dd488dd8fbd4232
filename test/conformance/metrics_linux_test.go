package conformance

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"ipipd/test/netlab"
)

// scrape returns the series at a unix socket, which is reached from every network namespace.
func scrape(t *testing.T, socket string) map[string]float64 {
	t.Helper()
	found := map[string]float64{}
	for line := range strings.Lines(string(fetch(t, socket, "/metrics", http.StatusOK))) {
		if line = strings.TrimSpace(line); strings.HasPrefix(line, "#") {
			continue
		}
		at := strings.LastIndexByte(line, ' ')
		v, err := strconv.ParseFloat(line[at+1:], 64)
		if err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		found[line[:at]] = v
	}
	return found
}

// fetch gets a path at a unix socket.
func fetch(t *testing.T, socket, path string, status int) []byte {
	t.Helper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(context.Context, string, string) (net.Conn, error) {
		return net.Dial("unix", socket)
	}}}
	response, err := client.Get("http://ipipd" + path)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil || response.StatusCode != status {
		t.Fatalf("%s: %s, %v: %s", path, response.Status, err, text)
	}
	return text
}

// Metrics have the values that print shows, in userspace and with the fast path.
func TestMetrics_print(t *testing.T) {
	t.Parallel()
	eachVariant(t, func(t *testing.T, c variant) {
		a, b := hosts(t)
		socket := filepath.Join(t.TempDir(), "metrics.sock")
		flags := []string{"--keepalive", "1m,10", "--keepalive-probe", "echo", "--keepalive-target", innerB, "--comment", `a "b"`, "--metrics-address", "unix:" + socket}
		db := c.upB(t, b) // first, so that no probe of a makes it say protocol unreachable
		da := c.upA(t, a, flags...)
		if c.fast {
			requireFastPath(t, da)
		}
		if text := string(fetch(t, socket, "/readyz", http.StatusOK)); text != "ready\n" {
			t.Errorf("readyz: %q", text)
		}
		transfer(t, a, b, innerB, 1<<20)
		transfer(t, b, a, innerA, 1<<20)
		a.Run("ping", "-c", "1", "-M", "do", "-s", "1400", "-w", netlab.Seconds(netlab.Timeout()), innerB)
		ends{da, db}.awaitIdle(t)
		var got map[string]float64
		var want netlab.Status
		of := func(metric string, labels ...string) float64 {
			return got["ipipd_tunnel_"+metric+"{"+strings.Join(append([]string{`tunnel="t0"`}, labels...), ",")+"}"]
		}
		netlab.Eventually(t, "a scrape and print say the same", func() bool {
			before := da.Status()
			got = scrape(t, socket)
			want = da.Status()
			return fmt.Sprint(before) == fmt.Sprint(want) // nothing came in between
		})
		for metric, n := range map[string]uint64{
			"receive_packets_total": want.RxPacket, "receive_bytes_total": want.RxByte,
			"transmit_packets_total": want.TxPacket, "transmit_bytes_total": want.TxByte,
			"mtu_bytes": uint64(want.ActualMTU), "path_mtu_bytes": uint64(want.PathMTU), "running": 1, "disabled": 0,
		} {
			if of(metric) != float64(n) {
				t.Errorf("%s is %v, print says %d", metric, of(metric), n)
			}
		}
		if of("receive_bytes_total") < 1<<20 || of("transmit_bytes_total") < 1<<20 {
			t.Errorf("1 MiB each way, and received %v, sent %v", of("receive_bytes_total"), of("transmit_bytes_total"))
		}
		if fast := of("fast_path_active") == 1; fast != (want.FastPath == "active") {
			t.Errorf("the fast path is active: %v, print says %s", fast, want.FastPath)
		}
		dropped := map[string]uint64{}
		for series, n := range got {
			if _, reason, ok := strings.Cut(series, `reason="`); ok && n > 0 && strings.HasPrefix(series, "ipipd_tunnel_dropped_") {
				dropped[strings.TrimSuffix(reason, `"}`)] = uint64(n)
			}
		}
		if fmt.Sprint(dropped) != fmt.Sprint(want.Drops) {
			t.Errorf("dropped %v, print says %v", dropped, want.Drops)
		}
		if of("info", `interface="t0"`, `local_address="`+outerA+`"`, `remote_address="`+outerB+`"`, `comment="a \"b\""`) != 1 {
			t.Error("there is no ipipd_tunnel_info with its addresses and comment")
		}
		netlab.Eventually(t, "a probe is answered", func() bool {
			got = scrape(t, socket)
			return of("keepalive_probes_answered_total") > 0 && of("keepalive_round_trip_seconds") > 0
		})
		if sent, answered := of("keepalive_probes_sent_total"), of("keepalive_probes_answered_total"); answered > sent {
			t.Errorf("%v probes, %v answers", sent, answered)
		}
		netlab.Eventually(t, "the page says what print says, and has a reading", func() bool {
			all := string(fetch(t, socket, "/", http.StatusOK))
			now := fmt.Sprint(da.Status().RxPacket, " packets")
			one := string(fetch(t, socket, "/t0", http.StatusOK))
			return strings.Contains(all, "a &#34;b&#34;") && strings.Contains(all, "<svg") && strings.Contains(one, outerB) && strings.Contains(one, now)
		})
		if status := da.Stop(syscall.SIGTERM); status != 0 {
			t.Errorf("exit status %d", status)
		}
		if _, err := os.Lstat(socket); !os.IsNotExist(err) {
			t.Errorf("the socket is left: %v", err)
		}
	})
}

// The SAs of an encrypted tunnel have metrics, and so has its process, though its memory cannot be dumped.
func TestMetrics_ipsec(t *testing.T) {
	t.Parallel()
	a, b := hosts(t)
	socket := filepath.Join(t.TempDir(), "metrics.sock")
	secret := []string{"--ipsec-secret", "a secret that is as long as it should be", "--keepalive", "off"}
	upB(t, b, secret...)
	upA(t, a, append(secret, "--metrics-address", socket, "--ipsec-lifetime", "1d,30m")...)
	var got map[string]float64
	of := func(metric string) float64 { return got["ipipd_tunnel_ipsec_"+metric+`{tunnel="t0"}`] }
	netlab.Eventually(t, "there is an SA", func() bool {
		got = scrape(t, socket)
		return of("established") == 1
	})
	if of("sas_total") < 1 {
		t.Errorf("%v SAs", of("sas_total"))
	}
	if since, until := of("established_timestamp_seconds"), of("rekey_timestamp_seconds"); since == 0 || until-since < 600 || until-since > 1800 {
		t.Errorf("established at %v, replaced at %v", since, until)
	}
	netlab.Eventually(t, "the tunnel carries packets", func() bool { // the other end has its SA a moment later
		_, err := a.Try("ping", "-c", "1", "-W", "1", innerB)
		return err == nil
	})
	got = scrape(t, socket)
	if sent := got[`ipipd_tunnel_transmit_packets_total{tunnel="t0"}`]; sent < 1 {
		t.Errorf("%v packets sent", sent)
	}
	if _, ok := got[`ipipd_tunnel_dropped_packets_total{tunnel="t0",direction="receive",reason="esp-replay"}`]; !ok {
		t.Error("no series of what ESP drops")
	}
	for _, of := range []string{"process_open_fds", "process_max_fds", "process_resident_memory_bytes"} {
		if got[of] == 0 {
			t.Errorf("no %s", of)
		}
	}
}
