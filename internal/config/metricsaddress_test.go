package config

import (
	"strings"
	"testing"
)

func TestMetricsAddress(t *testing.T) {
	for value, want := range map[string]string{
		"off":                      "off",
		":9469":                    "127.0.0.1:9469",
		"localhost:9469":           "127.0.0.1:9469",
		"0.0.0.0:9469":             "0.0.0.0:9469",
		"[::]:9469":                "[::]:9469",
		"[::1]:9469":               "[::1]:9469",
		"[fe80::1%eth0]:9469":      "[fe80::1%eth0]:9469",
		"[::ffff:192.0.2.1]:9469":  "192.0.2.1:9469",
		"127.0.0.1:0":              "127.0.0.1:0",
		"unix:/run/ipipd.sock":     "unix:/run/ipipd.sock",
		"/run/ipipd.sock":          "unix:/run/ipipd.sock",
		"/run/a folder/ipipd.sock": "unix:/run/a folder/ipipd.sock",
	} {
		var p Process
		if err := metricsAddress.Set(&p, value); err != nil || metricsAddress.Get(&p) != want {
			t.Errorf("%q: %q, %v; want %q", value, metricsAddress.Get(&p), err, want)
		}
		again := p
		if err := metricsAddress.Set(&again, metricsAddress.Get(&p)); err != nil || again != p {
			t.Errorf("%q: %q is not what it was: %q, %v", value, metricsAddress.Get(&p), again.MetricsAddress, err)
		}
	}
	for _, value := range []string{
		"", "9469", "127.0.0.1", "127.0.0.1:", ":", "::1:9469", "[::1]", ":65536", ":-1", ":+1", ": 9469", ":http", "*:9469", "host.example:9469", "0x7f.1:80",
		"http://127.0.0.1:9469", "127.0.0.1:9469/metrics", "Off", "no", "unix:", "unix:run/ipipd.sock", "unix:@ipipd", "unix:/", "/", "/run/", "/run/../etc/x", "//run/x",
		"/" + strings.Repeat("x", 108), "/run/\x00x",
	} {
		p := Process{MetricsAddress: "before"}
		if err := metricsAddress.Set(&p, value); err == nil {
			t.Errorf("%q is accepted, as %q", value, p.MetricsAddress)
		}
	}
}
